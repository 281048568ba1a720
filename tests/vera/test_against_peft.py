"""What real PEFT computes, writes and reads is what we do."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.models import enlarge, outputs, some_ids, tiny_bert, tiny_gpt2, tiny_llama
from vblora_triton import PeftConfig, PeftModel, VeraConfig, get_peft_model
from vblora_triton.checkpoint import adapter_state_dict
from vblora_triton.vera.model import VERA_TARGETS
from vblora_triton.vera.projection import draw_projections

peft = pytest.importorskip("peft")
constants = pytest.importorskip("peft.utils.constants")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set", "ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:`save_projection` is False", "ignore:Unexpected keyword arguments"),
]

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "output.dense"],
}
FORMS = pytest.mark.parametrize("save_projection", [True, False], ids=["with", "without"])


def config(family: str, **changes) -> dict:
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    return {"target_modules": TARGETS[family], "task_type": task, "r": 24, "projection_prng_key": 7} | changes


def ours(family: str, **changes) -> PeftModel:
    return enlarge(get_peft_model(MODELS[family](), VeraConfig(**config(family, **changes)))).eval()


def theirs(family: str, state=None, dtype=torch.float32, **changes):
    model = peft.get_peft_model(MODELS[family]().to(dtype), peft.VeraConfig(**config(family, **changes)))
    if state is None:
        return enlarge(model).eval()
    loaded = peft.set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys
    return model.eval()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("r", [1, 24])
def test_forward_and_delta_weights_equal_pefts(family, r):
    here = ours(family, r=r)
    there = theirs(family, adapter_state_dict(here.base_model, "default"), r=r)
    assert (outputs(here) - outputs(MODELS[family]())).abs().max() > 1e-3
    torch.testing.assert_close(outputs(here), outputs(there), rtol=0, atol=1e-6)
    layers = dict(there.base_model.model.named_modules())
    for name, layer in here.base_model.adapted_layers():
        delta = layers[name].get_delta_weight("default")
        assert delta.shape == layer.weight.shape
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_gradients_equal_pefts(family):
    here = ours(family)
    there = theirs(family, adapter_state_dict(here.base_model, "default"))
    labels = torch.tensor([0, 2]) if family == "bert" else some_ids()
    for model in (here, there):
        model(input_ids=some_ids(), labels=labels).loss.backward()
    expected = {name: p.grad for name, p in there.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in here.named_parameters() if p.requires_grad}
    assert own.keys() == expected.keys()
    for name in own:
        torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init_weights", [True, False])
def test_a_new_adapter_is_pefts_under_the_same_seed(init_weights):
    made = []
    for kind, make in ((VeraConfig, get_peft_model), (peft.VeraConfig, peft.get_peft_model)):
        base = tiny_llama()
        torch.manual_seed(3)
        made.append(make(base, kind(**config("llama", init_weights=init_weights, d_initial=0.07))))
    own, other = (dict(model.named_parameters()) for model in made)
    lambdas = {name for name in own if "lambda" in name}
    assert lambdas == {name for name in other if "lambda" in name}
    for name in lambdas:
        assert torch.equal(own[name], other[name]), name
    for name in ("vera_A", "vera_B"):
        assert torch.equal(*(getattr(model.base_model, name)["default"] for model in made))


@pytest.mark.parametrize("family", MODELS)
@FORMS
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_file_saved_here_loads_in_peft(family, save_projection, safe, tmp_path):
    here = ours(family, save_projection=save_projection)
    here.save_pretrained(tmp_path, safe_serialization=safe)
    there = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path)
    torch.testing.assert_close(outputs(there), outputs(here), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
@FORMS
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_file_saved_by_peft_loads_here(family, save_projection, safe, tmp_path):
    there = theirs(family, save_projection=save_projection)
    there.save_pretrained(tmp_path, safe_serialization=safe)
    here = PeftModel.from_pretrained(MODELS[family](), tmp_path)
    torch.testing.assert_close(outputs(here), outputs(there), rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", [0, 1, 42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_file_without_projections_gives_the_same_outputs_on_either_base(key, dtype, tmp_path):
    there = theirs("llama", dtype=dtype, save_projection=False, projection_prng_key=key)
    there.save_pretrained(tmp_path)
    here = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path)
    assert (outputs(here) - outputs(tiny_llama().to(dtype))).abs().max() > 0.1
    if dtype == torch.bfloat16:
        # PEFT rounds the projections to the base's dtype, here they stay as they are drawn: so closely no closer.
        torch.testing.assert_close(outputs(here), outputs(there), rtol=0.02, atol=0.02)
        drawn = draw_projections(key, 24, 96, 64)
        for layer in there.modules():
            if isinstance(layer, peft.tuners.vera.layer.VeraLayer):
                layer.vera_A["default"], layer.vera_B["default"] = drawn
    torch.testing.assert_close(outputs(here), outputs(there), rtol=0, atol=1e-6)


@FORMS
def test_the_weights_file_is_the_one_that_peft_writes(save_projection, tmp_path):
    here = ours("llama", save_projection=save_projection)
    here.save_pretrained(tmp_path / "here")
    theirs("llama", adapter_state_dict(here.base_model, "default"), save_projection=save_projection).save_pretrained(
        tmp_path / "there"
    )
    own, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("here", "there"))
    assert own.keys() == other.keys()
    for key in own:
        assert own[key].dtype == other[key].dtype, key
        assert torch.equal(own[key], other[key]), key


def test_the_config_file_has_pefts_fields_and_reads_the_same_there(tmp_path, recwarn):
    here = ours("llama", vera_dropout=0.25, layers_to_transform=[0, 1], d_initial=0.2)
    here.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    there = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(there, peft.VeraConfig)
    assert set(values) == {field.name for field in dataclasses.fields(peft.VeraConfig)}
    assert values["inference_mode"] is True
    assert list(values) == sorted(values)
    for name, value in here.peft_config["default"].to_dict().items():
        if name not in ("inference_mode", "peft_version", "exclude_modules"):
            assert getattr(there, name) == value, name
    there.save_pretrained(tmp_path / "theirs")
    assert PeftConfig.from_pretrained(tmp_path / "theirs").target_modules == set(TARGETS["llama"])
    assert not recwarn.list


def test_fields_come_in_pefts_order_with_pefts_defaults():
    own, other = dataclasses.fields(VeraConfig), dataclasses.fields(peft.VeraConfig)
    assert [f.name for f in own if f.name != "exclude_modules"] == [f.name for f in other]
    for name in (f.name for f in other if f.name not in ("peft_version", "peft_type")):
        assert getattr(VeraConfig(), name) == getattr(peft.VeraConfig(), name), name


def test_default_targets_are_pefts():
    assert constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING == VERA_TARGETS


@pytest.mark.parametrize("exclude", [["down_proj"], r".*layers\.1\..*"], ids=str)
@FORMS
def test_an_adapter_with_excluded_modules_computes_the_same_in_peft_which_has_no_such_field(
    exclude, save_projection, tmp_path
):
    here = ours("llama", target_modules="all-linear", exclude_modules=exclude, save_projection=save_projection)
    assert not any("down_proj" in name and "layers.1" in name for name in here.targeted_module_names)
    here.save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert there.targeted_module_names == here.targeted_module_names
    torch.testing.assert_close(outputs(there), outputs(here), rtol=0, atol=1e-6)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(outputs(again), outputs(here))
    expected = {"down_proj"} if isinstance(exclude, list) else exclude
    assert again.peft_config["default"].exclude_modules == expected


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
def test_heads_and_biases_travel_both_ways(task_type, bias, tmp_path):
    changes = {"target_modules": ["query", "output.dense"], "task_type": task_type, "bias": bias, "r": 5}
    here = enlarge(get_peft_model(tiny_bert(), VeraConfig(**changes))).eval()
    there = peft.get_peft_model(tiny_bert(), peft.VeraConfig(**changes)).eval()
    trained = {name for name, p in here.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in there.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in here.named_parameters():
            if name in trained and "vera_" not in name:
                parameter.add_(torch.randn_like(parameter))
    here.save_pretrained(tmp_path / "here")
    there = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "here")
    torch.testing.assert_close(outputs(there), outputs(here), rtol=0, atol=1e-6)
    there.save_pretrained(tmp_path / "there")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "there")
    torch.testing.assert_close(outputs(again), outputs(here), rtol=0, atol=1e-6)


def test_adapters_that_are_active_together_add_up_as_in_peft(tmp_path):
    here = ours("llama")
    here.add_adapter("other", VeraConfig(**config("llama")))
    enlarge(here)
    here.set_adapter(["default", "other"])
    here.save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    there.load_adapter(tmp_path / "other", "other")
    there.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(outputs(here), outputs(there.eval()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_merged_weights_equal_pefts(family):
    here = ours(family)
    there = theirs(family, adapter_state_dict(here.base_model, "default"))
    expected = there.merge_and_unload().state_dict()
    merged = copy.deepcopy(here).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key in merged:
        torch.testing.assert_close(merged[key], expected[key], rtol=0, atol=1e-6)
