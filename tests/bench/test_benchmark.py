"""A layer on the CPU by pytest-benchmark: `pytest --benchmark-only tests/bench/test_benchmark.py`."""

import pytest

from bench import correctness
from bench.cases import on_cpu
from bench.cpu import COMPARED
from bench.device import Cpu
from bench.workloads import Workload, make_base, sharing_copy

pytest.importorskip("pytest_benchmark")
pytest.importorskip("peft")


@pytest.mark.parametrize("provider", [p for p in COMPARED if p.name in ("ours", "peft")], ids=lambda p: p.name)
@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("case", [case for case in on_cpu("layer") if case.h == 256], ids=lambda case: case.method)
def test_timed_layer_is_right(benchmark, case, direction, provider):
    benchmark.group = case.id(direction)
    device = Cpu().torch_device
    base, workload = make_base(case, device), Workload(case, direction, device)
    model = workload.prepare(provider.adapt(case, sharing_copy(base)))
    # Few rounds, for the suite runs this too; `python -m bench` measures turn by turn.
    results = benchmark.pedantic(workload.call(model), args=(0,), rounds=3, warmup_rounds=1)
    found = correctness.errors(results, correctness.truth_of(case, workload, base))
    correctness.check(found, dict.fromkeys(found, correctness.eager_limit(case)))
