"""What values a file brings: each arrives as it was saved, or is refused by name before the model is touched."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import adapted_by, assert_unchanged, enlarge, outputs, snapshot, tiny_bert, tiny_llama
from vblora_triton import AdapterFileError, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METHODS = {
    "vblora": partial(VBLoRAConfig, r=3, num_vectors=10, vector_length=16),
    "vera": partial(VeraConfig, r=4),
}
LLAMA = {"target_modules": ["q_proj"]}
VBLORA = partial(adapted_by, METHODS["vblora"], LLAMA)
LOGITS = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"


@pytest.fixture(params=METHODS)
def make_config(request):
    return METHODS[request.param]


def rewrite(folder, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def refused(load, model, *words) -> None:
    before = snapshot(model)
    with pytest.raises(AdapterFileError) as caught:
        load()
    assert_unchanged(model, before)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [1e300, -1e300, 1e39])
@pytest.mark.parametrize("key", [LOGITS, "base_model.vblora_vector_bank"], ids=["logits", "bank"])
def test_values_that_float32_cannot_hold_are_refused(key, value, tmp_path):
    VBLORA().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {key: torch.full(tensors[key].shape, value, dtype=torch.float64)})
    base, model = tiny_llama(), VBLORA(seed=1)
    refused(lambda: PeftModel.from_pretrained(base, tmp_path), base, key, "float32")
    refused(lambda: model.load_adapter(tmp_path, "default"), model, key, "float32")
    refused(lambda: model.load_adapter(tmp_path, "new"), model, key, "float32")


def test_values_that_the_dtype_in_the_model_cannot_hold_are_refused(tmp_path):
    VBLORA(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {LOGITS: torch.full_like(tensors[LOGITS], 1e5)})
    base = tiny_llama().half()
    load = partial(PeftModel.from_pretrained, base, tmp_path)
    refused(partial(load, autocast_adapter_dtype=False), base, LOGITS, "float16", "100000")
    load()
    head = "base_model.model.lm_head.weight"
    rewrite(tmp_path, lambda tensors: tensors | {head: torch.full(tensors[head].shape, 1e5)})
    base = tiny_llama().half()
    refused(lambda: PeftModel.from_pretrained(base, tmp_path), base, head, "float16")


def test_whole_numbers_for_a_module_that_is_saved_whole_are_refused(make_config, tmp_path):
    model = adapted_by(make_config, LLAMA, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    head = "base_model.model.lm_head.weight"
    rewrite(tmp_path, lambda tensors: tensors | {head: tensors[head].long()})
    base = tiny_llama()
    refused(lambda: PeftModel.from_pretrained(base, tmp_path), base, head, "int64")
    refused(lambda: model.load_adapter(tmp_path, "default"), model, head, "int64")


def test_counters_of_a_module_that_is_saved_whole_come_back(make_config, tmp_path):
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16))

    model = get_peft_model(base(), make_config(target_modules=["0"], modules_to_save=["1"]))
    model(torch.randn(4, 16))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    counter = "base_model.model.1.modules_to_save.default.num_batches_tracked"
    assert again.state_dict()[counter] == model.state_dict()[counter] == 1


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_adapters_in_float64_come_back_to_the_last_digit(safe, make_config, tmp_path):
    model = enlarge(get_peft_model(tiny_llama().double(), make_config(**LLAMA), autocast_adapter_dtype=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float64
                parameter.add_(1e-12 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path, safe_serialization=safe)
    for options in ({}, {"autocast_adapter_dtype": False}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(tiny_llama().double(), tmp_path, **options)
        for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other), name
        assert torch.equal(outputs(again), outputs(model))


def test_a_base_on_meta_takes_the_modules_of_the_file(make_config, tmp_path):
    config = partial(make_config, target_modules=["query"], modules_to_save=["classifier"], bias="all")
    model = adapted_by(config, {}, tiny_bert())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "first")
    with torch.device("meta"):
        base = tiny_bert()
    again = PeftModel.from_pretrained(base, tmp_path / "first")
    own = again.base_model.adapter_tensors("default")
    assert own.keys() == load_file(tmp_path / "first" / WEIGHTS).keys()
    for key, tensor in load_file(tmp_path / "first" / WEIGHTS).items():
        assert torch.equal(own[key], tensor), key


def test_a_file_of_another_topk_does_not_refill_an_adapter(tmp_path):
    # Its logits mean something else; the shapes are the same.
    VBLORA(topk=3).save_pretrained(tmp_path)
    model = VBLORA(topk=2, seed=1)
    refused(lambda: model.load_adapter(tmp_path, "default"), model, "`topk`", "3", "2", CONFIG)
    model.load_adapter(tmp_path, "new")
    model.set_adapter("new")
    assert torch.equal(outputs(model), outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path)))


@pytest.mark.parametrize("value", ["false", 0, 1, None, []])
def test_whether_only_the_top_k_are_saved_is_said_by_true_or_false(value, tmp_path):
    with pytest.raises(TypeError, match="save_only_topk_weights"):
        VBLoRAConfig(save_only_topk_weights=value)
    model = VBLORA()
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].save_only_topk_weights = value
    with pytest.raises(TypeError, match="save_only_topk_weights"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()
    values = json.loads((tmp_path / "before" / CONFIG).read_text())
    (tmp_path / "before" / CONFIG).write_text(json.dumps(values | {"save_only_topk_weights": value}))
    base = tiny_llama()
    refused(lambda: PeftModel.from_pretrained(base, tmp_path / "before"), base, "save_only_topk_weights", CONFIG)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_tensors_of_8_bits_are_refused_by_name(dtype, make_config, tmp_path):
    model = adapted_by(make_config, LLAMA)
    model.save_pretrained(tmp_path)
    key = next(iter(load_file(tmp_path / WEIGHTS)))
    rewrite(tmp_path, lambda tensors: tensors | {key: tensors[key].clamp(-1, 1).to(dtype)})
    refused(lambda: model.load_adapter(tmp_path, "default"), model, key, str(dtype), WEIGHTS)
