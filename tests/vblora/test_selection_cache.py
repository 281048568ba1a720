"""What a frozen layer remembers of its logits in evaluation: never more than is true, nor longer than it may."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.models import DEVICE, adapted_linear
from vblora_triton import ops
from vblora_triton.kernels.launch import counted


def frozen(**options):
    return adapted_linear(**options).eval().requires_grad_(False)


def fresh(layer, x):
    """The layer's result from its parameters as they are, by an op that remembers nothing."""
    logits = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
    bank, topk = layer.vblora_vector_bank["default"], layer.topk["default"]
    return ops.vblora_linear(x, layer.base_layer(x), *logits, bank, topk, backend="triton")


@pytest.fixture
def selections(monkeypatch):
    """Weak references to every index that is selected."""
    made = []

    def remember(*args, **options):
        found = select(*args, **options)
        made.append(weakref.ref(found.indices_A))
        return found

    select = ops.select
    monkeypatch.setattr(ops, "select", remember)
    return made


@torch.no_grad()
def test_another_topk_selects_again():
    layer, x = frozen(), torch.randn(20, 32, device=DEVICE)
    before = layer(x)
    layer.topk["default"] = 1
    torch.testing.assert_close(layer(x), fresh(layer, x))
    assert not torch.allclose(layer(x), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.to(torch.float64), lambda layer: layer.to("meta"), lambda layer: layer.share_memory()],
    ids=["dtype", "device", "share_memory"],
)
def test_a_layer_that_is_moved_or_cast_keeps_no_memory_of_what_it_selected(change, selections):
    layer, x = frozen(), torch.randn(20, 32, device=DEVICE)
    layer(x)
    layer(x)
    gc.collect()
    held = [reference for reference in selections if reference() is not None]
    change(layer)
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


@torch.no_grad()
def test_a_function_applied_to_a_layer_may_write_into_its_parameters():
    layer, x = frozen(), torch.randn(20, 32, device=DEVICE)
    layer(x)

    def reverse(t):
        # Through .data, as nn.Module's own conversions write: no version is counted.
        t.data.copy_(t.data.flip(-1))
        return t

    layer._apply(reverse)
    torch.testing.assert_close(layer(x), fresh(layer, x))


@pytest.mark.parametrize("later", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_parameters_made_in_inference_mode_are_looked_at_in_each_call(later):
    with torch.inference_mode():
        layer, x = frozen(), torch.randn(20, 32, device=DEVICE)
    logits = layer.vblora_logits_A["default"]
    assert logits.is_inference()
    with later():
        before = layer(x)
    with torch.inference_mode():
        # Nobody counts the versions of such tensors.
        logits.copy_(logits.flip(-1))
    with later():
        torch.testing.assert_close(layer(x), fresh(layer, x))
        assert not torch.allclose(layer(x), before)


def test_what_was_selected_in_inference_mode_serves_gradients_of_the_input_later():
    layer, x = frozen(), torch.randn(20, 32, device=DEVICE)
    with torch.inference_mode():
        expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


class Driver(SimpleNamespace):
    """What is asked about a GPU's streams: which is the current one, and whether a graph is captured."""

    def __init__(self, monkeypatch):
        super().__init__(stream=1, capturing=False)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=self.stream))


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


@pytest.mark.skipif(DEVICE != "cpu", reason="tests/test_gpu.py asks the driver itself")
@torch.no_grad()
@pytest.mark.parametrize("M", [1, 16, 20])
def test_a_graph_that_is_captured_selects_by_itself_with_kernels_that_the_calls_before_it_have_run(M, driver):
    layer, x = frozen(), torch.randn(M, 32)
    runs = []
    for capturing in (False, False, True, True):
        driver.capturing = capturing
        with counted() as names:
            layer(x)
        runs.append(list(names))
    # What a graph captures it must compute anew in each replay: each capture selects, remembered or not.
    assert runs[2] == runs[3] == runs[0]
    assert len(runs[1]) < len(runs[0])
    assert set(runs[2]) <= {*runs[0], *runs[1]}, "a kernel that was never compiled cannot be captured"


@pytest.mark.skipif(DEVICE != "cpu", reason="tests/test_gpu.py asks the driver itself")
@torch.no_grad()
def test_another_stream_does_not_read_what_was_selected_on_the_first(driver):
    layer, x = frozen(), torch.randn(20, 32)
    runs = []
    for stream in (1, 1, 2, 2, 1):
        driver.stream = stream
        with counted() as names:
            layer(x)
        runs.append(list(names))
    assert runs[2] == runs[0]
    assert runs[1] == runs[3]
    assert len(runs[1]) < len(runs[0])


@torch.no_grad()
def test_layers_share_nothing_of_what_they_remember():
    first, second = frozen(), frozen()
    with torch.no_grad():
        second.vblora_logits_A["default"].copy_(second.vblora_logits_A["default"].flip(-1))
    x = torch.randn(20, 32, device=DEVICE)
    for layer in (first, second, first, second):
        assert isinstance(layer, nn.Module)
        torch.testing.assert_close(layer(x), fresh(layer, x))
