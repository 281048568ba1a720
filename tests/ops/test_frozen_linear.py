"""Ops that compute the base's product themselves: as exact as PyTorch, in one node of autograd, by addmm_ in place."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.models import DEVICE
from tests.ops.linear_case import NAMES, LinearCase, in_float64
from tests.ops.vera_case import VeraCase, arguments
from tests.tolerance import allowed_error, assert_as_exact_as_eager, relative_error
from vblora_triton import ops
from vblora_triton.ops import reference

SIZES = (
    {"M": 20},
    # Of so many rows the base's product comes after the update.
    {"M": 600, "dtype": torch.bfloat16},
    {"M": 0},
    {"M": 5, "batch": (2, 3, 7)},
    {"M": 1, "batch": ()},
    {"M": 40, "layout": "gaps"},
    {"M": 33, "dtype": torch.bfloat16},
    {"M": 20, "dtype": torch.float16},
    {"M": 20, "dtype": torch.bfloat16, "parameter_dtype": torch.bfloat16},
)
METHODS = {"vblora": LinearCase, "vera": VeraCase}
CASES = [
    pytest.param(m, kind(base=False, **sizes), id=f"{m}-{kind(**sizes)}")
    for m, kind in METHODS.items()
    for sizes in SIZES
]


def layer_of(case, bias=True):
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(case.N, case.K, generator=generator) * case.K**-0.5
    added = torch.randn(case.N, generator=generator) if bias else None
    return ops.FrozenLinear(*(t if t is None else t.to(DEVICE, case.dtype) for t in (weight, added)))


def inputs_of(method, case, tensors, base):
    """The op's positional arguments with this base."""
    if method == "vera":
        x, _, *rest = arguments(tensors)
    else:
        x, _, *rest = [*(tensors.get(name) for name in NAMES), case.k]
    return x, base, *rest


def run(function, method, case, tensors, base, **options):
    """The output and every gradient."""
    inputs = inputs_of(method, case, tensors, base)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    y = function(*inputs, **options)
    return [y, *torch.autograd.grad(y, wanted, tensors["dy"].to(y.dtype))]


def defined(method, given):
    """The definition, with the base's product by plain PyTorch."""
    function = getattr(reference, f"{method}_linear")
    return lambda x, base, *rest: function(x, F.linear(x, *given), *rest)


def widened(base):
    return ops.FrozenLinear(*(t if t is None else t.double() for t in base))


@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
@pytest.mark.parametrize(("method", "case"), CASES)
def test_output_and_gradients_are_as_exact_as_eager(method, case, backend):
    for bias in (True, False):
        tensors, base = case.tensors(), layer_of(case, bias)
        truth = run(defined(method, widened(base)), method, case, in_float64(tensors), None)
        eager = run(defined(method, base), method, case, tensors, None)
        with ops.backends_that_run() as ran:
            found = run(getattr(ops, f"{method}_linear"), method, case, tensors, base, backend=backend)
        assert ran == {"cpu" if backend == "auto" and DEVICE == "cpu" else "triton" if backend == "auto" else backend}
        for i, (value, plain, exact) in enumerate(zip(found, eager, truth, strict=True)):
            assert_as_exact_as_eager(value, plain, exact, case.dtype, f"{i}, bias {bias}")


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(40, 384, 240), (130, 96, 480), (7, 480, 96)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_y_and_dx_round_no_more_than_eagers_base_and_update_one_after_the_other(method, sizes, dtype, bias, backend):
    M, K, N = sizes
    case = METHODS[method](M=M, K=K, N=N, base=False, dtype=dtype)
    tensors, base = case.tensors(), layer_of(case, bias)
    for name, t in tensors.items():
        t.requires_grad_(name == "x")
    truth = run(defined(method, widened(base)), method, case, in_float64(tensors), None)
    eager = run(defined(method, base), method, case, tensors, None)
    found = run(getattr(ops, f"{method}_linear"), method, case, tensors, base, backend=backend)
    for value, plain, exact, what in zip(found, eager, truth, ("y", "dx"), strict=True):
        theirs = relative_error(plain, exact)
        # Of fp32 the order of the sums is all that differs, which may go either way.
        most = allowed_error(theirs, dtype) if dtype == torch.float32 else 1.02 * theirs
        assert relative_error(value, exact) <= most, what


@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
def test_from_a_selection_it_is_the_same(backend):
    case = LinearCase(M=20, base=False)
    tensors, base = case.tensors(), layer_of(case)
    selection = ops.select(tensors["logits_A"].detach(), tensors["logits_B"].detach(), case.k, backend=backend)
    expected = ops.vblora_linear(
        tensors["x"], base, tensors["logits_A"], tensors["logits_B"], tensors["vector_bank"], case.k
    )
    y = ops.vblora_linear_selected(tensors["x"], base, *selection, tensors["vector_bank"], backend=backend)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(t, (tensors["x"], tensors["vector_bank"]), tensors["dy"]) for t in (y, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_of_the_update_alone(method, backend):
    case = METHODS[method](M=40, base=False)
    tensors, base = case.tensors(), layer_of(case)
    op = getattr(ops, f"{method}_linear")
    options = {"dropout_p": 0.5, "training": True, "backend": backend}
    found = []
    for function in (op, lambda x, base, *rest, **options: op(x, F.linear(x, *base), *rest, **options)):
        torch.manual_seed(3)
        found.append(run(function, method, case, tensors, base, **options))
    for own, apart in zip(*found, strict=True):
        torch.testing.assert_close(own, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_it_may_be_checkpointed(method, reentrant, backend):
    case = METHODS[method](M=20, base=False)
    tensors, base = case.tensors(), layer_of(case)
    op = getattr(ops, f"{method}_linear")
    inputs = inputs_of(method, case, tensors, base)
    trained = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    expected = run(op, method, case, tensors, base, backend=backend)
    y = checkpoint(lambda *args: op(*args, backend=backend), *inputs, use_reentrant=reentrant)
    y.backward(tensors["dy"])
    for a, b in zip([y, *(t.grad for t in trained)], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="what a CPU runs")
@pytest.mark.parametrize("method", METHODS)
def test_gradients_may_be_asked_for_in_batches_on_a_cpu(method):
    case = METHODS[method](M=20, base=False)
    tensors, base = case.tensors(), layer_of(case)
    dys = torch.stack([tensors["dy"], tensors["dy"].flip(0), tensors["dy"] * 0])
    inputs = inputs_of(method, case, tensors, base)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    op = getattr(ops, f"{method}_linear")
    together = torch.autograd.grad(op(*inputs), wanted, dys, is_grads_batched=True)
    alone = [torch.autograd.grad(op(*inputs), wanted, dy) for dy in dys]
    for batch, *each in zip(together, *alone, strict=True):
        torch.testing.assert_close(batch, torch.stack(each), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_trained_gets_its_gradients(method, backend):
    case = METHODS[method](M=20, base=False)
    tensors, base = case.tensors(), layer_of(case)
    trained = ops.FrozenLinear(*(t.clone().requires_grad_() for t in base))
    y = getattr(ops, f"{method}_linear")(*inputs_of(method, case, tensors, trained), backend=backend)
    grads = torch.autograd.grad(y, trained, tensors["dy"])
    expected = torch.autograd.grad(F.linear(tensors["x"], *trained), trained, tensors["dy"])
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, b: (w[:, 1:], b), r"`base` has a weight of \(144, 95\).*must be \(144, 96\)"),
        (lambda w, b: (w[1:], b), r"`base` has a weight of \(143, 96\)"),
        (lambda w, b: (w, b[1:]), r"a bias of \(143,\)"),
        (lambda w, b: (w.to("meta"), b), "`weight` is on meta"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_does_not_fit_is_named(method, change, message):
    case = METHODS[method](M=3, base=False)
    tensors = case.tensors()
    base = ops.FrozenLinear(*change(*layer_of(case)))
    with pytest.raises(ValueError, match=message):
        getattr(ops, f"{method}_linear")(*inputs_of(method, case, tensors, base))


def test_a_second_derivative_is_refused():
    case = LinearCase(M=3, base=False)
    tensors, base = case.tensors(), layer_of(case)
    y = ops.vblora_linear(*inputs_of("vblora", case, tensors, base), backend="triton")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)
