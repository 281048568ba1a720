"""vblora_triton.ops: the kernels and the reference against float64, operator registration, and the checks."""

import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import vblora_triton
from tests.models import DEVICE
from tests.ops.linear_case import LinearCase, in_float64
from tests.ops.vera_case import VeraCase
from tests.tolerance import assert_as_exact_as_eager, relative_error
from vblora_triton import ops
from vblora_triton.kernels.launch import counted
from vblora_triton.ops import dispatch, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every value of M 0, 1, 17, 130; r 1, 4, 5; h 3, 60, 256, 300; b 8, 48, 256; k 1, 2, 3, h; ranks of x from 1 to 4;
# each layout; with and without base. The interpreter is slow: no more products of them than needed.
CASES = [
    {"M": 0, "K": 96, "N": 144, "r": 4, "h": 60, "b": 48, "k": 2},
    {"M": 1, "K": 16, "N": 24, "r": 1, "h": 3, "b": 8, "k": 3, "base": False},
    {"M": 17, "K": 96, "N": 144, "r": 4, "h": 60, "b": 48, "k": 2},
    {"M": 17, "K": 96, "N": 144, "r": 4, "h": 60, "b": 48, "k": 2, "layout": "transposed"},
    {"M": 17, "K": 40, "N": 8, "r": 5, "h": 300, "b": 8, "k": 2, "base": False, "layout": "gaps"},
    {"M": 130, "K": 256, "N": 512, "r": 4, "h": 256, "b": 256, "k": 3},
    {"M": 130, "K": 144, "N": 96, "r": 5, "h": 256, "b": 48, "k": 1, "base": False},
    {"M": 2, "K": 48, "N": 48, "r": 5, "h": 60, "b": 48, "k": 60},
    {"batch": (), "K": 96, "N": 48, "r": 4, "h": 60, "b": 48, "k": 2},
    {"batch": (3, 5), "K": 48, "N": 96, "r": 4, "h": 3, "b": 48, "k": 2, "layout": "transposed"},
    {"batch": (2, 3, 5), "K": 256, "N": 256, "r": 1, "h": 256, "b": 256, "k": 2, "layout": "gaps"},
    {"batch": (2, 0, 5), "K": 16, "N": 8, "r": 4, "h": 60, "b": 8, "k": 1, "base": False},
]


def cases(*dicts: dict, dtypes=DTYPES, **more):
    return [pytest.param(case := LinearCase(dtype=d, **c, **more), id=str(case)) for c in dicts for d in dtypes]


# As many as there are vectors; the interpreter takes a step for each, in every tile.
ALL_OF_300 = {"M": 3, "K": 8, "N": 8, "r": 1, "h": 300, "b": 8, "k": 300}


# So few rows of so many columns that several programs share the sums over them, in x and in dy; r beyond 1.
SHARED_SUMS = [
    {"M": 20, "K": 1632, "N": 96, "r": 3, "h": 5, "b": 48, "k": 2},
    {"M": 20, "K": 96, "N": 1632, "r": 7, "h": 5, "b": 48, "k": 2, "base": False},
    {"M": 3, "K": 1632, "N": 96, "r": 3, "h": 5, "b": 48, "k": 2},
]


@pytest.mark.parametrize(
    "case", cases(*CASES) + cases(*SHARED_SUMS, dtypes=DTYPES[:2]) + cases(ALL_OF_300, dtypes=DTYPES[:1])
)
def test_triton_linear_and_each_gradient_are_as_exact_as_eager(case):
    tensors = case.tensors()
    truth = case.run(reference.vblora_linear, in_float64(tensors))
    eager = case.run(reference.vblora_linear, tensors)
    triton = case.run(ops.vblora_linear, tensors, backend="triton")
    assert triton.keys() == truth.keys()
    for name in truth:
        assert_as_exact_as_eager(triton[name], eager[name], truth[name], case.dtype, name)


@pytest.mark.parametrize("case", cases(CASES[2], dtypes=DTYPES[1:], parameter_dtype=torch.bfloat16))
def test_triton_linear_takes_16_bit_parameters(case):
    tensors = case.tensors()
    truth = case.run(reference.vblora_linear, in_float64(tensors))
    eager = case.run(reference.vblora_linear, tensors)
    for name, value in case.run(ops.vblora_linear, tensors, backend="triton").items():
        assert_as_exact_as_eager(value, eager[name], truth[name], torch.bfloat16, name)


@pytest.mark.parametrize("needed", [c for n in range(1, 5) for c in itertools.combinations(range(5), n)], ids=str)
def test_gradients_of_any_of_the_inputs_are_those_of_all_together(needed):
    case = LinearCase(M=5, K=16, N=24, b=8, h=5)
    everything = case.run(ops.vblora_linear, case.tensors(), backend="triton")
    tensors = case.tensors()
    inputs = {name: t for name, t in tensors.items() if name != "dy"}
    for i, t in enumerate(inputs.values()):
        t.requires_grad_(i in needed)
    y = ops.vblora_linear(*inputs.values(), case.k, backend="triton")
    wanted = [name for i, name in enumerate(inputs) if i in needed]
    grads = torch.autograd.grad(y, [inputs[name] for name in wanted], tensors["dy"])
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[name]), name


@pytest.mark.parametrize("r", [4, 16])
@pytest.mark.parametrize("M", [9, 40])
def test_update_alone_is_exact_to_1e_5(r, M):
    # Kept in float32, as an update in bf16 would be rounded to 8 bits whatever computed it.
    case = LinearCase(M=M, K=192, N=144, r=r, dtype=torch.bfloat16, seed=r)
    tensors = case.tensors()
    tensors["base"] = torch.zeros_like(tensors["base"], dtype=torch.float32)
    x, base, *parameters, _ = tensors.values()
    truth = reference.vblora_linear(x.double(), None, *(t.double() for t in parameters), case.k)
    assert relative_error(ops.vblora_linear(x, base, *parameters, case.k, backend="triton"), truth) < 1e-5


def test_largest_sizes_of_the_documented_limits():
    for sizes in (
        {"M": 3, "K": 16, "N": 8, "r": 64, "h": 9, "b": 8, "k": 2},
        {"M": 3, "K": 2048, "N": 2048, "r": 1, "h": 3, "b": 2048, "k": 2},
        {"M": 3, "K": 8, "N": 8, "r": 1, "h": 65536, "b": 8, "k": 3},
        {"M": 20, "K": 8, "N": 8, "r": 2, "h": 70, "b": 8, "k": 32},
        {"M": 20, "K": 7, "N": 5, "r": 3, "h": 9, "b": 1, "k": 2},
    ):
        case = LinearCase(dtype=torch.bfloat16, **sizes)
        tensors = case.tensors()
        truth = case.run(reference.vblora_linear, in_float64(tensors))
        eager = case.run(reference.vblora_linear, tensors)
        for name, value in case.run(ops.vblora_linear, tensors, backend="triton").items():
            assert_as_exact_as_eager(value, eager[name], truth[name], case.dtype, f"{case} {name}")


def test_no_gradient_is_recorded_without_need():
    case = LinearCase()
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    del tensors["dy"]
    assert ops.vblora_linear(*tensors.values(), case.k, backend="triton").grad_fn is None
    with torch.no_grad():
        tensors["x"].requires_grad_()
        assert ops.vblora_linear(*tensors.values(), case.k, backend="triton").grad_fn is None
    with torch.inference_mode():
        ops.vblora_linear(*tensors.values(), case.k, backend="triton")


def test_base_is_not_written_to():
    case = LinearCase()
    tensors = case.tensors()
    before = tensors["base"].detach().clone()
    case.run(ops.vblora_linear, tensors, backend="triton")
    assert torch.equal(tensors["base"], before)


def test_result_has_the_dtype_of_base():
    case = LinearCase()
    tensors = case.tensors()
    del tensors["dy"]
    tensors["base"] = tensors["base"].detach().bfloat16()
    for backend in ("triton", "reference"):
        assert ops.vblora_linear(*tensors.values(), case.k, backend=backend).dtype == torch.bfloat16
        with torch.autocast(DEVICE, torch.bfloat16):
            x, _, *rest = tensors.values()
            assert ops.vblora_linear(x, None, *rest, case.k, backend=backend).dtype == x.dtype


def test_gradient_of_logits_is_zero_off_topk():
    case = LinearCase(h=60, k=2)
    tensors = case.tensors()
    grads = case.run(ops.vblora_linear, tensors, backend="triton")
    for name in ("logits_A", "logits_B"):
        chosen = torch.zeros_like(grads[name], dtype=torch.bool)
        chosen.scatter_(-1, tensors[name].topk(case.k).indices, True)
        assert (grads[name][~chosen] == 0).all()
        assert (grads[name][chosen] != 0).all()


@pytest.mark.parametrize("special", [0.0, float("inf"), float("-inf")], ids=str)
def test_ties_go_to_the_lowest_index(special):
    logits = torch.tensor([special, 1.0, 1.0, 1.0, special, 0.5], device=DEVICE).repeat(3, 1)
    bank = torch.eye(6, device=DEVICE)
    for backend in ("triton", "reference"):
        out = ops.compose(logits, bank, 3, backend=backend)
        if special == float("inf"):
            assert out.isnan().all()
        else:
            assert torch.equal(out, torch.tensor([0, 1, 1, 1, 0, 0], device=DEVICE).div(3).expand(3, 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "h", "b", "k"), [((7,), 60, 48, 2), ((2, 3), 300, 8, 3), ((0,), 5, 8, 1), ((5, 1), 4, 7, 4)]
)
def test_triton_compose_and_its_gradients_are_as_exact_as_eager(rows, h, b, k, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((*rows, h), generator=generator).to(DEVICE, dtype).requires_grad_()
    bank = torch.randn((h, b), generator=generator).to(DEVICE, dtype).requires_grad_()
    d_out = torch.randn((*rows, b), generator=generator).to(DEVICE, dtype)

    def run(function, logits, bank, d_out, **options):
        out = function(logits, bank, k, **options)
        return (out, *torch.autograd.grad(out, (logits, bank), d_out))

    results = zip(
        run(ops.compose, logits, bank, d_out, backend="triton"),
        run(reference.compose, logits, bank, d_out),
        run(reference.compose, *in_float64({"l": logits, "b": bank, "d": d_out}).values()),
        ("out", "logits", "vector_bank"),
        strict=True,
    )
    for value, plain, truth, what in results:
        assert_as_exact_as_eager(value, plain, truth, dtype, what)


@pytest.mark.parametrize("base", [True, False])
def test_reference_passes_gradcheck(base):
    case = LinearCase(M=3, K=6, N=9, r=2, h=5, b=3, k=2, base=base, device="cpu")
    tensors = in_float64(case.tensors())
    del tensors["dy"]
    inputs = [tensors.get(name) for name in ("x", "base", "logits_A", "logits_B", "vector_bank")]
    assert torch.autograd.gradcheck(lambda *args: reference.vblora_linear(*args, case.k), inputs)
    assert torch.autograd.gradcheck(lambda a, v: reference.compose(a, v, case.k), (inputs[2], inputs[4]))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_linear_operator_passes_opcheck(base, requires_grad, dropout_p):
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    case = LinearCase(M=3, K=16, N=24, b=8, h=5, base=base)
    tensors = case.tensors()
    inputs = [tensors.get(name) for name in ("x", "base", "logits_A", "logits_B", "vector_bank")]
    inputs = [t if t is None or requires_grad else t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.vblora_triton.vblora_linear.default, (*inputs, case.k, dropout_p, seed))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("method", ["vblora", "vera"])
def test_tensors_of_other_classes_and_tracers_before_autograd_see_the_operators(method, requires_grad):
    case = (LinearCase if method == "vblora" else VeraCase)(M=5, K=16, N=24)
    case = LinearCase(M=5, K=16, N=24, b=8, h=5) if method == "vblora" else case
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    rest = [case.k] if method == "vblora" else []
    inputs = [t for name, t in tensors.items() if name != "dy"]
    op = getattr(ops, f"{method}_linear")
    expected = op(*inputs, *rest, backend="triton")
    x = inputs[0].clone().requires_grad_(requires_grad)

    def call(x):
        return op(x, *inputs[1:], *rest, backend="triton")

    y = call(TwoTensor(x, x))
    assert isinstance(y, TwoTensor)
    assert torch.equal(y.a, expected)
    if requires_grad:
        y.sum().backward()
        (dx,) = torch.autograd.grad(call(x).sum(), x)
        grads = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: TwoTensor(t, t) if t.dim() == 2 else t):
            call(x).sum().backward(inputs=[x])
            grads.append(x.grad)
        torch.testing.assert_close(grads[0].a if isinstance(grads[0], TwoTensor) else grads[0], dx)
    else:
        graph = make_fx(call, tracing_mode="real", pre_dispatch=True)(x)
        assert any("vblora_triton" in str(node.target) for node in graph.graph.nodes)
        torch.testing.assert_close(graph(x), expected)


def test_batches_of_gradients_are_refused_by_name():
    case = LinearCase(M=2, K=16, N=8, b=8, h=5)
    tensors = case.tensors()
    dys = torch.stack([tensors.pop("dy")] * 2)
    y = ops.vblora_linear(*tensors.values(), case.k, backend="triton")
    with pytest.raises(NotImplementedError, match=r"vblora_linear takes no batches of gradients.*backend='reference'"):
        torch.autograd.grad(y, tensors["x"], dys, is_grads_batched=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
def test_fake_tensors_of_a_gpu_that_is_not_there_get_the_reference():
    # A build of torch without CUDA cannot make them: this is what is asked about their device.
    assert dispatch._why_no_kernels(torch.device("cuda")) == "there is no GPU"


def test_second_derivative_is_refused():
    case = LinearCase(M=2, K=16, N=8, b=8, h=5)
    tensors = case.tensors()
    dy = tensors.pop("dy").requires_grad_()
    y = ops.vblora_linear(*tensors.values(), case.k, backend="triton")
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*create_graph=True"):
        torch.autograd.grad(y, tensors["x"], dy, create_graph=True)
    out = ops.compose(tensors["logits_A"], tensors["vector_bank"], 2, backend="triton")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(out.sum(), tensors["vector_bank"], create_graph=True)


def test_forward_mode_derivative_is_refused():
    tensors = [t.detach() for t in LinearCase(M=2, K=16, N=8, b=8, h=5).tensors().values()]
    x, base, *parameters, _ = tensors
    with pytest.raises(NotImplementedError, match="vblora_linear has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.vblora_linear(x, base, *parameters, 2, backend="triton"), (x,), (x,))


@pytest.mark.parametrize(("M", "K", "N"), [(3, 0, 16), (3, 16, 0), (0, 16, 8)])
@pytest.mark.parametrize("base", [True, False])
def test_no_features_in_or_out_are_as_in_the_reference(M, K, N, base):
    case = LinearCase(M=M, K=K, N=N, r=2, h=5, b=8, base=base)
    tensors = case.tensors()
    expected = case.run(reference.vblora_linear, tensors)
    for name, value in case.run(ops.vblora_linear, tensors, backend="triton").items():
        assert torch.equal(value, expected[name]), name
    rest = [tensors[name].detach() for name in ("logits_A", "logits_B")]
    selection = ops.select(*rest, 2, backend="triton")
    y = ops.vblora_linear_selected(tensors["x"], tensors.get("base"), *selection, tensors["vector_bank"])
    assert torch.equal(y, expected["y"])


def test_use_backend_sets_what_auto_means_and_what_ran_is_told():
    case = LinearCase(M=2, K=16, N=8, b=8, h=5)
    tensors = list(case.tensors().values())[:-1]

    def ran(*tensors, **options):
        with counted() as launched, ops.backends_that_run() as told:
            y = ops.vblora_linear(*tensors, case.k, **options)
        # By what was launched, and by who made the node of autograd's graph.
        by = "triton" if launched else "cpu" if y.grad_fn.name() == "_VBLoRALinearBackward" else "reference"
        assert told == {by}
        return by

    with vblora_triton.use_backend("triton"):
        assert ran(*tensors) == "triton"
        with vblora_triton.use_backend("reference"):
            assert ran(*tensors) == "reference"
        assert ran(*tensors) == "triton"
        assert ran(*tensors, backend="reference") == "reference"
    on_cpu = [t.cpu() for t in tensors]
    assert ran(*on_cpu) == ran(*on_cpu, backend="cpu") == "cpu"
    assert ran(*on_cpu, dropout_p=0.5, training=True) == "reference"
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: it has no dropout"):
        ran(*on_cpu, dropout_p=0.5, training=True, backend="cpu")


def valid(**changes):
    arguments = {
        name: t.detach() for name, t in LinearCase(M=2, K=16, N=24, b=8, h=5).tensors().items() if name != "dy"
    }
    return arguments | {"topk": 2} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": "text"}, TypeError, "`x` must be a floating tensor, not str"),
        ({"x": torch.ones(2, 16, dtype=torch.int64)}, TypeError, "`x` must be a floating tensor, not torch.int64"),
        (
            {"x": torch.ones(2, 20)},
            ValueError,
            r"`logits_A` has shape \(4, 2, 5\).*`vector_length`, 8, must divide the 20",
        ),
        ({"x": torch.ones(())}, ValueError, "`x` is a scalar"),
        ({"x": torch.ones(2, 16, device="meta")}, ValueError, "is on .* and `x` on meta"),
        ({"base": torch.ones(2, 25)}, ValueError, r"`base` has shape \(2, 25\).*must be \(2, 24\)"),
        ({"logits_B": torch.ones(3, 5, 5)}, ValueError, r"`logits_B` has shape \(3, 5, 5\)"),
        ({"vector_bank": torch.ones(5)}, ValueError, r"`vector_bank` has shape \(5,\)"),
        ({"vector_bank": torch.ones(5, 0)}, ValueError, r"neither 0"),
        ({"topk": 6}, ValueError, "`topk` is 6; it must be from 1 to the 5 vectors"),
        ({"topk": 0}, ValueError, "`topk` is 0"),
        ({"topk": 2.0}, TypeError, "`topk` must be an int, not float"),
        ({"dropout_p": 1.5, "training": True}, ValueError, "`dropout_p` is 1.5"),
        ({"backend": "cuda"}, ValueError, "`backend` is 'cuda'; the backends are 'auto', 'triton', 'cpu', 'reference'"),
        ({"x": torch.ones(2, 16, dtype=torch.float64), "backend": "triton"}, TypeError, "not torch.float64"),
    ],
    ids=lambda value: None if isinstance(value, type) else "",
)
def test_bad_argument_is_named(changes, error, message):
    changes = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in changes.items()
    }
    with pytest.raises(error, match=message):
        ops.vblora_linear(**valid(**changes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"r": 65}, "`r` is 65, and its limit is 64"),
        ({"h": 65537}, "`num_vectors` is 65537, and its limit is 65536"),
        ({"h": 1025, "k": 1025}, "`topk` is 1025, and its limit is 1024"),
        ({"b": 2049, "K": 2049, "N": 2049}, "`vector_length` is 2049, and its limit is 2048"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_size_beyond_the_kernels_limits_is_named_and_auto_takes_pytorch(sizes, message):
    case = LinearCase(**{"M": 2, "K": 8, "N": 8, "r": 2, "h": 5, "b": 8} | sizes)
    tensors = [t.detach() for t in case.tensors().values()][:-1]
    with pytest.raises(ValueError, match=message):
        ops.vblora_linear(*tensors, case.k, backend="triton")
    with ops.backends_that_run() as ran:
        y = ops.vblora_linear(*tensors, case.k)
    assert ran == {"reference" if tensors[0].is_cuda else "cpu"}
    assert relative_error(y, reference.vblora_linear(*(t.double() for t in tensors), case.k)) < 1e-6
