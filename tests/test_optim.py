"""Optimizer groups: every trainable parameter in one, at its own rate."""

import pytest
import torch
from torch import nn

from vblora_triton.optim import parameter_groups
from vblora_triton.peft_model import get_peft_model
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vera.config import VeraConfig


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.inner(x))


@pytest.fixture
def model():
    config = VBLoRAConfig(
        r=2, num_vectors=5, vector_length=4, target_modules=["inner"], bias="vblora_only", modules_to_save=["head"]
    )
    return get_peft_model(_Net(), config)


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    grouped = [id(parameter) for group in parameter_groups(model) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_groups_hold_what_their_names_say_at_their_own_rates(model):
    groups = {
        g["name"]: g for g in parameter_groups(model, lr=0.1, vector_bank_lr=0.2, logits_lr=0.3, weight_decay=0.5)
    }
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "vector_bank": (0.2, 0.5),
        "logits": (0.3, 0.5),
        "other": (0.1, 0.5),
        "other_no_decay": (0.1, 0.0),
    }
    shapes = {name: sorted(tuple(p.shape) for p in group["params"]) for name, group in groups.items()}
    assert shapes == {
        "vector_bank": [(5, 4)],
        "logits": [(2, 2, 5), (2, 2, 5)],
        "other": [(4, 8)],  # the head's copy
        "other_no_decay": [(4,), (8,)],  # the head's bias and the adapted layer's
    }


def test_rates_are_the_papers_and_the_optimizers_own_where_none_are_given(model):
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.7)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"vector_bank": 1e-3, "logits": 1e-2, "other": 0.7, "other_no_decay": 0.7}


def test_veras_scales_are_a_group_of_their_own():
    config = VeraConfig(r=3, target_modules=["inner"], bias="vera_only", modules_to_save=["head"])
    groups = {g["name"]: g for g in parameter_groups(get_peft_model(_Net(), config), weight_decay=0.5)}
    assert list(groups) == ["lambda", "other", "other_no_decay"]
    assert sorted(tuple(p.shape) for p in groups["lambda"]["params"]) == [(3,), (8,)]
    assert (groups["lambda"]["lr"], groups["lambda"]["weight_decay"]) == (4e-3, 0.5)
    groups = parameter_groups(get_peft_model(_Net(), VeraConfig(r=3, target_modules=["inner"])), lambda_lr=0.2)
    assert [(g["name"], g["lr"]) for g in groups] == [("lambda", 0.2)]


def test_an_adapter_named_like_a_parameter_does_not_confuse_the_groups():
    config = VBLoRAConfig(r=2, num_vectors=5, vector_length=4, target_modules=["inner"])
    model = get_peft_model(_Net(), config, adapter_name="vblora_logits_A2")
    assert {group["name"]: len(group["params"]) for group in parameter_groups(model)} == {"vector_bank": 1, "logits": 2}


def test_each_rate_is_the_one_its_parameters_move_at(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0, vector_bank_lr=0.0, logits_lr=1.0))
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("vblora_logits_" in name for name in moved)


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"vector_bank_lr": float("nan")}, {"logits_lr": float("inf")}, {"lambda_lr": -1}]
)
def test_a_rate_that_cannot_be_is_refused_by_name(model, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"`{name}` is"):
        parameter_groups(model, **bad)


def test_a_model_with_nothing_to_train_is_refused():
    model = _Net().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model)
