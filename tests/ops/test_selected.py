"""Calls from a selection that was made before, into new memory and into base: against float64, and the checks."""

import pytest
import torch

from tests.ops.linear_case import LinearCase, in_float64
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops
from vblora_triton.ops import reference

BACKENDS = ("triton", "auto", "reference")
CASES = [
    LinearCase(dtype=dtype, **sizes)
    for dtype in (torch.float32, torch.bfloat16)
    for sizes in (
        {},
        {"K": 40, "N": 8, "r": 5, "h": 300, "b": 8, "base": False, "layout": "gaps"},
        {"batch": (3, 5), "K": 48, "N": 96, "h": 3, "layout": "transposed"},
        {"M": 0},
    )
]


def selection_of(tensors, k, backend):
    return ops.select(tensors["logits_A"].detach(), tensors["logits_B"].detach(), k, backend=backend)


def wanted_of(tensors):
    return {name: tensors[name] for name in ("x", "base", "vector_bank") if name in tensors}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_logits(case):
    tensors = case.tensors()
    truth = case.run(reference.vblora_linear, in_float64(tensors))
    wanted = wanted_of(tensors)

    def run(function, backend):
        selection = selection_of(tensors, case.k, backend)
        inputs = (tensors["x"], tensors.get("base"), *selection, tensors["vector_bank"])
        y = function(*inputs, backend=backend)
        with torch.no_grad():
            unrecorded = function(*inputs, backend=backend)
        return [y, unrecorded, *torch.autograd.grad(y, list(wanted.values()), tensors["dy"])]

    plain = run(ops.vblora_linear_selected, "reference")
    names = ("y", "y", *wanted)
    for backend in BACKENDS:
        for name, value, eager in zip(names, run(ops.vblora_linear_selected, backend), plain, strict=True):
            assert_as_exact_as_eager(value, eager, truth[name], case.dtype, f"{name}, {backend}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selection_may_have_gaps(backend):
    tensors = [t.detach() for t in LinearCase(M=20, k=4).tensors().values()]
    x, base, logits_A, logits_B, bank, _ = tensors
    whole = ops.select(logits_A, logits_B, 4, backend=backend)
    with_gaps = [t[..., :2] for t in whole]
    expected = ops.vblora_linear_selected(x, base, *(t.clone() for t in with_gaps), bank, backend="reference")
    y = ops.vblora_linear_selected(x, base, *with_gaps, bank, backend=backend)
    torch.testing.assert_close(y, expected)


def test_a_selection_is_checked_and_frozen():
    tensors = [t.detach() for t in LinearCase(M=2, K=16, N=24, b=8, h=5).tensors().values()]
    x, base, logits_A, logits_B, bank, _ = tensors
    before = base.clone()
    selection = ops.select(logits_A, logits_B, 2)
    for change, error, message in (
        ({"indices_A": selection.indices_A.long()}, TypeError, "`indices_A` and `weights_A` are torch.int64"),
        ({"indices_B": selection.indices_B[:1]}, ValueError, "`indices_B` has shape"),
        ({"weights_A": selection.weights_A.clone().requires_grad_()}, ValueError, "`weights_A` requires a gradient"),
    ):
        with pytest.raises(error, match=message):
            ops.vblora_linear_selected(x, base, **selection._asdict() | change, vector_bank=bank)
    assert torch.equal(base, before)
    with pytest.raises(ValueError, match=r"`logits_A` has shape \(4, 2, 5\) and `logits_B` \(2, 4, 5\)|must be"):
        ops.select(logits_A, logits_B[:, :2], 2)


def test_operators_pass_opcheck():
    tensors = [t.detach() for t in LinearCase(M=20, K=16, N=24, b=8, h=5).tensors().values()]
    x, base, logits_A, logits_B, bank, _ = tensors
    operators = torch.ops.vblora_triton
    torch.library.opcheck(operators.vblora_select.default, (logits_A, logits_B, 2))
    selection = ops.select(logits_A, logits_B, 2, backend="triton")
    for grad in (True, False):
        inputs = [t.clone().requires_grad_(grad) for t in (x, base, bank)]
        arguments = (*inputs[:2], *selection, inputs[2], 0.0, None)
        torch.library.opcheck(operators.vblora_linear_selected.default, arguments)
