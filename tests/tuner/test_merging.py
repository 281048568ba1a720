"""Merging and what it must not meet: other values meanwhile, and weights that something else reads too."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.models import adapted_by, assert_unchanged, enlarge, outputs, snapshot, tiny_llama
from vblora_triton import PeftModel, VBLoRAConfig, VeraConfig, get_peft_model, set_peft_model_state_dict
from vblora_triton.checkpoint import adapter_state_dict

METHODS = {
    "vblora": partial(VBLoRAConfig, r=2, num_vectors=6, vector_length=16),
    "vera": partial(VeraConfig, r=4),
}


@pytest.fixture(params=METHODS)
def make_config(request):
    return METHODS[request.param]


def merged(make_config) -> PeftModel:
    model = adapted_by(make_config, {"target_modules": ["q_proj"]})
    model.merge_adapter()
    return model


def test_an_adapter_that_is_merged_is_not_refilled(make_config, tmp_path):
    # Its new values would not be in force, and unmerging would take out what was never put in.
    adapted_by(make_config, {"target_modules": ["q_proj"]}, seed=1).save_pretrained(tmp_path)
    model = merged(make_config)
    before, tensors = snapshot(model), adapter_state_dict(model.base_model, "default")
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_peft_model_state_dict(model, {key: -value for key, value in tensors.items()})
    assert_unchanged(model, before)
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(model), outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path)))


@pytest.mark.parametrize("part", ["all", "base", "adapter"])
def test_nothing_is_loaded_into_layers_that_are_merged(part, make_config):
    model = merged(make_config)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    own = {key: value for key, value in state.items() if ("base_layer" in key) == (part == "base") or part == "all"}
    before = snapshot(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_state_dict(own, strict=False)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.base_model.load_state_dict({key.removeprefix("base_model."): value for key, value in own.items()}, False)
    assert_unchanged(model, before)
    name, layer = next(iter(model.base_model.adapted_layers()))
    with pytest.raises(ValueError, match="unmerge_adapter"):
        # As of a layer in a plain model.
        layer.load_state_dict({key.partition(f"{name}.")[2]: own[key] for key in own if f"{name}." in key}, False)
    assert_unchanged(model, before)
    # What is no part of an adapted layer may be.
    model.load_state_dict({"base_model.model.lm_head.weight": state["base_model.model.lm_head.weight"]}, strict=False)
    model.unmerge_adapter()
    model.load_state_dict(state)
    assert torch.equal(
        model.state_dict()["base_model.model.model.norm.weight"], state["base_model.model.model.norm.weight"]
    )


class Shared(nn.Module):
    """Two layers that are one in one of several ways, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        if how == "weight":
            self.b.weight = self.a.weight
        elif how == "memory":
            self.b.weight.data = self.a.weight.data
        elif how == "module":
            self.b = self.a
        elif how == "block":
            self.a = self.b = nn.Sequential(nn.Linear(32, 32))

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("targets", [["a"], ["a", "b"]], ids=["one", "both"])
@pytest.mark.parametrize("how", ["weight", "memory", "module"])
def test_merging_into_a_weight_that_another_layer_reads_is_refused(how, targets, merge, make_config):
    model = enlarge(get_peft_model(Shared(how), make_config(target_modules=targets))).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\b[ab]\b.*(tied|one module)"):
        getattr(model, merge)()
    assert_unchanged(model, before)


@pytest.mark.parametrize(("how", "target"), [("none", "a"), ("block", "a.0")])
def test_a_layer_that_is_called_twice_is_merged_once(how, target, make_config):
    model = enlarge(get_peft_model(Shared(how), make_config(target_modules=[target]))).eval()
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)


def test_after_the_adapters_are_gone_saving_says_that_there_is_none(make_config, tmp_path):
    model = adapted_by(make_config, {"target_modules": ["q_proj"]})
    model.merge_and_unload()
    with pytest.raises(ValueError, match="no adapter to save"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_disabled_is_unmerged_at_once_and_not_by_a_forward(make_config):
    # Which may be compiled, or that of a replica, whose lists are the model's and whose weights are not.
    model = merged(make_config)
    plain = tiny_llama().state_dict()
    with model.disable_adapter():
        assert not any(layer.merged_adapters for _, layer in model.base_model.adapted_layers())
        weights = {name.replace("base_layer.", ""): t for name, t in model.get_base_model().state_dict().items()}
        assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())
