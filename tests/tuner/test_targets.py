"""Which modules are adapted; what cannot be is refused by name, before the model is touched."""

import pytest
import torch
from torch import nn

from tests.models import assert_unchanged, outputs, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from vblora_triton import VBLoRAConfig, get_peft_model

FIELDS = {"r": 2, "num_vectors": 6, "vector_length": 16}


def targeted(model, **changes) -> list[str]:
    return get_peft_model(model, VBLoRAConfig(**FIELDS, **changes)).targeted_module_names


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ({"target_modules": ["proj"]}, None),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, ["model.layers.1.self_attn.q_proj"]),
        ({"target_modules": r"model\.layers\.1\..*q_proj"}, ["model.layers.1.self_attn.q_proj"]),
        ({"target_modules": "q_proj"}, None),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, ["model.layers.0.self_attn.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 5]}, ["model.layers.0.self_attn.q_proj"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
            ["model.layers.1.self_attn.q_proj"],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "blocks"}, None),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
            ["model.layers.1.self_attn.q_proj"],
        ),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["self_attn"]}, ["lm_head"]),
    ],
    ids=str,
)
def test_names_match_whole_or_after_a_dot(changes, expected):
    if expected is None:
        with pytest.raises(ValueError, match="`target_modules`"):
            targeted(tiny_llama(), **changes)
    else:
        assert targeted(tiny_llama(), **changes) == expected


@pytest.mark.parametrize("word", ["all-linear", "ALL-linear"])
@pytest.mark.parametrize(("make", "count", "head"), [(tiny_llama, 14, "lm_head"), (tiny_gpt2, 8, "lm_head")])
def test_all_linear_is_everything_but_the_head(word, make, count, head):
    names = targeted(make(), target_modules=word)
    assert len(names) == count
    assert head not in names


def test_all_linear_leaves_a_classifiers_head_where_the_task_says_that_there_is_one():
    names = targeted(tiny_bert(), target_modules="all-linear", task_type="SEQ_CLS")
    assert "classifier" not in names
    assert "bert.pooler.dense" in names


def test_an_unknown_architecture_needs_targets():
    with pytest.raises(ValueError, match="`target_modules` is None"):
        targeted(nn.Sequential(nn.Linear(16, 16)))


def test_a_plain_module_can_be_adapted():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    adapter = get_peft_model(model, VBLoRAConfig(**FIELDS, target_modules=["0", "2"]))
    assert adapter(torch.randn(3, 16)).shape == (3, 16)
    assert adapter.targeted_module_names == ["0", "2"]


def test_layers_are_counted_by_the_first_number_not_by_that_of_an_expert():
    def layer():
        return nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w": nn.Linear(16, 16)}) for _ in "ab")})

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in "ab")})})
    names = targeted(model, target_modules=["w"], layers_to_transform=1)
    assert names == ["model.layers.1.experts.0.w", "model.layers.1.experts.1.w"]


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.convolution = nn.Conv2d(16, 16, 1)
        self.embedding = nn.Embedding(16, 16)
        self.fc = nn.Linear(16, 16)


@pytest.mark.parametrize("name", ["attention.out_proj", "convolution", "embedding", "attention"])
@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_a_target_that_cannot_work_is_refused_by_name(name, error):
    model = WithAttention()
    before = snapshot(model)
    with pytest.raises(error, match=name):
        targeted(model, target_modules=["fc", name])
    assert_unchanged(model, before)


def test_all_linear_takes_only_layers_that_are_called():
    assert targeted(WithAttention(), target_modules="all-linear") == ["fc"]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["nothing"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*"},
        {"target_modules": ["q_proj"], "vector_length": 24},
        {"target_modules": "all-linear", "vector_length": 24},
        {"target_modules": ["q_proj", "down_proj"], "vector_length": 64},
        {"target_modules": ["q_proj"], "modules_to_save": ["no_such_module"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("second", [False, True], ids=["get_peft_model", "add_adapter"])
def test_a_failed_call_leaves_model_and_config_bit_for_bit_as_they_were(changes, second):
    model = tiny_llama()
    adapter = get_peft_model(model, VBLoRAConfig(**FIELDS, target_modules=["v_proj"])) if second else None
    config = VBLoRAConfig(**FIELDS | changes)
    whole = adapter or model
    before, fields, result = snapshot(whole), config.to_dict(), outputs(whole)
    with pytest.raises(ValueError, match="`"):
        adapter.add_adapter("second", config) if second else get_peft_model(model, config)
    assert_unchanged(whole, before)
    assert config.to_dict() == fields
    assert torch.equal(outputs(whole), result)
    if second:
        assert list(adapter.peft_config) == ["default"]


@pytest.mark.parametrize("second", [False, True], ids=["get_peft_model", "add_adapter"])
def test_a_failure_in_the_middle_of_it_is_undone(second, monkeypatch):
    from vblora_triton.vblora.layer import VBLoRALayer

    model = tiny_llama()
    first = VBLoRAConfig(**FIELDS, target_modules=["v_proj"])
    whole = get_peft_model(model, first) if second else model
    before, update, calls = snapshot(whole), VBLoRALayer.update_layer, []

    def fail_at_the_third(self, *arguments, **keywords):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        update(self, *arguments, **keywords)

    monkeypatch.setattr(VBLoRALayer, "update_layer", fail_at_the_third)
    config = VBLoRAConfig(**FIELDS, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    random = torch.get_rng_state()
    with pytest.raises(MemoryError):
        whole.add_adapter("second", config) if second else get_peft_model(model, config)
    torch.set_rng_state(random)
    assert_unchanged(whole, before)
