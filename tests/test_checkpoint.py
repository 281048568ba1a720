"""Adapter files: both forms come back, and what does not fit is refused with the model as it was."""

import json
import os
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models import adapted_by, assert_unchanged, enlarge, outputs, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from vblora_triton import AdapterFileError, PeftModel, VBLoRAConfig, get_peft_model

FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16, "topk": 3}
WEIGHTS = "adapter_model.safetensors"


adapted = partial(adapted_by, VBLoRAConfig, {"target_modules": ["q_proj", "v_proj"]} | FIELDS)


def size_on_disk(path) -> int:
    """Bytes of the tensors, without the header."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return os.path.getsize(path) - 8 - header


@pytest.mark.parametrize("only_topk", [False, True], ids=["full", "topk"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_saved_adapter_comes_back(only_topk, safe, make, tmp_path):
    targets = ["q_proj", "down_proj"] if make is tiny_llama else ["c_attn"]
    model = adapted(make(), target_modules=targets, save_only_topk_weights=only_topk)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    again = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6 if only_topk else 0)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_the_file_has_the_documented_keys_shapes_and_metadata(tmp_path):
    adapted(layers_to_transform=0).save_pretrained(tmp_path)
    layer = "base_model.model.model.layers.0.self_attn"
    found = {key: (tuple(t.shape), t.dtype) for key, t in load_file(tmp_path / WEIGHTS).items()}
    assert found == {
        f"{layer}.q_proj.vblora_logits_A": ((3, 4, 10), torch.float32),
        f"{layer}.q_proj.vblora_logits_B": ((4, 3, 10), torch.float32),
        f"{layer}.v_proj.vblora_logits_A": ((3, 4, 10), torch.float32),
        f"{layer}.v_proj.vblora_logits_B": ((2, 3, 10), torch.float32),
        "base_model.vblora_vector_bank": ((10, 16), torch.float32),
    }
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", WEIGHTS]


def test_topk_weights_are_the_softmax_without_its_last_entry(tmp_path):
    model = adapted(save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, layer in model.base_model.adapted_layers():
        logits = layer.vblora_logits_A["default"].double()
        values, indices = logits.topk(3)
        key = f"base_model.model.{name}.vblora_logits_A"
        assert torch.equal(tensors[f"{key}_topk_indices"].long(), indices)
        torch.testing.assert_close(tensors[f"{key}_topk_weights"], values.softmax(-1)[..., :2].float())


@pytest.mark.parametrize("only_topk", [False, True], ids=["full", "topk"])
@pytest.mark.parametrize("num_vectors", [10, 255, 256, 40_000])
def test_savable_parameters_are_the_bytes_on_disk_over_four(only_topk, num_vectors, tmp_path):
    changes = {"num_vectors": num_vectors, "save_only_topk_weights": only_topk, "layers_to_transform": 0}
    model = adapted(**changes, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    assert sum(model.get_nb_savable_parameters()) == size_on_disk(tmp_path / WEIGHTS) // 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_topk_file_of_a_half_precision_adapter_loads(dtype, tmp_path):
    config = VBLoRAConfig(**FIELDS, target_modules=["q_proj"], save_only_topk_weights=True)
    model = enlarge(get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=False)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path, autocast_adapter_dtype=False)
    assert again.base_model.vblora_vector_bank["default"].dtype == dtype
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0.05, atol=0.05)


def test_half_precision_topk_weights_of_another_writer_load(tmp_path):
    model = adapted(save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    halved = {key: t.to(torch.bfloat16) if "weights" in key else t for key, t in tensors.items()}
    save_file(halved, tmp_path / WEIGHTS)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0.05)


def test_a_nearly_one_hot_adapter_comes_back_from_its_topk_file(tmp_path):
    model = adapted(save_only_topk_weights=True)
    with torch.no_grad():
        for _, layer in model.base_model.adapted_layers():
            layer.vblora_logits_A["default"].mul_(100)
            layer.vblora_logits_B["default"].mul_(100)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.isfinite(outputs(again)).all()
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("autocast", "low", "expected"),
    [
        (True, False, torch.float32),
        (True, True, torch.float32),
        (False, False, torch.bfloat16),
        (False, True, torch.float16),
    ],
)
def test_the_dtype_of_a_loaded_adapter(autocast, low, expected, tmp_path):
    adapted().save_pretrained(tmp_path)
    save_file({key: t.half() for key, t in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    base = tiny_llama().to(torch.bfloat16)
    model = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low)
    assert {p.dtype for name, p in model.named_parameters() if "vblora_" in name} == {expected}


def test_adapters_go_into_folders_of_their_names(tmp_path):
    model = adapted()
    model.add_adapter("other", VBLoRAConfig(**FIELDS | {"num_vectors": 5}, target_modules=["v_proj", "up_proj"]))
    enlarge(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / WEIGHTS).is_file()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert again.load_adapter(tmp_path, "other", subfolder="other") == ([], [])
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(outputs(again), outputs(model))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert os.listdir(tmp_path / "one") == ["other"]


def test_loading_under_a_name_that_is_there_keeps_the_parameters_themselves(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    expected, parameters = outputs(model), list(model.parameters())
    enlarge(model, seed=9)
    assert not torch.equal(outputs(model), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(outputs(model), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_training_goes_on_where_it_stopped(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}
    ids = torch.arange(7)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path):
    model = adapted()
    state = {key: t.clone() for key, t in model.state_dict().items()}
    expected = outputs(model)
    enlarge(model, seed=9)
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)
    with pytest.raises(ValueError, match="`state_dict` lacks"):
        model.save_pretrained(tmp_path, state_dict={})


def test_parameters_that_share_their_memory_are_saved_each(tmp_path):
    model = adapted()
    state = model.state_dict()
    names = [f"base_model.model.model.layers.{n}.self_attn.q_proj.vblora_logits_A.default" for n in (0, 1)]
    one = state[names[0]].clone()
    model.save_pretrained(tmp_path, state_dict=state | dict.fromkeys(names, one))
    tensors = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(tensors[name.removesuffix(".default")], one) for name in names)


def test_another_process_writes_nothing(tmp_path):
    adapted().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_the_other_kind_of_weights_does_not_stay_behind(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    enlarge(model, seed=9)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path)), outputs(model))


def test_a_write_that_fails_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    enlarge(model, seed=9)

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("vblora_triton.checkpoint.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", WEIGHTS]
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


def test_a_model_card_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    adapted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


LOGITS = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"
BANK = "base_model.vblora_vector_bank"


def changed(key, change):
    return lambda tensors: tensors | {key: change(tensors[key].clone())}


def filled(value):
    def change(tensor):
        tensor[0, 0] = value
        return tensor

    return change


FULL = {
    "no-bank": (lambda t: {k: v for k, v in t.items() if k != BANK}, ["missing", BANK]),
    "no-logits": (lambda t: {k: v for k, v in t.items() if k != LOGITS}, ["missing", LOGITS]),
    "empty": (lambda t: {}, ["missing", BANK, LOGITS]),
    "unknown-key": (lambda t: t | {"base_model.model.stranger": torch.zeros(2)}, ["unknown", "stranger"]),
    "another-shape": (changed(LOGITS, lambda t: t[:, :, :4].contiguous()), [LOGITS, "(3, 4, 4)", "(3, 4, 10)"]),
    "transposed-bank": (changed(BANK, lambda t: t.T.contiguous()), [BANK, "(16, 10)"]),
    "nan-bank": (changed(BANK, filled(float("nan"))), [BANK, "finite"]),
    "infinite-bank": (changed(BANK, filled(float("inf"))), [BANK, "finite"]),
    "nan-logits": (changed(LOGITS, filled(float("nan"))), [LOGITS, "NaN"]),
    "infinite-logits": (changed(LOGITS, filled(float("inf"))), [LOGITS, "infinite"]),
    "row-without-logits": (changed(LOGITS, filled(-float("inf"))), [LOGITS, "infinite"]),
    "integers": (changed(BANK, lambda t: t.long()), [BANK, "int64"]),
    "two-faults": (lambda t: {LOGITS: t[LOGITS] * float("nan")}, ["missing", BANK, LOGITS, "NaN"]),
    "both-forms": (lambda t: t | {f"{LOGITS}_topk_indices": torch.zeros(3, 4, 3).long()}, ["unknown", "_topk_indices"]),
}
INDICES, TOPK = f"{LOGITS}_topk_indices", f"{LOGITS}_topk_weights"
SMALL = {
    "index-out-of-range": (changed(INDICES, filled(10)), [LOGITS, "10", "0 to 9"]),
    "same-index-twice": (changed(INDICES, filled(4)), [LOGITS, "twice"]),
    "nan-weights": (changed(TOPK, filled(float("nan"))), [LOGITS, "finite"]),
    "weights-above-one": (changed(TOPK, filled(0.9)), [LOGITS, "more than 1"]),
    "no-indices": (lambda t: {k: v for k, v in t.items() if k != INDICES}, [LOGITS, "weights only"]),
    "no-weights": (lambda t: {k: v for k, v in t.items() if k != TOPK}, [LOGITS, "indices only"]),
    "another-k": (changed(INDICES, lambda t: t[..., :2].contiguous()), [LOGITS, "(3, 4, 2)"]),
    "more-rows": (changed(INDICES, lambda t: t.repeat(9, 1, 1)), [LOGITS, "(27, 4, 3)"]),
    "floating-indices": (changed(INDICES, lambda t: t.float()), [LOGITS, "dtype"]),
    "no-bank": (lambda t: {k: v for k, v in t.items() if k != BANK}, ["missing", BANK]),
}
FAULTS = [
    pytest.param(only_topk, *fault, id=f"{'topk' if only_topk else 'full'}-{name}")
    for only_topk, faults in ((False, FULL), (True, SMALL))
    for name, fault in faults.items()
]


@pytest.mark.parametrize(("only_topk", "change", "words"), FAULTS)
@pytest.mark.parametrize("way", ["from_pretrained", "new", "existing"])
def test_a_file_that_does_not_fit_is_refused_in_one_error_and_the_model_kept(way, only_topk, change, words, tmp_path):
    saved = adapted(save_only_topk_weights=only_topk)
    saved.save_pretrained(tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    model = tiny_llama() if way == "from_pretrained" else adapted()
    before, result = snapshot(model), outputs(model)
    names = {"new": "other", "existing": "default"}
    with pytest.raises(AdapterFileError) as caught:
        model.load_adapter(tmp_path, names[way]) if way in names else PeftModel.from_pretrained(model, tmp_path)
    for word in [*words, str(tmp_path / WEIGHTS)]:
        assert word in str(caught.value)
    assert str(caught.value).count(f"{LOGITS}:") <= 1
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), result)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, b'{"a": 1}', None], ids=str)
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_a_file_that_cannot_be_read_is_refused_by_name(content, name, tmp_path):
    adapted().save_pretrained(tmp_path, safe_serialization=name == WEIGHTS)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(AdapterFileError, match=name):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_bin_file_that_runs_code_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"x": Harm(str(tmp_path / "harmed"))}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not (tmp_path / "harmed").exists()


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_folder_without_weights_is_refused_by_name(tmp_path):
    adapted().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=WEIGHTS):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_config_of_giant_sizes_costs_no_memory(tmp_path):
    adapted(save_only_topk_weights=True).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"num_vectors": 2**40}))
    with pytest.raises(AdapterFileError, match="vector_bank"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_the_form_is_known_from_the_keys_not_from_the_config(tmp_path):
    model = adapted(save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"save_only_topk_weights": False}))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="saved in full"):
        again.save_pretrained(tmp_path / "again")


def test_a_topk_adapter_runs_merges_switches_and_is_saved_again_in_train_mode(tmp_path):
    model = adapted(save_only_topk_weights=True)
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first").train()
    own = outputs(again)
    torch.testing.assert_close(own, outputs(model), rtol=0, atol=2e-6)
    again.merge_adapter(safe_merge=True)
    torch.testing.assert_close(outputs(again), own, rtol=1e-5, atol=1e-5)
    again.unmerge_adapter()
    again.add_adapter("other", VBLoRAConfig(**FIELDS, target_modules=["q_proj"]))
    again.set_adapter("other")
    again.set_adapter("default")
    assert not any(p.requires_grad for name, p in again.named_parameters() if name.endswith(".default"))
    again.save_pretrained(tmp_path / "second", selected_adapters=["default"])
    third = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
    torch.testing.assert_close(outputs(third), own, rtol=0, atol=2e-6)


def test_training_a_topk_adapter_is_refused_when_it_is_asked_for(tmp_path):
    adapted(save_only_topk_weights=True).save_pretrained(tmp_path)
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match="`is_trainable`"):
        PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_unchanged(base, before)
    model = PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match="top-k"):
        model.set_requires_grad("default")
    assert not any(p.requires_grad for p in model.parameters())


def test_an_adapter_that_is_filled_from_a_topk_file_stops_training(tmp_path):
    adapted(save_only_topk_weights=True).save_pretrained(tmp_path)
    model = adapted()
    assert any(p.requires_grad for p in model.parameters())
    model.load_adapter(tmp_path, "default")
    assert not any(p.requires_grad for p in model.parameters())


def test_biases_keep_their_names_when_other_adapters_wrap_their_layers(tmp_path):
    fields = FIELDS | {"target_modules": ["query"], "bias": "all"}
    model = get_peft_model(tiny_bert(), VBLoRAConfig(**fields))
    model.add_adapter("other", VBLoRAConfig(**FIELDS, target_modules=["key"]))
    enlarge(model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert torch.equal(outputs(again), outputs(model))
