"""vblora_triton.ops.vera_linear: the kernels and the reference against float64, registration, memory and the checks."""

import gc
import itertools
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models import DEVICE
from tests.ops.linear_case import in_float64
from tests.ops.vera_case import TRAINED, VeraCase, arguments
from tests.tolerance import assert_as_exact_as_eager, relative_error
from tools.kernels_report import vera_passes
from vblora_triton import ops
from vblora_triton.kernels.launch import counted, intercepted
from vblora_triton.ops import reference, triton_vera

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# M below and above the 64 rows up to which all terms count; r 1 to 260; sizes that divide nothing; each layout.
CASES = [
    {"M": 0, "K": 96, "N": 144, "r": 4},
    {"M": 1, "K": 7, "N": 5, "r": 1, "base": False},
    {"M": 17, "K": 96, "N": 144, "r": 20},
    {"M": 1, "K": 600, "N": 40, "r": 260, "spare": 0},
    {"M": 130, "K": 100, "N": 90, "r": 70},
    {"M": 130, "K": 100, "N": 90, "r": 70, "base": False, "layout": "transposed"},
    {"M": 65, "K": 40, "N": 600, "r": 260, "layout": "gaps"},
    # More rows of partials than are added up at once.
    {"M": 2, "K": 8, "N": 4200, "r": 3},
    {"batch": (), "K": 96, "N": 48, "r": 5},
    {"batch": (3, 5, 7), "K": 33, "N": 17, "r": 20, "layout": "transposed"},
    {"batch": (2, 0, 5), "K": 16, "N": 8, "r": 4, "base": False},
]


def cases(*dicts: dict, dtypes=DTYPES, **more):
    return [pytest.param(case := VeraCase(dtype=d, **c, **more), id=str(case)) for c in dicts for d in dtypes]


def assert_exact(case: VeraCase, tensors: dict[str, torch.Tensor], floor_dtype: torch.dtype | None = None, **options):
    truth = case.run(reference.vera_linear, in_float64(tensors))
    eager = case.run(reference.vera_linear, tensors)
    triton = case.run(ops.vera_linear, tensors, backend="triton", **options)
    assert triton.keys() == truth.keys()
    for name in truth:
        assert_as_exact_as_eager(triton[name], eager[name], truth[name], floor_dtype or case.dtype, name)


@pytest.mark.parametrize("case", cases(*CASES))
def test_triton_linear_and_each_gradient_are_as_exact_as_eager(case):
    assert_exact(case, case.tensors())


@pytest.mark.parametrize(
    "case",
    cases(CASES[4], dtypes=[torch.bfloat16], parameter_dtype=torch.bfloat16)
    # Under autocast: a layer norm gives fp32, and the base layer makes 16 bits of it.
    + cases(CASES[4], dtypes=[torch.float32], base_dtype=torch.bfloat16)
    + cases(CASES[2], CASES[4], dtypes=[torch.bfloat16], base_dtype=torch.float32),
)
def test_triton_linear_takes_mixed_dtypes(case):
    assert_exact(case, case.tensors(), torch.bfloat16)


@pytest.mark.parametrize("M", [9, 70])
def test_update_alone_is_exact_to_1e_4(M):
    # Kept in float32, as an update in bf16 would be rounded to 8 bits whatever computed it. 16 bits of p count.
    case = VeraCase(M=M, K=192, r=16, dtype=torch.bfloat16, base_dtype=torch.float32)
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    x, base, *rest = arguments(tensors)
    truth = reference.vera_linear(x.double(), None, *(t.double() for t in rest))
    y = ops.vera_linear(x, torch.zeros_like(base), *rest, backend="triton")
    assert relative_error(y, truth) < (1e-5 if M <= 64 else 5e-5)


def test_medium_matmul_precision_keeps_8_bits_and_the_others_16():
    case = VeraCase(M=70, dtype=torch.bfloat16)
    tensors = case.tensors()
    truth = case.run(reference.vera_linear, in_float64(tensors))
    errors = {}
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            result = case.run(ops.vera_linear, tensors, backend="triton")
        finally:
            torch.set_float32_matmul_precision(before)
        errors[precision] = relative_error(result["lambda_d"], truth["lambda_d"])
    assert errors["highest"] == errors["high"] < 5e-5 < 5e-4 < errors["medium"] < 5e-3


@pytest.mark.parametrize("needed", [c for n in range(1, 4) for c in itertools.combinations(range(4), n)], ids=str)
def test_gradients_of_any_of_the_inputs_are_those_of_all_together(needed):
    case = VeraCase(M=5, K=16, N=24, r=3)
    everything = case.run(ops.vera_linear, case.tensors(), backend="triton")
    tensors = case.tensors()
    for i, name in enumerate(TRAINED):
        tensors[name].requires_grad_(i in needed)
    y = ops.vera_linear(*arguments(tensors), backend="triton")
    wanted = [name for i, name in enumerate(TRAINED) if i in needed]
    for name, grad in zip(wanted, torch.autograd.grad(y, [tensors[n] for n in wanted], tensors["dy"]), strict=True):
        assert torch.equal(grad, everything[name]), name


@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("M", [3, 70])
def test_a_row_that_is_not_finite_spoils_itself_and_no_other(M, special):
    case = VeraCase(M=M, dtype=torch.bfloat16)
    tensors = case.tensors()
    with torch.no_grad():
        tensors["x"][1, 3] = special
    y = ops.vera_linear(*arguments(tensors), backend="triton")
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert y[2:].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_packing_holds_at_every_magnitude(scale):
    case = VeraCase(M=70, dtype=torch.bfloat16, base=False)
    tensors = case.tensors()
    tensors["x"] = (tensors["x"].detach() * scale).requires_grad_()
    assert_exact(case, tensors)


@pytest.mark.parametrize("case", cases(CASES[2], CASES[4], CASES[0], dtypes=DTYPES[:2]))
def test_a_shared_projected_input_changes_no_bit(case):
    tensors = case.tensors()
    with counted() as alone:
        apart = case.run(ops.vera_linear, tensors, backend="triton")
    projected = ops.vera_project(tensors["x"], tensors["A"], tensors["base"], backend="triton")
    assert not projected.values.requires_grad
    with counted() as names:
        shared = case.run(ops.vera_linear, tensors, backend="triton", projected=projected)
    # What packs p, which is all that is launched for it beside the product.
    packs = case.M > 0 and case.dtype != torch.float32
    assert Counter(alone) - Counter(names) == Counter({"_pack_rows_kernel": 1} if packs else {})
    for name, value in apart.items():
        assert torch.equal(shared[name], value), name


def test_the_reference_shares_no_projected_input_and_takes_none():
    tensors = VeraCase().tensors()
    assert ops.vera_project(tensors["x"], tensors["A"], backend="reference") is None


def test_nothing_is_recorded_without_need_and_base_is_left_alone():
    tensors = VeraCase().tensors()
    before = tensors["base"].detach().clone()
    ops.vera_linear(*arguments(tensors), backend="triton")
    assert torch.equal(tensors["base"], before)
    assert ops.vera_linear(*(t.detach() for t in arguments(tensors)), backend="triton").grad_fn is None
    with torch.no_grad():
        assert ops.vera_linear(*arguments(tensors), backend="triton").grad_fn is None
    with torch.inference_mode():
        ops.vera_linear(*arguments(tensors), backend="triton")


@pytest.mark.parametrize("base", [True, False])
def test_reference_passes_gradcheck(base):
    tensors = in_float64(VeraCase(M=3, K=6, N=9, r=2, base=base, device="cpu").tensors())
    assert torch.autograd.gradcheck(reference.vera_linear, arguments(tensors))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("M", [3, 65])
def test_operators_pass_opcheck(base, requires_grad, dropout_p, M):
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    tensors = VeraCase(M=M, K=16, N=24, r=3, base=base, dtype=torch.bfloat16).tensors()
    inputs = [t if t is None or requires_grad else t.detach() for t in arguments(tensors)]
    x, A = inputs[0].detach(), inputs[4]
    operators = torch.ops.vblora_triton
    torch.library.opcheck(operators.vera_project.default, (x, A, False, dropout_p, seed))
    projected = operators.vera_project(x, A, False, dropout_p, seed)
    torch.library.opcheck(operators.vera_linear.default, (*inputs, *projected, dropout_p, seed))


def test_second_derivative_is_refused():
    tensors = VeraCase(M=2).tensors()
    y = ops.vera_linear(*arguments(tensors), backend="triton")
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*create_graph=True"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


BAD = [
    ({"x": torch.ones(())}, ValueError, "`x` is a scalar"),
    ({"x": torch.ones(3, 102)}, ValueError, r"`A` has shape \(20, 101\); with x \(3, 102\)"),
    ({"x": [1.0]}, TypeError, "`x` must be a floating tensor, not list"),
    ({"lambda_b": torch.ones(145)}, ValueError, r"`base` has shape \(17, 144\)"),
    ({"lambda_b": torch.ones(150), "base": None}, ValueError, r"`B` has shape \(149, 20\).*at least 150, 20"),
    ({"lambda_b": torch.ones(0), "base": None}, ValueError, "`lambda_b` has shape"),
    ({"lambda_d": torch.ones(20, 1)}, ValueError, r"`lambda_d` has shape \(20, 1\); it must be \(r\)"),
    ({"lambda_d": torch.ones(19)}, ValueError, r"`A` has shape \(20, 101\).*must be \(19, at least 96\)"),
    ({"A": torch.ones(20, 101, dtype=torch.int32)}, TypeError, "`A` must be a floating tensor, not torch.int32"),
    ({"B": torch.ones(149, 20, requires_grad=True)}, ValueError, "`B` requires a gradient.*frozen"),
    ({"lambda_d": torch.ones(20, device="meta")}, ValueError, "`lambda_d` is on meta and `x` on"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bad_input_gets_an_error_that_names_it(change, error, message, backend):
    tensors = VeraCase(device="cpu").tensors() | change
    with pytest.raises(error, match=message):
        ops.vera_linear(*arguments(tensors), backend=backend)


def test_bad_options_get_an_error_that_names_them():
    case = VeraCase(M=3)
    tensors = case.tensors()
    for options, error, message in (
        ({"dropout_p": 1.5}, ValueError, "`dropout_p` is 1.5"),
        ({"backend": "cuda"}, ValueError, "`backend` is 'cuda'"),
    ):
        with pytest.raises(error, match=message):
            ops.vera_linear(*arguments(tensors), **options)
    projected = ops.ProjectedInput(torch.ones(4, 20, device=DEVICE), torch.ones(0, device=DEVICE))
    with pytest.raises(ValueError, match=r"`projected` has values of shape \(4, 20\).*must be \(3, 20\)"):
        ops.vera_linear(*arguments(tensors), backend="triton", projected=projected)
    projected = ops.ProjectedInput(torch.ones(3, 20, device=DEVICE), torch.ones(0, device=DEVICE))
    whole = ops.vera_project(tensors["x"], tensors["A"], backend="triton")
    turned = ops.ProjectedInput(whole.values.T.contiguous().T, whole.scale)
    for backend in ("triton", "reference"):
        with pytest.raises(ValueError, match="`projected` is not contiguous"):
            ops.vera_linear(*arguments(tensors), backend=backend, projected=turned)
        with pytest.raises(TypeError, match=r"`projected` has values of torch\.float16"):
            ops.vera_linear(*arguments(tensors), backend=backend, projected=whole._replace(values=whole.values.half()))
    options = {"dropout_p": 0.5, "training": True, "projected": projected}
    with pytest.raises(ValueError, match="made without dropout"):
        ops.vera_linear(*arguments(tensors), backend="triton", **options)
    with pytest.raises(ValueError, match="`A` has shape"):
        ops.vera_project(tensors["x"], tensors["B"].T[:, :90])
    wide = [None if t is None else t.double() for t in arguments(tensors)]
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        ops.vera_linear(*wide, backend="triton")
    big = VeraCase(M=1, K=2, N=2, r=4097).tensors()
    with pytest.raises(ValueError, match="`r` is 4097, and its limit is 4096"):
        ops.vera_linear(*arguments(big), backend="triton")


FORWARD, BACKWARD = ["_pack_rows_kernel", "_scale_kernel"], ["_scale_kernel", "_pack_rows_kernel"]


def test_launches_beside_the_products_are_two_forward_and_two_backward_and_none_for_no_tokens():
    for M, K, N in ((130, 256, 512), (600, 1200, 64)):
        case = VeraCase(M=M, K=K, N=N, dtype=torch.bfloat16)
        tensors = case.tensors()
        with intercepted(lambda *_: None), counted() as names:
            y = ops.vera_linear(*arguments(tensors), backend="triton")
            assert names == FORWARD
            y.backward(tensors["dy"])
        assert names[2:] == BACKWARD
    with counted() as names:
        case = VeraCase(M=0)
        case.run(ops.vera_linear, case.tensors(), backend="triton")
    assert names == []


# The linear of the issue. Nothing is computed on it.
LARGE = VeraCase(M=4096, K=4096, N=4096, r=256, spare=0, dtype=torch.bfloat16)


def test_backward_keeps_the_projected_input_in_16_bits_and_neither_x_nor_an_output():
    tensors = LARGE.tensors()
    kept: list[torch.Tensor] = []
    with (
        intercepted(lambda *_: None),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        ops.vera_linear(*arguments(tensors), backend="triton")
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    given = {tensors[name].untyped_storage().data_ptr() for name in ("lambda_b", "lambda_d", "A", "B")}
    assert not {tensors["x"].untyped_storage().data_ptr(), tensors["base"].untyped_storage().data_ptr()} & {*own}
    small = LARGE.M * 4
    assert sum(size for pointer, size in own.items() if pointer not in given) <= LARGE.M * LARGE.r * 2 + small


def test_no_launch_sees_a_wide_copy_of_an_activation_or_a_projected_output():
    tensors = LARGE.tensors()
    seen: list[tuple[str, torch.Tensor]] = []

    def look(kernel, grid, arguments):
        seen.extend((name, t) for name, t in arguments.items() if isinstance(t, torch.Tensor))

    with intercepted(look):
        y = ops.vera_linear(*arguments(tensors), dropout_p=0.1, training=True, backend="triton")
        y.backward(tensors["dy"])
    M, K = LARGE.M, LARGE.K
    large = [(name, t) for name, t in seen if t.numel() >= M * K]
    assert all(t.dtype == torch.bfloat16 for _, t in large)
    # Dropout alone: of x, and of dx in place.
    assert sorted(name for name, _ in large) == ["High_ptr", "High_ptr", "X_ptr", "X_ptr"]
    # p and D as they are added up, and the terms of C and of p.
    assert max(t.numel() for name, t in seen if t.numel() < M * K) <= 2 * M * LARGE.r


class Seen(TorchDispatchMode):
    """Every operator of PyTorch, with the tensors that it takes and returns."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]))
        return result


def large_tensors(p: float) -> tuple[dict[str, int], set[torch.dtype]]:
    """Of a step at LARGE: how often each operator touches a tensor as large as an activation, and all their dtypes."""
    passes = vera_passes(LARGE.K, LARGE.N, LARGE.M, LARGE.dtype, r=LARGE.r, p=p)
    with intercepted(lambda *_: None), Seen() as seen:
        passes.backward(passes.forward(None))
    large = [(name, t) for name, tensors in seen.calls for t in tensors if t.numel() >= LARGE.M * LARGE.K]
    views = ("slice", "empty", "view", "aten.t.", "new_empty", "transpose", "permute", "select", "detach")
    touched = Counter(name for name, _ in large if not any(view in name for view in views))
    return dict(touched), {t.dtype for _, t in large}


def test_four_products_touch_activations_and_none_is_made_wide():
    # x once for p, y written once; dy twice, for dp and for D, and dx written once.
    products = {"aten.mm.dtype_out": 3, "aten.addmm.out": 6}
    for p in (0.0, 0.1):
        assert large_tensors(p) == (products, {torch.bfloat16})


def test_backward_launches_only_what_is_needed():
    for needed, expected in ((["x"], BACKWARD), (["lambda_b"], BACKWARD), (["lambda_d"], BACKWARD), (["base"], [])):
        tensors = VeraCase(M=70, K=40, N=30, r=3, dtype=torch.bfloat16).tensors()
        for name in TRAINED:
            tensors[name].requires_grad_(name in needed)
        y = ops.vera_linear(*arguments(tensors), backend="triton")
        with counted() as names:
            y.backward(tensors["dy"])
        assert names == expected, needed


def test_the_largest_rank_keeps_the_bound():
    assert_exact(case := VeraCase(M=80, K=48, N=256, r=4096, dtype=torch.bfloat16), case.tensors())


@pytest.mark.parametrize("lambdas", [1.0, 1e-4])
def test_fp16_keeps_the_bound_with_small_scales(lambdas):
    case = VeraCase(M=300, r=100, dtype=torch.float16, base=False)
    tensors = case.tensors()
    tensors["lambda_b"] = (tensors["lambda_b"].detach() * lambdas).requires_grad_()
    tensors["x"] = (tensors["x"].detach() / (lambdas**0.5)).requires_grad_()
    assert_exact(case, tensors)


def test_the_frozen_terms_are_made_once_and_again_when_the_projection_changes():
    case = VeraCase(M=70, dtype=torch.bfloat16)
    tensors = case.tensors()
    A, made = tensors["A"], []
    terms = triton_vera.frozen_terms(A, torch.bfloat16)
    high, low, again = terms.float().chunk(3)
    assert relative_error(high + low, A) < 2**-16
    assert torch.equal(high, again)
    with mock.patch.object(torch, "cat", lambda t: made.append(t) or torch.concat(t)):
        case.run(ops.vera_linear, tensors, backend="triton")
        other = tensors | {"lambda_b": torch.ones_like(tensors["lambda_b"]).requires_grad_()}
        case.run(ops.vera_linear, other, backend="triton")
        assert made == []
        # To no more bits than are kept: the second half of A's bits is gone.
        with torch.no_grad():
            A.mul_(2)
        y = case.run(ops.vera_linear, tensors, backend="triton")["y"]
        assert len(made) == 1
    assert torch.equal(y, case.run(ops.vera_linear, tensors | {"A": A.clone()}, backend="triton")["y"])
    alive = weakref.ref(triton_vera.frozen_terms(A, torch.bfloat16))
    del A, tensors, other
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_exports_with_any_number_of_tokens(dtype):
    case = VeraCase(M=70, K=32, N=24, r=3, base=False, dtype=dtype)

    class Adapted(torch.nn.Module):
        def forward(self, x, *rest):
            return ops.vera_linear(x, None, *rest, backend="triton")

    x, _, *rest = (t if t is None else t.detach() for t in arguments(case.tensors()))
    sizes = ({0: torch.export.Dim("tokens")}, tuple(None for _ in rest))
    exported = torch.export.export(Adapted(), (x, *rest), dynamic_shapes=sizes).module()
    for M in (70, 7, 130):
        x = torch.randn(M, 32, device=DEVICE).to(dtype)
        torch.testing.assert_close(exported(x, *rest), ops.vera_linear(x, None, *rest, backend="triton"))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_as_one_graph(backend, dropout_p):
    torch._dynamo.reset()

    def function(*args):
        return ops.vera_linear(*args, dropout_p=dropout_p, training=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True)
    for M in (3, 70, 80):
        case = VeraCase(M=M, dtype=torch.bfloat16)
        tensors = case.tensors()
        if dropout_p:
            y = compiled(*arguments(tensors))
            assert not torch.equal(y, compiled(*arguments(tensors)))
        else:
            expected = case.run(function, tensors)
            for name, value in case.run(compiled, tensors).items():
                torch.testing.assert_close(value, expected[name], msg=name)


def test_deterministic_mode_and_repeats_are_bitwise_equal(monkeypatch):
    # What cuBLAS is asked for there.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Several blocks, and partials, in every sum.
    case = VeraCase(M=140, K=600, N=520, r=70, dtype=torch.bfloat16)
    tensors = case.tensors()
    torch.use_deterministic_algorithms(True)
    try:
        first = case.run(ops.vera_linear, tensors, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for _ in range(5 if DEVICE == "cpu" else 100):
        again = case.run(ops.vera_linear, tensors, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_rounds_neither_parameters_nor_the_projected_input(backend):
    tensors = VeraCase(M=20).tensors()
    x, _, *rest = (t.detach() for t in arguments(tensors))
    truth = reference.vera_linear(x.double(), None, *(t.double() for t in rest))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert relative_error(ops.vera_linear(x, None, *rest, backend=backend), truth) < 1e-5
