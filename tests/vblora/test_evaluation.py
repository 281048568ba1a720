"""What a frozen layer computes in evaluation comes from its parameters as they are, however they were written to."""

import pytest
import torch
from torch import nn

from tests.models import DEVICE, adapted_linear
from vblora_triton import ops


def frozen(**options):
    return adapted_linear(**options).eval().requires_grad_(False)


def fresh(layer, x):
    """The layer's result from its parameters as they are, in plain PyTorch."""
    logits = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
    bank, topk = layer.vblora_vector_bank["default"], layer.topk["default"]
    return ops.vblora_linear(x, layer.base_layer(x), *logits, bank, topk, backend="reference")


def swap_on_load(layer, logits):
    """Load values as torch does with this flag: parameters swap their insides, and nobody may refer to them."""
    state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


# An average of weights in place, as it is usually written, and other writes that nobody counts; and those that count.
WRITES = {
    "data.copy_": lambda layer, logits: logits.data.copy_(logits.flip(-1)),
    "data.mul_": lambda layer, logits: logits.data.mul_(-1),
    "new memory": lambda layer, logits: setattr(logits, "data", torch.randn_like(logits)),
    "copy_": lambda layer, logits: logits.copy_(logits.flip(-1)),
    "numpy": lambda layer, logits: logits.cpu().numpy().__imul__(-1) if DEVICE == "cpu" else logits.mul_(-1),
    "applied": lambda layer, logits: layer._apply(lambda t: (t.data.copy_(t.data.flip(-1)), t)[1]),
    "load_state_dict": lambda layer, logits: layer.load_state_dict({k: -v for k, v in layer.state_dict().items()}),
    "assigned": lambda layer, logits: layer.load_state_dict(
        {k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=True
    ),
    "swapped": swap_on_load,
    "another topk": lambda layer, logits: layer.topk.update(default=1),
}


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_every_write_to_the_logits_counts_in_the_next_call(write, backend):
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("computes on a CPU only")
    layer, x = frozen(backend=backend), torch.randn(20, 32, device=DEVICE)
    before = layer(x)
    torch.testing.assert_close(layer(x), before)
    write(layer, layer.vblora_logits_A["default"])
    after = layer(x)
    torch.testing.assert_close(after, fresh(layer, x))
    assert not torch.allclose(after, before)


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


def test_after_inference_mode_the_input_has_its_gradient():
    layer, x = frozen(), torch.randn(20, 32, device=DEVICE)
    with torch.inference_mode():
        expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


@torch.no_grad()
def test_layers_share_nothing():
    first, second = frozen(), frozen()
    second.vblora_logits_A["default"].copy_(second.vblora_logits_A["default"].flip(-1))
    x = torch.randn(20, 32, device=DEVICE)
    for layer in (first, second, first, second):
        assert isinstance(layer, nn.Module)
        torch.testing.assert_close(layer(x), fresh(layer, x))
