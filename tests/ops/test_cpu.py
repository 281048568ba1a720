"""What `backend="auto"` runs on a CPU: the reference's numbers, less of it kept, and no use where it cannot go."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops.linear_case import NAMES, LinearCase, in_float64
from tests.ops.vera_case import VeraCase, arguments
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops
from vblora_triton.ops import cpu, reference

CASES = {
    "vblora": [
        LinearCase(device="cpu", **sizes)
        for sizes in (
            {},
            {"M": 0},
            {"base": False, "layout": "transposed"},
            {"batch": (2, 3, 5), "layout": "gaps"},
            {"batch": ()},
            {"k": 60},
            {"dtype": torch.bfloat16},
            {"dtype": torch.float16, "parameter_dtype": torch.float16},
            {"dtype": torch.float64, "parameter_dtype": torch.float64},
        )
    ],
    "vera": [
        VeraCase(device="cpu", **sizes)
        for sizes in (
            {},
            {"M": 0},
            {"base": False, "layout": "transposed"},
            {"batch": (2, 3, 5), "layout": "gaps"},
            {"batch": ()},
            {"r": 48},
            {"r": 48, "dtype": torch.bfloat16},
            {"dtype": torch.bfloat16},
            {"base_dtype": torch.bfloat16},
            {"dtype": torch.float16, "parameter_dtype": torch.float16},
            {"dtype": torch.float64, "parameter_dtype": torch.float64},
        )
    ],
}
ALL = [
    pytest.param(f"{method}_linear", case, id=f"{method}-{case}") for method, cases in CASES.items() for case in cases
]


@pytest.mark.parametrize(("function", "case"), ALL)
def test_output_and_each_gradient_are_as_exact_as_the_reference(function, case):
    tensors = case.tensors()
    truth = case.run(getattr(reference, function), in_float64(tensors))
    expected = case.run(getattr(reference, function), tensors)
    floor = torch.float32 if case.dtype == torch.float64 else getattr(case, "base_dtype", None) or case.dtype
    result = case.run(getattr(ops, function), tensors)
    for name in truth:
        assert_as_exact_as_eager(result[name], expected[name], truth[name], floor, name)


@pytest.mark.parametrize("case", CASES["vblora"], ids=str)
def test_vblora_without_gradients_is_as_exact(case):
    tensors = case.tensors()
    inputs = [tensors.get(name) for name in NAMES]
    wide = in_float64(tensors)
    truth = reference.vblora_linear(*(wide.get(name) for name in NAMES), case.k)
    expected = reference.vblora_linear(*inputs, case.k)
    floor = torch.float32 if case.dtype == torch.float64 else case.dtype
    with torch.no_grad():
        result = ops.vblora_linear(*inputs, case.k)
    assert_as_exact_as_eager(result, expected, truth, floor, "y")


@pytest.mark.parametrize("special", [float("nan"), float("-inf"), 1.0], ids=str)
def test_vblora_with_ties_and_special_values_is_the_reference(special):
    case = LinearCase(M=9, device="cpu")
    tensors = case.tensors()
    with torch.no_grad():
        for name in ("logits_A", "logits_B"):
            tensors[name][..., ::2] = special
    expected = case.run(reference.vblora_linear, tensors)
    for name, value in case.run(ops.vblora_linear, tensors).items():
        torch.testing.assert_close(value, expected[name], equal_nan=True, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recorded", ["nothing", "all but lambda_b"])
def test_vera_keeps_its_projection_alone_and_is_as_exact_without_some_gradients(recorded, dtype):
    widest = max(torch.float32, dtype, key=lambda d: d.itemsize)
    case = VeraCase(M=64, K=256, N=512, r=32, device="cpu", dtype=dtype, parameter_dtype=widest)
    tensors = case.tensors()
    wide = in_float64(tensors)
    names = ("x", "base", "lambda_d")

    def results(function, tensors):
        tensors["lambda_b"].requires_grad_(False)
        with torch.set_grad_enabled(recorded != "nothing"):
            y = function(*arguments(tensors))
            grads = torch.autograd.grad(y, [tensors[n] for n in names], tensors["dy"]) if y.requires_grad else ()
        return [y, *grads]

    truth, plain = results(reference.vera_linear, wide), results(reference.vera_linear, tensors)
    floor = torch.float32 if dtype == torch.float64 else dtype
    for value, eagerly, exact in zip(results(ops.vera_linear, tensors), plain, truth, strict=True):
        assert_as_exact_as_eager(value, eagerly, exact, floor, recorded)
    with torch.set_grad_enabled(recorded != "nothing"):
        kept = saved_bytes(lambda: ops.vera_linear(*arguments(tensors)), list(tensors.values()))
    assert kept == (0 if recorded == "nothing" else case.M * case.r * widest.itemsize)


@pytest.mark.parametrize("method", CASES)
def test_gradients_may_be_asked_for_in_batches(method):
    case, function = CASES[method][0], f"{method}_linear"
    results = []
    for module in (ops, reference):
        tensors = case.tensors()
        inputs = arguments(tensors) if method == "vera" else [*(tensors[n] for n in NAMES), case.k]
        y = getattr(module, function)(*inputs)
        wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        dys = torch.stack([tensors["dy"], tensors["dy"].flip(0), tensors["dy"] * 0])
        results.append(torch.autograd.grad(y, wanted, dys, is_grads_batched=True))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", CASES)
def test_a_backward_under_autocast_is_as_exact(method):
    case, function = CASES[method][0], getattr(ops, f"{method}_linear")
    grads = []
    for enabled in (False, True):
        tensors = case.tensors()
        inputs = arguments(tensors) if method == "vera" else [*(tensors[n] for n in NAMES), case.k]
        wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        y = function(*inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, wanted, tensors["dy"]))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("method", CASES)
def test_the_update_alone_may_be_written_to(method):
    case, function = CASES[method][0], getattr(ops, f"{method}_linear")
    tensors = case.tensors()
    tensors["base"] = None
    inputs = arguments(tensors) if method == "vera" else [*(tensors[n] for n in NAMES), case.k]
    y = function(*inputs)
    assert torch.equal(y.detach() + 1, torch.add(y, 0).add_(1))
    assert torch.equal(y.detach() + 1, y.add_(1))


def test_vblora_without_features_out_has_gradients_of_zero():
    x = torch.randn(6, 16, requires_grad=True)
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((2, 2, 5), (0, 2, 5), (5, 8))]
    y = ops.vblora_linear(x, None, *parameters, 2)
    assert y.shape == (6, 0)
    for tensor, grad in zip((x, *parameters), torch.autograd.grad(y.sum(), (x, *parameters)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("only", ["logits_A", "logits_B", "vector_bank"])
def test_a_second_derivative_in_one_parameter_alone_is_refused(only, backend):
    tensors = {name: t.detach() for name, t in LinearCase(M=3, K=16, N=8, b=8, h=5, device="cpu").tensors().items()}
    tensors[only].requires_grad_()
    y = ops.vblora_linear(*(tensors[name] for name in NAMES), 2, backend=backend)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(y.sum(), tensors[only], create_graph=True)


@pytest.mark.parametrize("method", CASES)
def test_a_second_derivative_in_x_alone_is_zero(method):
    case, function = CASES[method][0], getattr(ops, f"{method}_linear")
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    tensors["x"].requires_grad_()
    inputs = arguments(tensors) if method == "vera" else [*(tensors[n] for n in NAMES), case.k]
    (dx,) = torch.autograd.grad(function(*inputs).sum(), tensors["x"], create_graph=True)
    assert not dx.requires_grad


@pytest.mark.parametrize("method", CASES)
def test_who_traces_or_fakes_is_given_the_reference(method):
    case, function = CASES[method][0], getattr(ops, f"{method}_linear")
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    names = [name for name in tensors if name != "dy"]

    def call(*values):
        given = dict(zip(names, values, strict=True))
        return function(*(arguments(given) if method == "vera" else [*values, case.k]))

    values = [tensors[name] for name in names]
    expected = call(*values)
    torch.testing.assert_close(make_fx(call)(*values)(*values), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(*(mode.from_tensor(value) for value in values)).shape == expected.shape


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_one_gradient_alone_is_that_of_all_together(method, needed):
    case, function = CASES[method][0], getattr(ops, f"{method}_linear")
    tensors = case.tensors()
    everything = case.run(function, tensors)
    names = [name for name in everything if name != "y"]
    for i, name in enumerate(names):
        tensors[name].requires_grad_(i == needed)
    inputs = arguments(tensors) if method == "vera" else [*(tensors[name] for name in names), case.k]
    (grad,) = torch.autograd.grad(function(*inputs), tensors[names[needed]], tensors["dy"])
    torch.testing.assert_close(grad, everything[names[needed]])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf"), 0.0], ids=str)
def test_selection_is_the_references_at_ties_and_special_values(special):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 9, generator=generator)
    logits[::3, ::2] = special
    logits[1::5] = special
    for rows in (logits, logits[2::15], logits.bfloat16()):
        for k in (1, 2, 9):
            expected = reference.select(rows, k)
            for mine, theirs in zip(cpu.select(rows, k), expected, strict=True):
                assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))


def saved_bytes(function, given):
    """Bytes kept for backward that are neither an input nor a view of one."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in given}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    del y
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_vblora_keeps_s_its_selection_and_its_matrices_and_vera_its_projection():
    case = LinearCase(M=64, K=256, N=512, r=4, h=60, b=64, k=2, device="cpu")
    tensors = [t for name, t in case.tensors().items() if name != "dy"]
    rows = 4 * (256 + 512) // 64
    kept = saved_bytes(lambda: ops.vblora_linear(*tensors, case.k), tensors)
    assert kept == case.M * case.r * 4 + rows * case.k * (8 + 4) + case.r * (case.K + case.N) * 4
    case = VeraCase(M=64, K=256, N=512, r=32, device="cpu")
    tensors = case.tensors()
    kept = saved_bytes(lambda: ops.vera_linear(*arguments(tensors)), list(tensors.values()))
    assert kept == case.M * case.r * 4


def test_vera_of_a_narrow_layer_keeps_what_pefts_does_and_no_more():
    case = VeraCase(M=64, K=256, N=128, r=32, device="cpu")
    tensors = case.tensors()
    kept = saved_bytes(lambda: ops.vera_linear(*arguments(tensors)), list(tensors.values()))
    assert kept == case.M * (case.r + case.N) * 4
    tensors["lambda_b"].requires_grad_(False)
    kept = saved_bytes(lambda: ops.vera_linear(*arguments(tensors)), list(tensors.values()))
    assert kept == case.M * case.r * 4


@pytest.mark.parametrize("method", CASES)
def test_a_second_derivative_is_refused_and_the_reference_has_one(method):
    case, function = CASES[method][0], getattr(ops, f"{method}_linear")
    tensors = in_float64(case.tensors())
    inputs = arguments(tensors) if method == "vera" else [*(t for n, t in tensors.items() if n != "dy"), case.k]
    (grad,) = torch.autograd.grad(function(*inputs, backend="reference").square().sum(), inputs[0], create_graph=True)
    grad.sum().backward()
    assert inputs[0].grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*backend='reference'"):
        torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize("method", CASES)
def test_transforms_and_forward_derivatives_get_the_reference(method):
    case, function = CASES[method][0], getattr(ops, f"{method}_linear")
    tensors = in_float64(case.tensors())
    x, *rest = arguments(tensors) if method == "vera" else [*(t for n, t in tensors.items() if n != "dy"), case.k]
    (grad,) = torch.autograd.grad(function(x, *rest).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: function(x, *rest).sum())(x.detach()), grad)
    _, tangent = torch.func.jvp(lambda x: function(x, *rest).sum(), (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, grad.sum())


@pytest.mark.parametrize("method", CASES)
def test_gradients_of_an_input_that_several_layers_read_are_added_in_place(method):
    from torch.profiler import ProfilerActivity, profile

    sizes = {"batch": (2, 35), "K": 48, "N": 48}
    case = VeraCase(**sizes) if method == "vera" else LinearCase(**sizes)
    tensors = case.tensors()
    x, *rest = arguments(tensors) if method == "vera" else [*(t for n, t in tensors.items() if n != "dy"), case.k]
    rest[0] = rest[0].detach()
    y = sum(getattr(ops, f"{method}_linear")(x, *rest) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        y.backward(tensors["dy"])
    sums = [e.name for e in profiled.events() if e.name.startswith("aten::add") and list(x.shape) in e.input_shapes]
    assert sums == ["aten::add_"] * 2


def fresh(method):
    """Tensors of a case whose sizes are all different, and the op."""
    case = VeraCase(M=5, K=6, N=7, r=3, device="cpu") if method == "vera" else LinearCase(M=5, K=6, N=9, b=3, h=5)
    tensors = case.tensors()
    x, base, *rest = arguments(tensors) if method == "vera" else [*(t for n, t in tensors.items() if n != "dy"), case.k]
    return x, base, rest, getattr(ops, f"{method}_linear")


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_no_input_features_leave_base_as_it_is(backend):
    x, base = torch.randn(3, 0), torch.randn(3, 4)
    y = ops.vera_linear(x, base, torch.randn(4), torch.randn(2), torch.randn(2, 0), torch.randn(4, 2), backend=backend)
    assert torch.equal(y, base)
    y = ops.vblora_linear(x, base, torch.randn(2, 0, 3), torch.randn(2, 2, 3), torch.randn(3, 2), 2, backend=backend)
    assert torch.equal(y, base)


@pytest.mark.parametrize("method", CASES)
def test_shapes_can_be_had_on_the_meta_device(method):
    x, base, rest, op = fresh(method)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in (x, base, *rest)]
    assert op(*meta).shape == base.shape
