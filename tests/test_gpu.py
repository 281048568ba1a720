"""On a GPU, natively and at full size: the same tolerance, determinism, and tensors past 2^31 elements."""

import fcntl
import gc
import os

import pytest
import torch

from tests.models import adapted_linear
from tests.ops.linear_case import LinearCase, in_float64
from tests.ops.vera_case import VeraCase
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops
from vblora_triton.ops import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Q, GATE, DOWN = {"K": 4096, "N": 4096}, {"K": 4096, "N": 11008}, {"K": 11008, "N": 4096}
GQA_K = {"K": 8192, "N": 1024}
FULL = [
    LinearCase(M=M, **shape, h=h, b=256, dtype=dtype)
    for shape, M, h in ((Q, 4096, 256), (Q, 1, 256), (GATE, 300, 2048), (DOWN, 16, 2048), (GQA_K, 16384, 2048))
    for dtype in DTYPES
]
FULL += [
    LinearCase(M=4000, **Q, r=r, h=256, b=64, k=k, dtype=torch.bfloat16) for r, k in ((1, 1), (8, 3), (16, 4), (64, 32))
]
# The update alone: beside a base product that is much larger a wrong one would hide below its rounding.
FULL += [
    LinearCase(M=M, **shape, h=h, b=256, dtype=dtype, base=False)
    for shape, M, h in ((Q, 4096, 256), (GATE, 300, 2048), (DOWN, 16, 2048))
    for dtype in DTYPES[:2]
]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_linear_and_each_gradient_are_as_exact_as_eager_at_full_size(case):
    tensors = case.tensors()
    truth = case.run(reference.vblora_linear, in_float64(tensors))
    eager = case.run(reference.vblora_linear, tensors)
    for name, value in case.run(ops.vblora_linear, tensors, backend="triton").items():
        assert_as_exact_as_eager(value, eager[name], truth[name], case.dtype, name)


VERA = [
    VeraCase(M=M, **shape, r=r, dtype=dtype)
    for shape, M, r in ((Q, 4096, 256), (Q, 1, 256), (GATE, 300, 1024), (DOWN, 16, 256), (GQA_K, 16384, 256))
    for dtype in DTYPES
]
VERA += [VeraCase(M=4000, **Q, r=r, dtype=torch.bfloat16) for r in (4, 16, 100)]
VERA += [VeraCase(M=M, **Q, r=256, dtype=torch.bfloat16, base=False) for M in (16, 300, 4096)]
# Under autocast.
VERA += [VeraCase(M=4000, **Q, r=256, dtype=torch.float32, base_dtype=torch.bfloat16)]


@pytest.mark.parametrize("case", VERA, ids=str)
def test_vera_and_each_gradient_are_as_exact_as_eager_at_full_size(case):
    tensors = case.tensors()
    truth = case.run(reference.vera_linear, in_float64(tensors))
    eager = case.run(reference.vera_linear, tensors)
    for name, value in case.run(ops.vera_linear, tensors, backend="triton").items():
        assert_as_exact_as_eager(value, eager[name], truth[name], case.base_dtype or case.dtype, name)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fp32_follows_the_matmul_precision(precision):
    case = LinearCase(M=1000, **Q, h=256, b=256)
    tensors = case.tensors()
    truth = case.run(reference.vblora_linear, in_float64(tensors))
    torch.set_float32_matmul_precision(precision)
    try:
        eager = case.run(reference.vblora_linear, tensors)
        triton = case.run(ops.vblora_linear, tensors, backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, value in triton.items():
        assert_as_exact_as_eager(value, eager[name], truth[name], case.dtype, name)


@pytest.mark.parametrize(
    "case", [LinearCase(M=4096, **GATE, h=256, b=256, dtype=dtype) for dtype in DTYPES[:2]], ids=str
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_20_runs_are_bitwise_equal_at_full_size(case, dropout_p):
    tensors = case.tensors()
    options = {"dropout_p": dropout_p, "training": True, "backend": "triton"}

    def run():
        torch.manual_seed(0)
        return case.run(ops.vblora_linear, tensors, **options)

    first = run()
    for _ in range(19):
        assert all(torch.equal(value, first[name]) for name, value in run().items())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("M", [256, 4096])
def test_20_runs_of_vera_with_cublas_products_are_bitwise_equal_at_full_size(M, dtype):
    case = VeraCase(M=M, **GATE, r=256, dtype=dtype)
    tensors = case.tensors()
    first = case.run(ops.vera_linear, tensors, backend="triton")
    for _ in range(19):
        again = case.run(ops.vera_linear, tensors, backend="triton")
        assert all(torch.equal(value, first[name]) for name, value in again.items())


@pytest.fixture
def whole_gpu(tmp_path_factory):
    """The GPU's memory for one test of all processes, and given back after it: two such tests have no room."""
    folder = tmp_path_factory.getbasetemp()
    # That of one of pytest-xdist's processes lies in that of all.
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with open(folder / "whole_gpu", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("whole_gpu")
def test_an_activation_of_more_than_2_to_the_31_elements_is_right_to_its_last_row():
    rows, N = 2**19 + 300, 4096 + 256
    case = LinearCase(M=4, K=256, N=N, h=64, b=256, dtype=torch.bfloat16)
    parameters = {k: v for k, v in case.tensors().items() if k in ("logits_A", "logits_B", "vector_bank")}
    x = torch.randn(rows, case.K, device="cuda", dtype=torch.bfloat16).requires_grad_()
    base = torch.randn(rows, N, device="cuda", dtype=torch.bfloat16)
    assert base.numel() > 2**31
    y = ops.vblora_linear(x, base, *parameters.values(), case.k, backend="triton")
    y.backward(base)
    last = slice(rows - 70, rows)
    part = x.detach()[last].double().requires_grad_()
    wide = [p.detach().double() for p in parameters.values()]
    truth = reference.vblora_linear(part, base[last].double(), *wide, case.k)
    (dx,) = torch.autograd.grad(truth, part, base[last].double())
    for value, expected, what in ((y[last], truth, "y"), (x.grad[last], dx, "x")):
        assert_as_exact_as_eager(value, expected.to(value.dtype), expected, torch.bfloat16, what)


@pytest.mark.usefixtures("whole_gpu")
def test_vera_is_right_to_the_last_row_of_more_than_2_to_the_31_elements():
    rows, N = 2**19 + 300, 4096 + 256
    case = VeraCase(M=4, K=64, N=N, r=16, dtype=torch.bfloat16)
    frozen = {name: t for name, t in case.tensors().items() if name in ("lambda_b", "lambda_d", "A", "B")}
    x = torch.randn(rows, case.K, device="cuda", dtype=torch.bfloat16).requires_grad_()
    base = torch.randn(rows, N, device="cuda", dtype=torch.bfloat16)
    y = ops.vera_linear(x, base, *frozen.values(), backend="triton")
    y.backward(base)
    last = slice(rows - 70, rows)
    part = x.detach()[last].double().requires_grad_()
    truth = reference.vera_linear(part, base[last].double(), *(t.detach().double() for t in frozen.values()))
    (dx,) = torch.autograd.grad(truth, part, base[last].double())
    for value, expected, what in ((y[last], truth, "y"), (x.grad[last], dx, "x")):
        assert_as_exact_as_eager(value, expected.to(value.dtype), expected, torch.bfloat16, what)


def assert_right_in_the_last_rows(x, dy, parameters, topk):
    """y and dx of the last 70 rows, of as many as there are, against the reference in float64."""
    y = ops.vblora_linear(x, None, *parameters, topk, backend="triton")
    y.backward(dy)
    last = slice(len(x) - 70, len(x))
    part = x.detach()[last].double().requires_grad_()
    truth = reference.vblora_linear(part, None, *(p.detach().double() for p in parameters), topk)
    (dx,) = torch.autograd.grad(truth, part, dy[last].double())
    for value, expected, what in ((y[last], truth, "y"), (x.grad[last], dx, "x")):
        assert_as_exact_as_eager(value, expected.to(value.dtype), expected, torch.bfloat16, what)


@pytest.mark.usefixtures("whole_gpu")
def test_an_input_stored_by_columns_of_more_than_2_to_the_31_elements_is_right():
    M, K, N = 2**20 + 300, 2048 + 256, 256
    case = LinearCase(M=4, K=K, N=N, h=64, b=256, dtype=torch.bfloat16)
    parameters = [case.tensors()[name] for name in ("logits_A", "logits_B", "vector_bank")]
    x = torch.randn(K, M, device="cuda", dtype=torch.bfloat16).T.requires_grad_()
    assert x.numel() > 2**31
    assert x.stride() == (1, M)
    assert_right_in_the_last_rows(x, torch.randn(M, N, device="cuda", dtype=torch.bfloat16), parameters, case.k)


@pytest.mark.usefixtures("whole_gpu")
def test_a_projected_input_of_more_than_2_to_the_31_elements_is_right_to_its_last_row():
    M, r = 2**25 + 300, 64
    case = LinearCase(M=4, K=64, N=64, r=r, h=64, b=64, dtype=torch.bfloat16)
    parameters = [case.tensors()[name] for name in ("logits_A", "logits_B", "vector_bank")]
    assert M * r > 2**31
    x = torch.randn(M, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert_right_in_the_last_rows(x, torch.randn(M, 64, device="cuda", dtype=torch.bfloat16), parameters, case.k)


def changed_logits(layer):
    logits = layer.vblora_logits_A["default"]
    logits.copy_(logits.flip(-1))


def without_memory(layer, x):
    """What a frozen layer gives, by an op that remembers nothing."""
    logits = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
    bank, topk = layer.vblora_vector_bank["default"], layer.topk["default"]
    return ops.vblora_linear(x, layer.base_layer(x), *logits, bank, topk, backend="triton")


@torch.no_grad()
@pytest.mark.parametrize("M", [1, 16, 20])
def test_a_frozen_layer_that_was_called_before_may_be_captured_and_selects_in_each_replay(M):
    layer, x = adapted_linear().eval().requires_grad_(False), torch.randn(M, 32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(y, without_memory(layer, x), rtol=1e-4, atol=1e-5)
        changed_logits(layer)


@torch.no_grad()
def test_another_stream_does_not_read_a_selection_whose_kernel_has_not_run():
    layer, x = adapted_linear().eval().requires_grad_(False), torch.randn(20, 32, device="cuda")
    # Everything is compiled, and there is memory to write a selection to.
    expected = [layer(x)]
    changed_logits(layer)
    expected.append(without_memory(layer, x))
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        # A tenth of a second or so.
        torch.cuda._sleep(2 * 10**8)
        layer(x)
    with torch.cuda.stream(second):
        y = layer(x)
    second.synchronize()
    torch.testing.assert_close(y, expected[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*expected)
    torch.cuda.synchronize()


def test_forward_and_backward_never_wait_for_the_gpu():
    options = {"backend": "triton", "dropout_p": 0.1, "training": True}
    for case, function in (
        (LinearCase(M=300, **Q, h=256, b=256, dtype=torch.bfloat16), ops.vblora_linear),
        (VeraCase(M=300, **Q, r=256, dtype=torch.bfloat16), ops.vera_linear),
    ):
        tensors = case.tensors()
        case.run(function, tensors, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.run(function, tensors, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
