"""The floor model against the design's numbers for an H200: 4.3 TB/s copy, 790 TFLOP/s bf16."""

import pytest

from bench.floors import (
    H200,
    LLAMA2_7B,
    Rates,
    base_time,
    flat,
    must_take,
    overhead,
    peft_overhead,
    table,
)

# One layer of Llama-2-7B over the frozen base alone, forward / backward: separate kernels, grouped, in the epilogue.
DESIGN = {
    256: ((1.22, 1.23), (1.16, 1.18), (1.06, 1.17)),
    4096: ((1.11, 1.14), (1.10, 1.11), (1.02, 1.06)),
    16384: ((1.11, 1.14), (1.10, 1.11), (1.02, 1.06)),
}


@pytest.mark.parametrize("M", DESIGN)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_plans_of_kernels_cost_what_the_design_says(M, direction):
    for plan, numbers in zip(("separate", "grouped", "epilogue"), DESIGN[M], strict=True):
        expected = numbers[direction == "bwd"]
        # One in the last of the design's digits.
        assert overhead(LLAMA2_7B, M, direction, plan, H200) == pytest.approx(expected, abs=0.01), plan


@pytest.mark.parametrize(("M", "expected"), [(4096, (1.85, 1.96)), (16384, (1.62, 1.77))], ids=str)
def test_pefts_eager_layers_cost_what_the_design_says_where_bytes_decide(M, expected):
    found = [peft_overhead(flat(LLAMA2_7B), M, direction, H200) for direction in ("fwd", "bwd")]
    assert found == pytest.approx(expected, rel=0.015)


def test_base_is_bound_by_the_weight_for_one_token_and_by_operations_for_many():
    K, N = 4096, 11008
    assert base_time([(K, N)], 1, H200) == pytest.approx(2 * K * N / H200.copy, rel=1e-3)
    assert base_time([(K, N)], 16384, H200) == 2 * 16384 * K * N / H200.matmul


def test_must_take_counts_each_operand_once():
    slow = Rates(copy=1.0, matmul=1e30, matmul_fp32=1e30)
    assert must_take(3, 5, 7, 0, "fwd", slow).seconds == 2 * (7 * 3 + 3 * 5 + 7 * 5)
    # Back: dy, the weight and dx; with an update whose A is trained also x, with VeRA also A and B, both ways.
    both = 2 * 2 * (7 * 3 + 3 * 5 + 7 * 5)
    assert must_take(3, 5, 7, 0, "fwd_bwd", slow).bytes == both
    assert must_take(3, 5, 7, 2, "fwd_bwd", slow).bytes == both + 2 * 7 * 3
    assert must_take(3, 5, 7, 2, "fwd_bwd", slow, frozen=True).bytes == both + 2 * 4 * 2 * (3 + 5)
    assert must_take(3, 5, 7, 2, "fwd", slow).operations == 2 * 7 * 3 * 5 + 2 * 7 * 2 * (3 + 5)


def test_table_has_a_column_for_each_plan_and_direction():
    (row, *_) = table(H200)
    assert row.keys() == {"M"} | {
        f"{p}_{d}" for p in ("peft", "separate", "grouped", "epilogue") for d in ("fwd", "bwd")
    }
