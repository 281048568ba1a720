"""Files of VeRA, with projections and without: what comes back, what is refused, and that nothing is lost."""

import json
import os
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import adapted_by, assert_unchanged, enlarge, outputs, snapshot, tiny_gpt2, tiny_llama
from tests.test_checkpoint import size_on_disk
from vblora_triton import AdapterFileError, AutoPeftModelForCausalLM, PeftModel, VeraConfig, get_peft_model
from vblora_triton.vera.projection import draw_projections

pytestmark = pytest.mark.filterwarnings("ignore:`save_projection` is False")

WEIGHTS = "adapter_model.safetensors"
A, B = "base_model.vera_A", "base_model.vera_B"
FORMS = pytest.mark.parametrize("save_projection", [True, False], ids=["with", "without"])


adapted = partial(adapted_by, VeraConfig, {"r": 6, "projection_prng_key": 3, "target_modules": ["q_proj", "down_proj"]})


def change_config(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@FORMS
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_saved_adapter_comes_back(save_projection, safe, low, make, tmp_path):
    targets = ["q_proj", "down_proj"] if make is tiny_llama else ["c_attn"]
    model = adapted(make(), target_modules=targets, save_projection=save_projection)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    again = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(outputs(again), outputs(model))
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    trained = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, _ in trained.named_parameters() if "vera_lambda" in n
    }


@FORMS
def test_the_file_has_the_documented_keys_shapes_and_dtypes_and_the_count_is_its_size(save_projection, tmp_path):
    changes = {"layers_to_transform": 0, "save_projection": save_projection, "modules_to_save": ["lm_head"]}
    base = tiny_llama().to(torch.bfloat16)
    config = VeraConfig(r=6, target_modules=["q_proj", "down_proj"], **changes)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    layer = "base_model.model.model.layers.0"
    found = {key: (tuple(t.shape), t.dtype) for key, t in load_file(tmp_path / WEIGHTS).items()}
    projections = {A: ((6, 96), torch.float32), B: ((64, 6), torch.float32)}
    assert found == {
        f"{layer}.self_attn.q_proj.vera_lambda_b": ((64,), torch.bfloat16),
        f"{layer}.self_attn.q_proj.vera_lambda_d": ((6,), torch.bfloat16),
        f"{layer}.mlp.down_proj.vera_lambda_b": ((64,), torch.bfloat16),
        f"{layer}.mlp.down_proj.vera_lambda_d": ((6,), torch.bfloat16),
        "base_model.model.lm_head.weight": ((48, 64), torch.bfloat16),
    } | (projections if save_projection else {})
    assert sum(model.get_nb_savable_parameters()) == size_on_disk(tmp_path / WEIGHTS) // 4


@FORMS
def test_a_state_dict_may_stand_for_the_model_with_or_without_its_buffers(save_projection, tmp_path):
    model = adapted(save_projection=save_projection)
    assert any("vera_A" in name for name in model.state_dict()) == save_projection
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(model)
    enlarge(model, seed=9)
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)
    state = {key: value for key, value in state.items() if "lambda_d" not in key}
    with pytest.raises(ValueError, match=r"`state_dict` lacks .*vera_lambda_d"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_adapters_of_both_forms_go_into_folders_of_their_names_and_come_back(tmp_path):
    model = adapted()
    model.add_adapter("light", VeraConfig(r=2, target_modules=["k_proj"], save_projection=False))
    enlarge(model)
    expected = {}
    for name in ("default", "light"):
        model.set_adapter(name)
        expected[name] = outputs(model)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", WEIGHTS, "light"]
    assert "VeRA adapter" in (tmp_path / "light" / "README.md").read_text()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "light", "light")
    again.load_adapter(tmp_path, "default")
    for name, output in expected.items():
        again.set_adapter(name)
        assert torch.equal(outputs(again), output)


@FORMS
def test_an_auto_class_loads_the_base_and_the_adapter(save_projection, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(tiny_llama(), task_type="CAUSAL_LM", save_projection=save_projection)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(again), outputs(model))


def test_projections_that_should_be_in_the_file_are_missed_by_name_with_a_way_out(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: (tensors.pop(A), tensors.pop(B)))
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match=f"missing {A}, {B}.*`save_projection`.*`projection_prng_key` = 3"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    change_config(tmp_path, save_projection=False)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(model))


@FORMS
@pytest.mark.parametrize("key", [A, B])
def test_one_projection_without_the_other_is_refused_by_name(key, save_projection, tmp_path):
    adapted().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(key))
    change_config(tmp_path, save_projection=save_projection)
    with pytest.raises(AdapterFileError, match=f"missing {key}[^,]"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("same", [True, False], ids=["the key's", "others"])
def test_projections_in_a_file_that_should_have_none_are_used_and_not_lost(same, tmp_path):
    model = adapted()
    if not same:
        model.base_model.vera_A["default"] = model.base_model.vera_A["default"] * 0.5
    model.save_pretrained(tmp_path / "one")
    change_config(tmp_path / "one", save_projection=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one")
    assert [str(w.message) for w in said if "does not give" in str(w.message)] == [
        str(w.message) for w in said if not same
    ]
    assert [w.filename for w in said] == ([] if same else [__file__])
    assert torch.equal(outputs(again), outputs(model))
    assert again.peft_config["default"].save_projection is not same
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "two")), outputs(model))


def test_projections_that_the_key_does_not_give_cannot_be_left_out(tmp_path):
    model = adapted()
    config = model.peft_config["default"]
    config.save_projection = False
    model.save_pretrained(tmp_path / "light")
    assert A not in load_file(tmp_path / "light" / WEIGHTS)
    config.projection_prng_key = 4
    with pytest.raises(ValueError, match=r"`projection_prng_key` = 4 gives.*set `save_projection` to True"):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    config.save_projection = True
    model.save_pretrained(tmp_path / "kept")
    for name in ("light", "kept"):
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / name)), outputs(model))


def test_projections_larger_than_the_layers_read_are_cut_to_them(tmp_path):
    """As PEFT writes them for an adapter that came second, beside one with larger layers."""
    model = adapted(target_modules=["k_proj"])
    large = draw_projections(8, 6, 96, 64)
    for held, tensor in zip((model.base_model.vera_A, model.base_model.vera_B), large, strict=True):
        held["default"] = tensor
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert (again.base_model.vera_A["default"].shape, again.base_model.vera_B["default"].shape) == ((6, 64), (32, 6))


@pytest.mark.parametrize("form", [True, False], ids=["with", "without"])
def test_refilling_an_adapter_takes_the_files_projections_and_leaves_its_neighbours(form, tmp_path):
    adapted(projection_prng_key=11, save_projection=form).save_pretrained(tmp_path)
    expected = outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    model = adapted(save_projection=True)
    model.add_adapter("neighbour", VeraConfig(r=6, projection_prng_key=3, target_modules=["q_proj", "down_proj"]))
    enlarge(model, seed=5)
    model.set_adapter("neighbour")
    before = outputs(model)
    assert model.base_model.vera_A["default"] is model.base_model.vera_A["neighbour"]
    identities = {name: id(p) for name, p in model.named_parameters()}
    versions = [held["neighbour"]._version for held in (model.base_model.vera_A, model.base_model.vera_B)]
    model.load_adapter(tmp_path, "default")
    # Not even with the same values.
    assert versions == [held["neighbour"]._version for held in (model.base_model.vera_A, model.base_model.vera_B)]
    assert torch.equal(outputs(model), before)
    model.set_adapter("default")
    assert torch.equal(outputs(model), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")), expected)


BREAKS = {
    "missing": (lambda t: t.pop(next(k for k in t if "lambda_b" in k)), "missing .*vera_lambda_b"),
    "unknown": (lambda t: t.update({"base_model.vera_C": torch.zeros(2)}), "unknown base_model.vera_C"),
    "NaN scale": (lambda t: t[next(k for k in t if "lambda_d" in k)].fill_(torch.nan), "lambda_d: values that are not"),
    "NaN projection": (lambda t: t[A].fill_(torch.inf), "vera_A: values that are not finite"),
    "integers": (lambda t: t.update({B: t[B].long()}), "vera_B: dtype torch.int64"),
    "rank of A": (lambda t: t.update({A: t[A][:-1].clone()}), r"vera_A: shape \(5, 96\), \(6, 96\) is needed"),
    "rank of B": (lambda t: t.update({B: torch.cat([t[B], t[B]], 1)}), r"vera_B: shape \(64, 12\), \(64, 6\)"),
    "small A": (lambda t: t.update({A: t[A][:, :-1].clone()}), r"vera_A: shape \(6, 95\)"),
    "flat A": (lambda t: t.update({A: t[A].flatten()}), r"vera_A: shape \(576,\)"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_does_not_fit_is_refused_by_key_and_leaves_the_model(name, tmp_path):
    change, message = BREAKS[name]
    adapted().save_pretrained(tmp_path)
    change_tensors(tmp_path, change)
    model = adapted()
    before = snapshot(model)
    for adapter in ("default", "other"):
        with pytest.raises(AdapterFileError, match=message):
            model.load_adapter(tmp_path, adapter)
    assert_unchanged(model, before)
    assert list(model.base_model.vera_A) == ["default"]


@pytest.mark.parametrize(
    ("autocast", "low", "expected"),
    [(True, False, torch.float32), (False, False, torch.bfloat16), (False, True, torch.float16)],
)
def test_scales_are_loaded_in_the_dtype_asked_for_and_projections_in_float32(autocast, low, expected, tmp_path):
    adapted().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({key: t.half() for key, t in tensors.items()}))
    base = tiny_llama().to(torch.bfloat16)
    model = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low)
    assert {p.dtype for name, p in model.named_parameters() if "vera_" in name} == {expected}
    assert model.base_model.vera_A["default"].dtype == torch.float32


def test_an_adapter_without_values_is_filled_by_a_loader(tmp_path):
    model = adapted(save_projection=False)
    model.save_pretrained(tmp_path)
    config = VeraConfig.from_pretrained(tmp_path)
    empty = get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    assert empty.base_model.vera_A["default"].is_meta
    with pytest.raises(ValueError, match="no values yet"):
        empty.save_pretrained(tmp_path / "empty")
    empty.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(empty), outputs(model))


def test_refilling_from_a_file_of_another_key_takes_the_key_over(tmp_path, recwarn):
    other = adapted(projection_prng_key=7, save_projection=False)
    other.save_pretrained(tmp_path / "other")
    model = adapted(save_projection=False)
    recwarn.clear()
    model.load_adapter(tmp_path / "other", "default")
    assert not recwarn.list
    assert torch.equal(outputs(model), outputs(other))
    config = model.peft_config["default"]
    assert (config.projection_prng_key, config.save_projection) == (7, False)
    model.save_pretrained(tmp_path / "again")
    assert size_on_disk(tmp_path / "again" / WEIGHTS) == size_on_disk(tmp_path / "other" / WEIGHTS)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    assert torch.equal(outputs(again), outputs(other))
