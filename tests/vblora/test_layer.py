"""One adapted layer: its output against float64, merging, the shared bank, and the documented names."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.models import DEVICE
from vblora_triton import use_backend
from vblora_triton.ops import reference
from vblora_triton.vblora.layer import Linear


def make(base=None, conv=False, dtype=torch.float32, **changes) -> Linear:
    torch.manual_seed(0)
    base = base or (Conv1D(48, 32) if conv else nn.Linear(32, 48))
    bank = nn.ParameterDict({"default": nn.Parameter(torch.randn(9, 16))})
    arguments = {"r": 3, "num_vectors": 9, "vector_length": 16, "topk": 2, "init_logits_std": 2.0} | changes
    return Linear(base.to(dtype), bank, "default", fan_in_fan_out=conv, is_target_conv_1d_layer=conv, **arguments)


def truth(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, and nothing but its definition, in float64."""
    logits = (layer.vblora_logits_A["default"].double(), layer.vblora_logits_B["default"].double())
    A, B = reference.low_rank_matrices(*logits, layer.vblora_vector_bank["default"].double(), layer.topk["default"])
    weight = layer.weight.double().T if layer.fan_in_fan_out else layer.weight.double()
    return x.double() @ weight.T + layer.bias.double() + x.double() @ A.T @ B.T


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_forward_is_the_definition(conv):
    layer, x = make(conv=conv), torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_keeps_the_output_and_unmerging_restores_every_bit(conv, safe_merge):
    layer, x = make(conv=conv), torch.randn(5, 32)
    weight = layer.weight.detach().clone()
    layer.merge(safe_merge)
    assert layer.merged
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(layer.base_layer(x).double(), truth_from(layer, x, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, weight)


def truth_from(layer, x, weight):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return truth(layer, x)


def test_merging_rounds_once():
    layer = make(dtype=torch.bfloat16)
    delta = layer.get_delta_weight("default")
    expected = (layer.weight.double() + delta.double()).to(torch.bfloat16)
    layer.merge()
    assert delta.dtype == torch.float32
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=0)


def test_unmerging_without_a_copy_is_exact_to_rounding():
    layer = make()
    weight = layer.weight.detach().clone()
    layer.keep_base_weight = False
    layer.merge()
    assert layer._base_weight is None
    layer.unmerge()
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-5)


def test_a_safe_merge_that_is_not_finite_names_the_adapter_and_changes_nothing():
    layer = make()
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.vblora_vector_bank["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="'default'"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight)
    assert not layer.merged


def test_merging_one_of_two_active_adapters_leaves_the_other_acting():
    layer, x = make(), torch.randn(4, 32)
    layer.vblora_vector_bank["other"] = nn.Parameter(torch.randn(5, 8))
    layer.update_layer("other", layer.vblora_vector_bank, 2, 1, 5, 8, 0.0, 1.0)
    layer.set_adapter(["default", "other"])
    before = layer(x)
    layer.merge(adapter_names=["other"])
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


def test_delta_weight_ignores_autocast():
    layer = make()
    expected = layer.get_delta_weight("default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_dtype_of_the_base_result(dtype):
    layer = make(dtype=dtype)
    x = torch.randn(4, 32, dtype=dtype)
    assert layer(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert make()(torch.randn(4, 32)).dtype == torch.bfloat16


def test_the_base_layer_is_called_so_that_its_hooks_run():
    layer, calls = make(), []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 32))
    assert calls == [1]


@pytest.mark.parametrize("merged", [False, True])
def test_a_disabled_layer_is_its_base_layer(merged):
    layer, x = make(), torch.randn(4, 32)
    expected, adapted = layer.base_layer(x), layer(x)
    if merged:
        layer.merge()
    layer.disable_adapters = True
    assert torch.equal(layer(x), expected)
    layer.disable_adapters = False
    torch.testing.assert_close(layer(x), adapted)


def test_dropout_acts_in_training_only():
    layer, x = make(vblora_dropout=0.5), torch.randn(64, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_a_new_adapter_is_in_the_mode_of_its_layer(training):
    layer, x = make().train(training), torch.randn(64, 32)
    layer.vblora_vector_bank["other"] = nn.Parameter(torch.randn(5, 8))
    layer.update_layer("other", layer.vblora_vector_bank, 2, 1, 5, 8, 0.5, 1.0)
    layer.set_adapter("other")
    assert layer.vblora_dropout["other"].training == training
    assert torch.equal(layer(x), layer(x)) == (not training)


@pytest.mark.parametrize("grad", [True, False])
def test_a_bank_elsewhere_is_brought_to_the_device_of_the_input(grad):
    layer = make().eval()
    # The bank is the model's own, and stays where it is.
    layer.to("meta")
    assert layer.vblora_vector_bank["default"].device.type == "cpu"
    with torch.set_grad_enabled(grad):
        y = layer(torch.randn(3, 32, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (3, 48))
    assert layer._delta("default").is_meta


def test_the_bank_is_reached_and_not_registered():
    layer = make()
    assert layer.vblora_vector_bank["default"].shape == (9, 16)
    assert not any("bank" in name for name, _ in layer.named_parameters())
    assert not any("bank" in name for name in layer.state_dict())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.vblora_vector_bank = nn.ParameterDict({"default": nn.Parameter(torch.randn(9, 16))})
        self.layers = nn.ModuleList(
            Linear(nn.Linear(32, 48), self.vblora_vector_bank, "default", 3, 9, 16) for _ in "ab"
        )


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        pickled,
        saved,
        lambda model: model.to(torch.float64),
        lambda model: model.to("meta"),
        lambda model: model.to_empty(device="cpu"),
    ],
    ids=["deepcopy", "pickle", "torch.save", "to-dtype", "to-meta", "to_empty"],
)
def test_layers_of_a_copied_or_moved_model_share_its_bank(copied):
    model = copied(Pair())
    bank = model.vblora_vector_bank["default"]
    assert all(layer.vblora_vector_bank["default"] is bank for layer in model.layers)
    assert all(layer.vblora_logits_A["default"].dtype == bank.dtype for layer in model.layers)
    assert sum(p is bank for p in model.parameters()) == 1


def test_the_documented_attributes_are_there():
    layer = make(vblora_dropout=0.1)
    assert (layer.in_features, layer.out_features) == (32, 48)
    assert layer.r == {"default": 3}
    assert layer.topk == {"default": 2}
    assert isinstance(layer.vblora_dropout, nn.ModuleDict)
    assert layer.vblora_dropout["default"].p == 0.1
    assert layer.vblora_logits_A["default"].shape == (3, 2, 9)
    assert layer.vblora_logits_B["default"].shape == (3, 3, 9)
    A, B = layer._get_lora_matrices("default")
    assert (A.shape, B.shape) == ((3, 32), (48, 3))
    assert layer._get_low_rank_matrix(torch.randn(4, 9), layer.vblora_vector_bank["default"], 2).shape == (4, 16)
    assert layer.disable_adapters is False
    assert layer.merged is False
    assert layer.merged_adapters == []


def test_the_backend_of_the_layer_reaches_the_op():
    layer, x = make().to(DEVICE), torch.randn(3, 32, device=DEVICE)
    layer.backend = "no such backend"
    with pytest.raises(ValueError, match="no such backend"):
        layer(x)
    layer.backend = "auto"
    with use_backend("reference"):
        expected = layer(x)
    with use_backend("triton"):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"vector_length": 12}, ValueError, ["`vector_length`", "12", "`in_features`", "32"]),
        ({"vector_length": 32}, ValueError, ["`out_features`", "48"]),
        ({"r": 0}, ValueError, ["`r`"]),
        ({"topk": 10}, ValueError, ["`topk`", "10", "9"]),
        ({"vblora_dropout": 2}, ValueError, ["`vblora_dropout`"]),
        ({"base": nn.Embedding(4, 4)}, TypeError, ["`base_layer`", "Embedding"]),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_is_refused_by_name(changes, error, words):
    with pytest.raises(error) as caught:
        make(**changes)
    for word in words:
        assert word in str(caught.value)
