"""Dropout inside the kernels: its distribution, its gradients, and that one seed means one mask."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.models import DEVICE
from tests.ops.linear_case import LinearCase, in_float64
from tests.ops.vera_case import VeraCase, arguments
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops
from vblora_triton.ops import reference

# One bank vector of ones and r = 1: A and B are all ones, so that y = the sum of the kept elements, scaled.
ONES = {"logits_A": torch.zeros(1, 8, 1), "logits_B": torch.zeros(1, 1, 1), "vector_bank": torch.ones(1, 16)}


CASES = {
    "vblora": lambda **sizes: ("vblora_linear", LinearCase(**{"N": 144, "b": 48} | sizes)),
    "vera": lambda **sizes: ("vera_linear", VeraCase(**sizes)),
}
METHODS = pytest.mark.parametrize("method", ["vblora", "vera"])


def inputs_of(case, tensors):
    if isinstance(case, VeraCase):
        return arguments(tensors)
    return [*(t for name, t in tensors.items() if name != "dy"), case.k]


def linear_of_ones(x, method, **options):
    """y[m, 0] = the sum of dropout(x)[m], by a linear of rank 1 whose matrices are all ones."""
    if method == "vblora":
        return ops.vblora_linear(x, None, *(t.to(x.device) for t in ONES.values()), 1, **options)
    one, A = torch.ones(1, device=x.device), torch.ones(1, x.shape[-1], device=x.device)
    return ops.vera_linear(x, None, one, one, A, one[:, None], **options)


def kept(x, p, backend, method="vblora"):
    """dropout(x), read off the gradient of a sum: d(sum_k dropout(x)_k) / dx_k = dropout(1)_k."""
    x = x.detach().requires_grad_()
    y = linear_of_ones(x, method, dropout_p=p, training=True, backend=backend)
    return y, torch.autograd.grad(y[..., 0].sum(), x)[0]


@METHODS
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate_and_expectation(p, backend, method):
    torch.manual_seed(0)
    x = torch.ones(300, 128, device=DEVICE)
    y, scale = kept(x, p, backend, method)
    n = scale.numel()
    # Five standard deviations of a binomial: a fair mask fails once in two million.
    assert abs((scale == 0).sum().item() / n - p) < 5 * math.sqrt(p * (1 - p) / n)
    torch.testing.assert_close(scale[scale != 0], torch.full_like(scale[scale != 0], 1 / (1 - p)), rtol=2e-4, atol=0)
    assert abs(scale.mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / n)
    torch.testing.assert_close(y[:, 0], scale.sum(-1), rtol=1e-5, atol=0)
    # Neither rows nor columns share their mask, and neighbours are independent.
    mask = (scale != 0).double()
    assert len(mask.unique(dim=0)) == len(mask)
    for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[:, 8:], mask[:, :-8])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(a.numel())


@METHODS
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_edges_of_the_rate(backend, method):
    x = torch.ones(20, 128, device=DEVICE)
    y, scale = kept(x, 1.0, backend, method)
    assert (y == 0).all()
    assert (scale == 0).all()
    y, scale = kept(x, 0.0, backend, method)
    assert (scale == 1).all()
    assert (linear_of_ones(x, method, dropout_p=0.5, training=False, backend=backend) == 128).all()


@METHODS
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_manual_seed_reproduces_it_and_calls_differ(backend, method):
    x = torch.ones(40, 128, device=DEVICE)
    torch.manual_seed(1)
    first, second = kept(x, 0.5, backend, method)[1], kept(x, 0.5, backend, method)[1]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, kept(x, 0.5, backend, method)[1])


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_gradients_are_those_of_the_masked_input(dtype, method):
    # Several blocks of rows and columns in every launch, so that a mask that depended on the tiling would show.
    function, case = CASES[method](M=150, K=288, dtype=dtype)
    tensors = case.tensors()
    p = 0.25
    torch.manual_seed(3)
    triton = case.run(getattr(ops, function), tensors, dropout_p=p, training=True, backend="triton")
    # The same mask, read off VB-LoRA's kernel for rank 1 and ones, whose tiles are of another shape.
    ones = (torch.zeros(1, 6, 1), torch.zeros(1, 1, 1), torch.ones(1, 48))
    x = torch.ones_like(tensors["x"], dtype=torch.float32).requires_grad_()
    torch.manual_seed(3)
    y = ops.vblora_linear(x, None, *(t.to(DEVICE) for t in ones), 1, dropout_p=p, training=True, backend="triton")
    (scale,) = torch.autograd.grad(y[:, 0].sum(), x)

    def masked(x, *rest):
        return getattr(reference, function)(x * scale.to(torch.promote_types(x.dtype, torch.float32)), *rest)

    truth, eager = case.run(masked, in_float64(tensors)), case.run(masked, tensors)
    for name in truth:
        assert_as_exact_as_eager(triton[name], eager[name], truth[name], dtype, name)


@METHODS
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_activation_checkpointing_replays_it(use_reentrant, backend, method):
    function, case = CASES[method]()

    def run(wrap):
        tensors = case.tensors()
        torch.manual_seed(7)

        def dropped(*args):
            return getattr(ops, function)(*args, dropout_p=0.5, training=True, backend=backend)

        y = wrap(dropped)(*inputs_of(case, tensors))
        torch.rand(5)
        # Not torch.autograd.grad: reentrant checkpointing knows only backward().
        y.backward(tensors["dy"])
        return [y, *(t.grad for t in tensors.values() if t.requires_grad)]

    plain = run(lambda f: f)
    checkpointed = run(lambda f: lambda *args: checkpoint(f, *args, use_reentrant=use_reentrant))
    assert len(plain) == 6 if method == "vblora" else 5
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)
