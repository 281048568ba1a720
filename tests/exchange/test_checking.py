"""The check says what it finds: right backends are right, and a broken one is seen."""

import json

import pytest
import torch

from vblora_triton import ops
from vblora_triton.cli import main
from vblora_triton.exchange import checking
from vblora_triton.exchange.checking import Shape, check_kernels


def test_a_machine_without_a_gpu_learns_what_it_can_trust(capsys):
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here")
    assert main(["check"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in shown
    (last,) = shown.splitlines()[-1:]
    assert last.startswith("No kernels run here; the results of PyTorch, instead, can be trusted here: 27 of 27 ")


def test_kernels_are_compared_in_each_dtype(monkeypatch):
    monkeypatch.setattr(checking, "SHAPES", (Shape(3, 32, 48, 2, 6, 16, 2),))
    with ops.backends_that_run() as ran:
        check = check_kernels("triton")
    assert "triton" in ran
    assert check.passed, [c for c in check.comparisons if not c.passed]
    found = {(c.op, c.dtype) for c in check.comparisons}
    assert found == {(op, dtype) for op in ("vblora_linear", "compose", "vera_linear") for dtype in DTYPES}


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("broken", [lambda y: y * 1.01, lambda y: y * float("nan"), lambda y: 1 / 0])
def test_wrong_results_are_exit_code_1(broken, monkeypatch, capsys):
    plain = ops.vera_linear
    monkeypatch.setattr(checking, "SHAPES", checking.SHAPES[:1])

    def wrong(*arguments, backend):
        y = plain(*arguments, backend=backend)
        return broken(y) if backend == "cpu" and y.dtype == torch.float32 else y

    monkeypatch.setattr(ops, "vera_linear", wrong)
    assert main(["check", "--backend", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "vera_linear    float32   WRONG in 1 of 1 shapes" in shown
    assert "cannot be trusted here: 8 of 9" in shown
    assert main(["check", "--backend", "cpu", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert [c["op"] for c in report["comparisons"] if not c["passed"]] == ["vera_linear"]
