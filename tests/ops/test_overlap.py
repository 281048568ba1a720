"""Of few rows the base's product comes before the update, in fp32, and beside our kernels where a graph is captured."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import DEVICE
from tests.ops.linear_case import LinearCase, in_float64
from tests.ops.test_frozen_linear import METHODS, defined, layer_of, run, widened
from tests.tolerance import relative_error
from vblora_triton import ops
from vblora_triton.kernels.matmul import matmul
from vblora_triton.ops import overlap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_y_and_dx_of_few_rows_are_rounded_once(dtype, bias):
    case = METHODS["vblora"](M=130, K=480, N=384, base=False, dtype=dtype)
    tensors, base = case.tensors(), layer_of(case, bias)
    truth = run(defined("vblora", widened(base)), "vblora", case, in_float64(tensors), None)
    found = run(ops.vblora_linear, "vblora", case, tensors, base, backend="triton")
    for value, exact in zip(found[:2], truth[:2], strict=True):
        assert relative_error(value, exact) <= 1.02 * relative_error(exact.to(dtype), exact)


def test_the_product_comes_first_up_to_512_rows():
    weight = torch.randn(8, 6, device=DEVICE)
    for rows, first in ((0, False), (1, True), (512, True), (513, False)):
        with overlap.product_beside(torch.randn(rows, 8, device=DEVICE), weight) as product:
            assert (product is not None) == first


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize(("K", "N"), [(0, 96), (96, 0)])
def test_layers_without_features_give_their_bias(K, N, batch):
    case = LinearCase(batch=batch, K=K, N=N, base=False)
    tensors, bias = case.tensors(), torch.randn(N, device=DEVICE)
    base = ops.FrozenLinear(torch.empty(N, K, device=DEVICE), bias)
    y, *grads = run(ops.vblora_linear, "vblora", case, tensors, base, backend="triton")
    assert torch.equal(y, bias.expand(*batch, N))
    assert not any(grad.any() for grad in grads)


@pytest.fixture
def sums_in_fp16():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    yield
    matmul.allow_fp16_accumulation = before


@pytest.mark.usefixtures("sums_in_fp16")
@pytest.mark.parametrize(("dtype", "asks"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_cublas_is_not_asked_for_fp32_where_it_may_add_up_in_fp16_which_it_refuses(dtype, asks):
    asked = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "out" in func._schema.overload_name:
                asked.append(func)
                return kwargs["out"]
            return func(*args, **kwargs or {})

    with FakeTensorMode(), Calls():
        assert matmul(*(torch.empty(shape, dtype=dtype, device="cuda") for shape in ((5, 8), (8, 6)))).shape == (5, 6)
    assert asked == [torch.ops.aten.mm.dtype_out if asks else torch.ops.aten.addmm.out]
    with overlap.product_beside(*(torch.randn(n, 8, device=DEVICE, dtype=dtype) for n in (5, 8))) as product:
        assert (product is not None) == asks


def test_the_product_is_added_in_place_to_what_others_found():
    left, right, others = (torch.randn(shape, device=DEVICE).bfloat16() for shape in ((5, 8), (8, 6), (5, 6)))
    expected = others.double() + left.double() @ right.double()
    with overlap.product_beside(left, right, others) as product:
        assert product() is others
    torch.testing.assert_close(others.double(), expected, rtol=2**-7, atol=2**-7)


class Streams:
    """Stands in for torch.cuda: notes who waits for whom, and on which stream work is queued."""

    def __init__(self):
        self.log, self.made = [], 0
        self.current = self.Stream()

    def Stream(self, device=None):
        name = self.made
        self.made += 1
        return SimpleNamespace(
            name=name,
            device_index=0,
            cuda_stream=100 + name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
        )

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def queue(self, what):
        self.log.append(f"{what} on {self.current.name}")


def test_a_captured_product_runs_beside_what_is_launched_before_it_is_asked_for(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(overlap, "torch", SimpleNamespace(cuda=streams))
    monkeypatch.setattr(overlap, "_seconds", {})
    for _ in range(2):
        with overlap._forked(torch.device("cuda"), lambda: streams.queue("product")) as product:
            streams.queue("kernels")
            product()
            streams.queue("update")
    once = ["1 waits for 0", "kernels on 1", "product on 0", "0 waits for 1", "update on 0"]
    # The stream beside another one is always the same: what was freed there is used again after what read it.
    assert streams.log == 2 * once


def test_a_failure_beside_the_product_leaves_the_stream(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(overlap, "torch", SimpleNamespace(cuda=streams))
    first = streams.current
    with pytest.raises(ZeroDivisionError), overlap._forked(torch.device("cuda"), lambda: None):
        raise ZeroDivisionError
    assert streams.current is first


@pytest.mark.parametrize(
    ("device", "capturing", "allocator", "forks"),
    [
        ("cuda:1", True, "native", True),
        ("cuda:1", False, "native", False),
        ("cuda:0", True, "native", False),
        ("cuda:1", True, "cudaMallocAsync", False),
        ("cpu", True, "native", False),
    ],
)
def test_it_forks_in_a_graph_of_the_devices_own_and_in_memory_that_knows_streams(
    monkeypatch, device, capturing, allocator, forks
):
    cuda = SimpleNamespace(
        current_device=lambda: 1,
        is_current_stream_capturing=lambda: capturing,
        get_allocator_backend=lambda: allocator,
    )
    device = torch.device(device)
    monkeypatch.setattr(overlap, "torch", SimpleNamespace(cuda=cuda))
    assert overlap._may_fork(device) == forks


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("M", [1, 16, 130, 512])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_captured_step_gives_the_bits_of_one_that_is_not_captured(M, p):
    case = METHODS["vblora"](M=M, K=480, N=384, base=False, dtype=torch.bfloat16)
    tensors, base = case.tensors(), layer_of(case)

    def step():
        return run(ops.vblora_linear, "vblora", case, tensors, base, backend="triton", dropout_p=p, training=True)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
        # Made while a graph is captured, a kernel could not be loaded.
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(5):
        with torch.no_grad():
            tensors["x"].copy_(torch.randn(tensors["x"].shape, device=DEVICE))
        torch.manual_seed(seed)
        graph.replay()
        again = [t.clone() for t in captured]
        torch.manual_seed(seed)
        expected = step()
        if p:
            # A graph draws its own masks.
            assert all(t.isfinite().all() for t in again)
        else:
            assert all(map(torch.equal, again, expected))
