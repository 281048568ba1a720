"""VBLoRAConfig refuses what cannot be, by name, when it is made."""

import pytest

from vblora_triton import PeftType, TaskType, VBLoRAConfig


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"r": 0}, ValueError, ["`r`", "0", "at least 1"]),
        ({"r": True}, TypeError, ["`r`", "True"]),
        ({"r": 4.0}, TypeError, ["`r`", "4.0"]),
        ({"num_vectors": -1}, ValueError, ["`num_vectors`", "-1"]),
        ({"vector_length": "256"}, TypeError, ["`vector_length`", "'256'"]),
        ({"topk": 0}, ValueError, ["`topk`", "0"]),
        ({"topk": 5, "num_vectors": 4}, ValueError, ["`topk`", "5", "4"]),
        ({"vblora_dropout": 1.5}, ValueError, ["`vblora_dropout`", "1.5"]),
        ({"vblora_dropout": float("nan")}, ValueError, ["`vblora_dropout`", "nan"]),
        ({"vblora_dropout": "0.1"}, TypeError, ["`vblora_dropout`"]),
        ({"init_vector_bank_bound": 0}, ValueError, ["`init_vector_bank_bound`", "above 0"]),
        ({"init_logits_std": -0.1}, ValueError, ["`init_logits_std`", "-0.1"]),
        ({"init_logits_std": float("inf")}, ValueError, ["`init_logits_std`"]),
        ({"bias": "lora_only"}, ValueError, ["`bias`", "'lora_only'", "'vblora_only'"]),
        ({"task_type": "CAUSAL"}, ValueError, ["`task_type`", "'CAUSAL_LM'"]),
        ({"peft_type": "LORA"}, ValueError, ["`peft_type`", "'LORA'", "'VBLORA'"]),
        ({"target_modules": 3}, TypeError, ["`target_modules`", "3"]),
        ({"target_modules": ["q", 1]}, TypeError, ["`target_modules`"]),
        ({"target_modules": "(q"}, ValueError, ["`target_modules`", "'(q'"]),
        ({"exclude_modules": "[q"}, ValueError, ["`exclude_modules`"]),
        ({"modules_to_save": "head"}, TypeError, ["`modules_to_save`", "'head'"]),
        ({"layers_pattern": "layers"}, ValueError, ["`layers_pattern`", "`layers_to_transform`"]),
        ({"layers_to_transform": -1}, ValueError, ["`layers_to_transform`", "-1"]),
        ({"layers_to_transform": "1"}, TypeError, ["`layers_to_transform`"]),
        ({"layers_to_transform": [0], "layers_pattern": "("}, ValueError, ["`layers_pattern`"]),
        (
            {"layers_to_transform": 1, "target_modules": ".*q"},
            ValueError,
            ["`layers_to_transform`", "`target_modules`"],
        ),
    ],
    ids=str,
)
def test_a_bad_field_is_refused_by_name(fields, error, words):
    with pytest.raises(error) as caught:
        VBLoRAConfig(**fields)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("layers", [0, [0], [3, 1]])
def test_layer_zero_is_a_layer(layers):
    config = VBLoRAConfig(target_modules=["q"], layers_to_transform=layers, layers_pattern="layers")
    assert config.layers_to_transform == layers


def test_the_ends_of_the_ranges_are_inside():
    config = VBLoRAConfig(r=1, num_vectors=1, vector_length=1, topk=1, vblora_dropout=1.0, init_logits_std=0)
    assert (config.r, config.topk, config.vblora_dropout) == (1, 1, 1.0)


def test_names_become_a_set_and_types_their_enums():
    config = VBLoRAConfig("SEQ_CLS", target_modules=["q", "v", "q"], exclude_modules=("k",), modules_to_save=["a", "a"])
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"k"}
    assert config.modules_to_save == ["a"]
    assert config.task_type is TaskType.SEQ_CLS
    assert config.peft_type is PeftType.VBLORA
