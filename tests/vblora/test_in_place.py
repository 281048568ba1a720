"""The layer writes into the base layer's result where nobody else needs it, and nowhere else."""

import copy

import pytest
import torch
from torch import nn

from tests.models import DEVICE, adapted_linear
from vblora_triton import ops
from vblora_triton.vblora.files import TopkLogits
from vblora_triton.vblora.layer import Linear


class ExpLinear(nn.Linear):
    """A linear whose backward needs its own output: d exp(u) = exp(u) du."""

    def forward(self, x):
        return super().forward(x).exp()


def truth(layer: Linear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of x and the base weight by plain PyTorch in float64."""
    wide = copy.deepcopy(layer).double()
    # Of the class, in case the instance's was replaced by one that computes in float32.
    vars(wide.base_layer).pop("forward", None)
    x = x.detach().double().requires_grad_()
    y = wide.base_layer(x) + x @ (wide.get_delta_weight("default").double().T)
    return y, *torch.autograd.grad(y.square().sum(), (x, wide.base_layer.weight))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("base", ["plain", "needs its output", "hook", "view", "replaced forward"])
def test_base_layers_output_is_written_only_where_it_is_nobody_elses(base, backend):
    module = ExpLinear(32, 48) if base == "needs its output" else nn.Linear(32, 48, bias=False)
    layer, x = adapted_linear(module, backend), torch.randn(5, 32, device=DEVICE, requires_grad=True)
    kept = []
    if base == "hook":
        module.register_forward_hook(
            lambda module, args, output: kept.append((output, output.detach().clone())) or None
        )
    elif base == "view":
        big = torch.zeros(5, 96, device=DEVICE)
        module.forward = lambda x: big[:, :48] + nn.functional.linear(x, module.weight)
    elif base == "replaced forward":
        forward = module.forward

        def remember(x):
            output = forward(x)
            kept.append((output, output.detach().clone()))
            return output

        module.forward = remember
    y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), (x, module.weight))
    if base != "view":
        for actual, expected in zip((y, *grads), truth(layer, x), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    for output, before in kept[:1]:
        assert torch.equal(output, before), "somebody else's tensor was written to"


@pytest.mark.parametrize("form", ["training", "evaluation", "from a top-k file"])
@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
def test_plain_linear_makes_no_second_output(backend, form, monkeypatch):
    layer, x = (
        adapted_linear(backend=backend),
        torch.randn(5, 32, device=DEVICE, requires_grad=True),
    )
    if form == "from a top-k file":
        logits = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
        layer.vblora_topk["default"] = TopkLogits(*ops.select(*logits, 2))
    expected, *_ = truth(layer, x)
    results = []
    linear = nn.functional.linear

    def remember(*args):
        results.append(linear(*args))
        return results[-1]

    monkeypatch.setattr(nn.functional, "linear", remember)
    layer.train(form == "training")
    with torch.set_grad_enabled(form != "evaluation"):
        y = layer(x)
    assert y.data_ptr() == results[0].data_ptr()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)


def test_two_active_adapters_add_up_in_one_output():
    layer, x = (
        adapted_linear(),
        torch.randn(5, 32, device=DEVICE, requires_grad=True),
    )
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
