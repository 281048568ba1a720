"""The layer leaves its base's product to the op where calling the module is nothing else, and calls it elsewhere."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as everywhere
from transformers.pytorch_utils import Conv1D

from tests.models import DEVICE, adapted_linear
from vblora_triton import ops
from vblora_triton.vblora.files import TopkLogits
from vblora_triton.vblora.layer import Linear

BASES = {
    "plain": lambda: nn.Linear(32, 48, bias=False),
    "bias": lambda: nn.Linear(32, 48),
    "conv": lambda: Conv1D(48, 32),
    "trained": lambda: nn.Linear(32, 48),
    "needs its output": lambda: ExpLinear(32, 48),
    "hook": lambda: nn.Linear(32, 48),
    "pre-hook": lambda: nn.Linear(32, 48),
    "backward hook": lambda: nn.Linear(32, 48),
    "hook on all modules": lambda: nn.Linear(32, 48),
    "replaced forward": lambda: nn.Linear(32, 48),
    "autocast": lambda: nn.Linear(32, 48),
}
OWNED = ("plain", "bias", "conv")


class ExpLinear(nn.Linear):
    """A linear whose backward needs its own output: d exp(u) = exp(u) du."""

    def forward(self, x):
        return super().forward(x).exp()


def truth(layer: Linear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x and, where it is trained, the base weight by plain PyTorch in float64."""
    wide = copy.deepcopy(layer).double()
    # Of the class, in case the instance's was replaced by one that computes in float32.
    vars(wide.base_layer).pop("forward", None)
    x = x.detach().double().requires_grad_()
    delta = wide.get_delta_weight("default").double()
    y = wide.base_layer(x) + x @ (delta if isinstance(wide.base_layer, Conv1D) else delta.T)
    return [y, *torch.autograd.grad(y, [x, *trained(wide)], dy.double())]


def trained(layer: Linear) -> list[torch.Tensor]:
    return [p for p in layer.base_layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
@pytest.mark.parametrize("kind", BASES)
def test_the_base_is_called_unless_it_is_plain_and_is_right_either_way(kind, backend, monkeypatch):
    base = BASES[kind]().requires_grad_(kind == "trained")
    layer, x = adapted_linear(base, backend), torch.randn(3, 5, 32, device=DEVICE, requires_grad=True)
    layer.fan_in_fan_out = kind == "conv"
    dy = torch.randn(3, 5, 48, device=DEVICE)
    expected = truth(layer, x, dy)
    seen, handles = [], []
    if kind == "hook":
        handles.append(base.register_forward_hook(lambda *args: seen.append("hook")))
    elif kind == "pre-hook":
        handles.append(base.register_forward_pre_hook(lambda *args: seen.append("hook")))
    elif kind == "backward hook":
        handles.append(base.register_full_backward_hook(lambda *args: seen.append("hook")))
    elif kind == "hook on all modules":
        handles.append(everywhere.register_module_forward_hook(lambda m, *args: seen.append(m is base) and None))
    elif kind == "replaced forward":
        forward = base.forward
        base.forward = lambda x: seen.append("forward") or forward(x)
    called = []
    original = type(base).forward
    monkeypatch.setattr(type(base), "forward", lambda self, x: called.append(self) or original(self, x))
    try:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == "autocast"):
            y = layer(x)
        found = [y, *torch.autograd.grad(y, [x, *trained(layer)], dy.to(y.dtype))]
    finally:
        for handle in handles:
            handle.remove()
    assert bool(called or "forward" in seen) == (kind not in OWNED)
    assert bool(seen) == (kind in ("hook", "pre-hook", "backward hook", "hook on all modules", "replaced forward"))
    rtol, atol = (2e-2, 5e-2) if kind == "autocast" else (1e-4, 1e-4)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", ["training", "evaluation", "from a top-k file"])
@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
def test_a_plain_base_is_right_in_every_form_of_the_adapter(backend, form):
    layer = adapted_linear(nn.Linear(32, 48).requires_grad_(False), backend)
    x, dy = torch.randn(20, 32, device=DEVICE, requires_grad=True), torch.randn(20, 48, device=DEVICE)
    if form == "from a top-k file":
        logits = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
        layer.vblora_topk["default"] = TopkLogits(*ops.select(*logits, 2))
    expected, *grads = truth(layer, x, dy)
    layer.train(form == "training")
    with torch.set_grad_enabled(form != "evaluation"):
        y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    if form != "evaluation":
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx.double(), grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_two_active_adapters_add_up(bias):
    layer = adapted_linear(nn.Linear(32, 48, bias=bias).requires_grad_(False))
    x = torch.randn(5, 32, device=DEVICE, requires_grad=True)
    layer.vblora_vector_bank["other"] = nn.Parameter(torch.randn(4, 8, device=DEVICE))
    layer.update_layer("other", layer.vblora_vector_bank, r=3, topk=2, num_vectors=4, vector_length=8)
    layer.set_adapter(["default", "other"])
    wide = copy.deepcopy(layer).double()
    deltas = sum(wide.get_delta_weight(name) for name in ("default", "other")).double()
    expected = wide.base_layer(x.double()) + x.double() @ deltas.T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(layer(x).square().sum(), x)
    expected_grads = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
