"""Heads and biases that are trained beside the adapter."""

import pytest
import torch
from torch import nn

from tests.models import outputs, some_ids, tiny_bert, tiny_llama, tiny_opt
from tests.test_peft_model import FIELDS, adapted, config
from vblora_triton import VBLoRAConfig, get_peft_model


def test_modules_to_save_are_trained_per_adapter_and_the_original_kept():
    model = adapted(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    assert model.modules_to_save == {"lm_head"}
    assert head.weight.requires_grad
    with torch.no_grad():
        head.modules_to_save["default"].weight.zero_()
    assert outputs(model).abs().max() == 0
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(tiny_llama()))
    model.add_adapter("other", config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head"):
        model.set_adapter(["default", "other"])
    model.set_adapter("other")
    assert outputs(model).abs().max() > 0
    with torch.no_grad():
        head.modules_to_save["other"].weight.fill_(1.0)
    assert outputs(model).std(-1).max() < 1e-5
    model.set_adapter("default")
    plain = model.merge_and_unload()
    assert isinstance(plain.lm_head, nn.Linear)
    assert outputs(plain).abs().max() == 0


def test_a_name_in_modules_to_save_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="'no_head'"):
        get_peft_model(tiny_llama(), config(modules_to_save=["no_head"]))


def test_a_classifiers_head_is_trained_with_the_task():
    fields = FIELDS | {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_bert(), VBLoRAConfig(**fields))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "vblora_" not in name}
    whole = "base_model.model.classifier.modules_to_save.default"
    assert trained == {f"{whole}.weight", f"{whole}.bias"}
    assert model(input_ids=some_ids(), labels=torch.tensor([0, 2])).loss.requires_grad


@pytest.mark.parametrize("bias", ["none", "all", "vblora_only"])
def test_bias_says_which_biases_are_trained(bias):
    model = get_peft_model(tiny_opt(), config(bias=bias))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    own = {name for name in every if "q_proj" in name or "v_proj" in name}
    assert trained == {"none": set(), "all": every, "vblora_only": own}[bias]
    model.add_adapter("other", config())
    model.set_adapter("other")
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))


def test_two_adapters_cannot_train_the_same_biases():
    model = get_peft_model(tiny_opt(), config(bias="all"))
    with pytest.raises(ValueError, match="`bias`"):
        model.add_adapter("other", config(bias="vblora_only"))
    assert list(model.peft_config) == ["default"]
