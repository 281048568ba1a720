"""Adapters inside a plain model, and the base model's own state dict beside them; without peft."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import adapted_by, enlarge, outputs, tiny_bert, tiny_llama
from vblora_triton import (
    AdapterFileError,
    PeftConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_base_model_state_dict,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

FIELDS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
METHODS = {"vblora": (VBLoRAConfig, FIELDS | {"num_vectors": 10, "vector_length": 16}), "vera": (VeraConfig, FIELDS)}
BOTH = pytest.mark.parametrize(("kind", "fields"), METHODS.values(), ids=METHODS)


@BOTH
def test_an_injected_adapter_is_one_of_a_peft_model_without_the_model_around_it(kind, fields):
    changes = {"modules_to_save": ["lm_head"]}
    wrapped = adapted_by(kind, fields | changes)
    base = tiny_llama()
    model = inject_adapter_in_model(kind(**fields, **changes), base, low_cpu_mem_usage=False)
    assert model is base
    state = {
        key.removeprefix("base_model.model.").removeprefix("base_model."): tensor
        for key, tensor in get_peft_model_state_dict(wrapped).items()
    }
    assert get_peft_model_state_dict(model).keys() == state.keys()
    set_peft_model_state_dict(model, state)
    assert torch.equal(outputs(model), outputs(wrapped))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n.removeprefix("base_model.model.").removeprefix("base_model.")
        for n, p in wrapped.named_parameters()
        if p.requires_grad
    }
    again = copy.deepcopy(model)
    enlarge(model, seed=5)
    assert torch.equal(outputs(again), outputs(wrapped))
    assert not torch.equal(outputs(model), outputs(wrapped))
    inject_adapter_in_model(kind(**fields), model, "second")
    assert list(model.peft_config) == ["default", "second"]
    with pytest.raises(ValueError, match="'missing'"):
        get_peft_model_state_dict(model, adapter_name="missing")


@BOTH
def test_the_base_models_state_dict_is_that_of_the_model_before(kind, fields):
    model = adapted_by(kind, fields | {"modules_to_save": ["lm_head"]})
    expected = tiny_llama().state_dict()
    found = get_base_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    changed = {key: tensor + 1 for key, tensor in expected.items()}
    adapter = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    assert set_base_model_state_dict(model, changed) == ([], [])
    plain = tiny_llama()
    plain.load_state_dict(changed)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(plain))
    assert all(torch.equal(adapter[key], tensor) for key, tensor in get_peft_model_state_dict(model).items())
    key = "model.norm.weight"
    for broken in (
        {k: t for k, t in expected.items() if k != key},
        expected | {"more": expected[key]},
        expected | {key: expected[key][1:]},
    ):
        with pytest.raises(RuntimeError, match=r"more|model\.norm\.weight"):
            set_base_model_state_dict(model, broken)
    assert torch.equal(get_base_model_state_dict(model)[key], changed[key])
    assert set_base_model_state_dict(model, {key: expected[key]}, strict=False).unexpected_keys == []
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_base_model_state_dict(model, expected)


@BOTH
def test_an_adapter_kept_in_bfloat16_is_saved_and_read_in_it(kind, fields, tmp_path):
    base = tiny_llama().to(torch.bfloat16)
    model = enlarge(get_peft_model(base, kind(**fields), autocast_adapter_dtype=False))
    model.save_pretrained(tmp_path)
    own = {n: p for n, p in model.named_parameters() if "vblora_" in n or "vera_" in n}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for n, t in stored.items() if "vera_A" not in n and "vera_B" not in n} == {torch.bfloat16}
    for low in (False, True):
        again = PeftModel.from_pretrained(
            tiny_llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=low
        )
        assert {n: p.dtype for n, p in again.named_parameters() if n in own} == dict.fromkeys(own, torch.bfloat16)
        assert torch.equal(outputs(again), outputs(model.eval()))


@BOTH
def test_keys_of_another_layout_are_mapped_and_devices_are_taken(kind, fields, tmp_path, monkeypatch):
    model = adapted_by(kind, fields)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("model.layers", "old.blocks"): t for k, t in load_file(file).items()}, file)
    placed = {"torch_device": "cpu", "device_map": "auto", "max_memory": {"cpu": "1GiB"}, "offload_folder": "x"}
    with pytest.raises(AdapterFileError, match="missing"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    mapping = {r"^old\.blocks": "model.layers"}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, key_mapping=mapping, **placed)
    assert torch.equal(outputs(again), outputs(model))
    again.load_adapter(tmp_path, "second", key_mapping=mapping, torch_device="cpu")
    assert load_peft_weights(tmp_path, key_mapping=mapping).keys() == get_peft_model_state_dict(model).keys()
    base = tiny_llama()
    monkeypatch.setattr(type(base), "_checkpoint_conversion_mapping", mapping, raising=False)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(model))
    with pytest.raises(ValueError, match="offload_folder"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, offload_folder="x", offload_dir="y")


@BOTH
def test_disabled_adapters_are_frozen_and_then_trained_as_before(kind, fields):
    model = get_peft_model(tiny_llama(), kind(**fields, modules_to_save=["lm_head"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.has_active_enabled_adapter
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert model.has_active_enabled_adapter
    model.set_adapter("default", inference_mode=True)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())
    layers = [layer for _, layer in model.base_model.adapted_layers()]
    layers[0].enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()


def test_a_wrapper_names_only_active_adapters_that_have_a_copy():
    model = get_peft_model(tiny_llama(), VeraConfig(**FIELDS))
    model.add_adapter("head", VeraConfig(**FIELDS, modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    assert head.active_adapters == []
    model.set_adapter(["default", "head"])
    assert head.active_adapters == ["head"]


def test_files_say_which_pefts_they_are_like_and_say_what_they_are(tmp_path):
    config = VeraConfig(r=2)
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = VeraConfig.from_json_file(file)
    assert fields == json.loads(file.read_text())
    assert fields["peft_version"][0].isdigit()
    assert get_peft_config(fields) == config
    del fields["peft_type"]
    file.write_text(json.dumps(fields))
    for kind in (VeraConfig, PeftConfig):
        with pytest.raises(TypeError, match=r"missing required keys: \{'peft_type'\}"):
            kind.from_pretrained(tmp_path)


def test_a_base_model_is_prepared_and_its_inputs_require_gradients():
    base = tiny_bert().to(torch.bfloat16)
    base.is_loaded_in_8bit = True
    assert prepare_model_for_kbit_training(base) is base
    assert {(p.dtype, p.requires_grad) for p in base.parameters()} == {(torch.float32, False)}
    assert base.is_gradient_checkpointing
    model = get_peft_model(tiny_llama(), VeraConfig(**FIELDS))
    plain = model.get_base_model()
    assert model.prepare_model_for_gradient_checkpointing(plain) is plain
    assert plain.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_a_renamed_base_is_warned_of():
    base = tiny_llama()
    base.name_or_path = "here"
    with pytest.warns(UserWarning, match="renamed from 'there' to 'here'"):
        get_peft_model(base, VeraConfig(**FIELDS, base_model_name_or_path="there"))
