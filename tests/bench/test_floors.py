"""The floor model against the design's numbers for an H200: 4.3 TB/s copy, 790 TFLOP/s bf16."""

import pytest

from bench.floors import (
    H200,
    LLAMA2_7B,
    PLANS,
    Rates,
    base_time,
    flat,
    must_take,
    overhead,
    peft_overhead,
    table,
)

# One layer of Llama-2-7B over the frozen base alone, forward / backward: the base called as a module; its product
# owned, hiding its read of y and dx and not; and layers that share x together, hiding it and not.
DESIGN = {
    256: ((1.22, 1.33), (1.21, 1.21), (1.25, 1.24), (1.17, 1.14), (1.21, 1.17)),
    4096: ((1.11, 1.19), (1.07, 1.10), (1.11, 1.13), (1.06, 1.05), (1.10, 1.08)),
    16384: ((1.11, 1.19), (1.07, 1.10), (1.11, 1.13), (1.06, 1.05), (1.10, 1.08)),
}
COLUMNS = (("module", True), ("owned", True), ("owned", False), ("shared", True), ("shared", False))


@pytest.mark.parametrize("M", DESIGN)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_plans_of_kernels_cost_what_the_design_says(M, direction):
    for (plan, hidden), numbers in zip(COLUMNS, DESIGN[M], strict=True):
        expected = numbers[direction == "bwd"]
        found = overhead(LLAMA2_7B, M, direction, plan, H200, hidden=hidden)
        # One in the last of the design's digits.
        assert found == pytest.approx(expected, abs=0.01), plan


@pytest.mark.parametrize(("M", "expected"), [(4096, (1.85, 1.96)), (16384, (1.62, 1.77))], ids=str)
def test_pefts_eager_layers_cost_what_the_design_says_where_bytes_decide(M, expected):
    found = [peft_overhead(flat(LLAMA2_7B), M, direction, H200) for direction in ("fwd", "bwd")]
    assert found == pytest.approx(expected, rel=0.015)


def test_autograds_addition_of_dx_and_the_draw_of_the_seed_are_counted():
    shape, M = (4096, 4096), 4096
    base = base_time([shape], M, H200)
    # dy read, x read and dx written, and then two of dx read and a third written.
    moved = 2 * (M * 4096 + 2 * M * 4096 + 3 * M * 4096)
    assert overhead([[shape]], M, "bwd", "module", H200) == pytest.approx(1 + moved / H200.copy / base)
    # No bytes, but a launch: 2 us.
    draws = [overhead([[shape]], M, "fwd", "module", H200, dropout=dropout) for dropout in (True, False)]
    assert draws[0] - draws[1] == pytest.approx(2e-6 / base)


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
    assert row.keys() == {"M"} | {f"{p}_{d}" for p in ("peft", *PLANS) for d in ("fwd", "bwd")}
