"""Dropout inside the kernels: its distribution, its gradients, and that one seed means one mask."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.linear_case import LinearCase, in_float64
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One bank vector of ones and r = 1: A and B are all ones, so that y = the sum of the kept elements, scaled.
ONES = {"logits_A": torch.zeros(1, 8, 1), "logits_B": torch.zeros(1, 1, 1), "vector_bank": torch.ones(1, 16)}


def kept(x, p, backend, **options):
    """dropout(x), read off the gradient of a sum: d(sum_k dropout(x)_k) / dx_k = dropout(1)_k."""
    parameters = (t.to(x.device) for t in ONES.values())
    x = x.detach().requires_grad_()
    y = ops.vblora_linear(x, None, *parameters, 1, dropout_p=p, training=True, backend=backend, **options)
    return y, torch.autograd.grad(y[..., 0].sum(), x)[0]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate_and_expectation(p, backend):
    torch.manual_seed(0)
    x = torch.ones(300, 128, device=DEVICE)
    y, scale = kept(x, p, backend)
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


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_edges_of_the_rate(backend):
    x = torch.ones(20, 128, device=DEVICE)
    y, scale = kept(x, 1.0, backend)
    assert (y == 0).all()
    assert (scale == 0).all()
    y, scale = kept(x, 0.0, backend)
    assert (scale == 1).all()
    x, parameters = x.requires_grad_(), [t.to(DEVICE) for t in ONES.values()]
    y = ops.vblora_linear(x, None, *parameters, 1, dropout_p=0.5, training=False, backend=backend)
    assert (y == 128).all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_manual_seed_reproduces_it_and_calls_differ(backend):
    x = torch.ones(40, 128, device=DEVICE)
    torch.manual_seed(1)
    first, second = kept(x, 0.5, backend)[1], kept(x, 0.5, backend)[1]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, kept(x, 0.5, backend)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_gradients_are_those_of_the_masked_input(dtype):
    # Several blocks of rows and columns in every launch, so that a mask that depended on the tiling would show.
    case = LinearCase(M=150, K=288, N=144, b=48, dtype=dtype)
    tensors = case.tensors()
    p = 0.25
    torch.manual_seed(3)
    triton = case.run(ops.vblora_linear, tensors, dropout_p=p, training=True, backend="triton")
    # The same mask, read off the kernel for rank 1 and ones, whose tiles are of another shape.
    ones = (torch.zeros(1, 6, 1), torch.zeros(1, 1, 1), torch.ones(1, 48))
    x = torch.ones_like(tensors["x"], dtype=torch.float32).requires_grad_()
    torch.manual_seed(3)
    y = ops.vblora_linear(x, None, *(t.to(DEVICE) for t in ones), 1, dropout_p=p, training=True, backend="triton")
    (scale,) = torch.autograd.grad(y[:, 0].sum(), x)

    def masked(x, *rest):
        return reference.vblora_linear(x * scale.to(torch.promote_types(x.dtype, torch.float32)), *rest)

    truth, eager = case.run(masked, in_float64(tensors)), case.run(masked, tensors)
    for name in truth:
        assert_as_exact_as_eager(triton[name], eager[name], truth[name], dtype, name)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_activation_checkpointing_replays_it(use_reentrant, backend):
    case = LinearCase()

    def function(*args):
        return ops.vblora_linear(*args, case.k, dropout_p=0.5, training=True, backend=backend)

    def run(function):
        tensors = case.tensors()
        dy = tensors.pop("dy")
        torch.manual_seed(7)
        y = function(*tensors.values())
        torch.rand(5)
        # Not torch.autograd.grad: reentrant checkpointing knows only backward().
        y.backward(dy)
        return [y, *(t.grad for t in tensors.values())]

    plain = run(function)
    checkpointed = run(lambda *args: checkpoint(function, *args, use_reentrant=use_reentrant))
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)
