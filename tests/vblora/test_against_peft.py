"""What real PEFT computes, writes and reads is what we do."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.models import enlarge, outputs, some_ids, tiny_bert, tiny_gpt2, tiny_llama
from vblora_triton import PeftConfig, PeftModel, VBLoRAConfig, get_peft_model
from vblora_triton.checkpoint import adapter_state_dict
from vblora_triton.tuner.targets import LORA_TARGETS
from vblora_triton.vblora.model import VBLORA_TARGETS

peft = pytest.importorskip("peft")
constants = pytest.importorskip("peft.utils.constants")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set")

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16, "topk": 2}


def config(family: str, **changes) -> dict:
    return {"target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | FIELDS | changes


def ours(family: str, **changes) -> PeftModel:
    return enlarge(get_peft_model(MODELS[family](), VBLoRAConfig(**config(family, **changes)))).eval()


def theirs(family: str, state=None, **changes):
    model = peft.get_peft_model(MODELS[family](), peft.VBLoRAConfig(**config(family, **changes)))
    if state is None:
        return enlarge(model).eval()
    loaded = peft.set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys
    return model.eval()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("topk", [1, 2, 10])
def test_forward_and_delta_weights_equal_pefts(family, topk):
    here = ours(family, topk=topk)
    there = theirs(family, adapter_state_dict(here.base_model, "default"), topk=topk)
    assert (outputs(here) - outputs(MODELS[family]())).abs().max() > 1e-2
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
    for model in (here, there):
        model(input_ids=some_ids(), labels=some_ids()).loss.backward()
    expected = {name: p.grad for name, p in there.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in here.named_parameters() if p.requires_grad}
    # PEFT lists the one bank under the first layer that shares it.
    bank = next(key for key in expected if "vector_bank" in key)
    expected["base_model.vblora_vector_bank.default"] = expected.pop(bank)
    assert own.keys() == expected.keys()
    for name in own:
        torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("only_topk", [False, True], ids=["full", "topk"])
@pytest.mark.parametrize("topk", [1, 3])
def test_a_file_saved_here_loads_in_peft(family, only_topk, topk, tmp_path):
    here = ours(family, save_only_topk_weights=only_topk, topk=topk)
    here.save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path)
    torch.testing.assert_close(outputs(there), outputs(here), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("only_topk", [False, True], ids=["full", "topk"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_file_saved_by_peft_loads_here(family, only_topk, safe, tmp_path):
    there = theirs(family, save_only_topk_weights=only_topk, topk=3)
    there.save_pretrained(tmp_path, safe_serialization=safe)
    here = PeftModel.from_pretrained(MODELS[family](), tmp_path)
    torch.testing.assert_close(outputs(here), outputs(there), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_vectors", [10, 255, 256])
@pytest.mark.parametrize("only_topk", [False, True], ids=["full", "topk"])
def test_the_weights_file_is_the_one_that_peft_writes(num_vectors, only_topk, tmp_path):
    here = ours("llama", num_vectors=num_vectors, save_only_topk_weights=only_topk)
    here.save_pretrained(tmp_path / "here")
    full = get_peft_model(tiny_llama(), VBLoRAConfig(**config("llama", num_vectors=num_vectors)))
    full.load_state_dict(here.state_dict())
    there = theirs(
        "llama",
        adapter_state_dict(full.base_model, "default"),
        num_vectors=num_vectors,
        save_only_topk_weights=False,
    )
    there.peft_config["default"].save_only_topk_weights = only_topk
    there.save_pretrained(tmp_path / "there")
    own, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("here", "there"))
    assert own.keys() == other.keys()
    for key in own:
        assert own[key].dtype == other[key].dtype, key
        assert torch.equal(own[key], other[key]), key


def test_the_config_file_has_pefts_fields_and_reads_the_same_there(tmp_path):
    here = ours("llama", vblora_dropout=0.25, layers_to_transform=[0, 1], bias="none")
    here.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    there = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(there, peft.VBLoRAConfig)
    assert set(values) == {field.name for field in dataclasses.fields(peft.VBLoRAConfig)}
    assert values["inference_mode"] is True
    assert list(values) == sorted(values)
    for name, value in here.peft_config["default"].to_dict().items():
        if name not in ("inference_mode", "peft_version"):
            assert getattr(there, name) == value, name
    there.save_pretrained(tmp_path / "theirs")
    assert PeftConfig.from_pretrained(tmp_path / "theirs").target_modules == set(TARGETS["llama"])


def test_fields_come_in_pefts_order_with_pefts_defaults():
    own, other = dataclasses.fields(VBLoRAConfig), dataclasses.fields(peft.VBLoRAConfig)
    assert [f.name for f in own] == [f.name for f in other]
    for name in (f.name for f in other if f.name not in ("peft_version", "peft_type")):
        assert getattr(VBLoRAConfig(), name) == getattr(peft.VBLoRAConfig(), name), name


def test_default_targets_are_pefts_and_loras_where_peft_has_none():
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    vblora = constants.TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
    assert lora == LORA_TARGETS
    assert lora | vblora == VBLORA_TARGETS


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["o_proj"]},
        {"target_modules": None},
    ],
    ids=str,
)
def test_the_same_modules_are_adapted_as_by_peft(changes):
    changes = config("llama", **changes)
    here = get_peft_model(tiny_llama(), VBLoRAConfig(**changes))
    there = peft.get_peft_model(tiny_llama(), peft.VBLoRAConfig(**changes))
    assert here.targeted_module_names == there.targeted_module_names
    assert here.peft_config["default"].target_modules == there.peft_config["default"].target_modules


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("bias", ["none", "all", "vblora_only"])
def test_heads_and_biases_travel_both_ways(task_type, bias, tmp_path):
    changes = {"target_modules": ["query", "output.dense"], "task_type": task_type, "bias": bias} | FIELDS
    here = enlarge(get_peft_model(tiny_bert(), VBLoRAConfig(**changes))).eval()
    there = peft.get_peft_model(tiny_bert(), peft.VBLoRAConfig(**changes)).eval()
    trained = {name for name, p in here.named_parameters() if p.requires_grad and "bank" not in name}
    assert trained == {name for name, p in there.named_parameters() if p.requires_grad and "bank" not in name}
    with torch.no_grad():
        for name, parameter in here.named_parameters():
            if name in trained and "vblora_" not in name:
                parameter.add_(torch.randn_like(parameter))
    here.save_pretrained(tmp_path / "here")
    there = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "here")
    torch.testing.assert_close(outputs(there), outputs(here), rtol=0, atol=1e-6)
    there.save_pretrained(tmp_path / "there")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "there")
    torch.testing.assert_close(outputs(again), outputs(here), rtol=0, atol=1e-6)


def test_adapters_that_are_active_together_add_up_as_in_peft(tmp_path):
    here = ours("llama")
    here.add_adapter("other", VBLoRAConfig(**config("llama", target_modules=["q_proj", "v_proj"], r=2, num_vectors=7)))
    enlarge(here)
    here.set_adapter(["default", "other"])
    here.save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    there.load_adapter(tmp_path / "other", "other")
    there.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(outputs(here), outputs(there.eval()), rtol=0, atol=1e-6)


def test_merged_weights_equal_pefts():
    here = ours("gpt2")
    there = theirs("gpt2", adapter_state_dict(here.base_model, "default"))
    expected = there.merge_and_unload().state_dict()
    merged = copy.deepcopy(here).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key in merged:
        torch.testing.assert_close(merged[key], expected[key], rtol=0, atol=1e-6)
