"""Optimizer groups: every trainable parameter in one, at its own rate."""

import copy

import pytest
import torch
from torch import nn

from vblora_triton.optim import LazyAdamW, parameter_groups
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


def by_hand(logits, gradients, topk, lr, decay):
    """LazyAdamW of one tensor of logits (rows, h), an entry at a time, in Python's own numbers."""
    p, m, v = logits.tolist(), torch.zeros_like(logits).tolist(), torch.zeros_like(logits).tolist()
    for t, gradient in enumerate(gradients, start=1):
        for row, values in enumerate(gradient.tolist()):
            for i in sorted(range(len(values)), key=lambda i: (-p[row][i], i))[:topk]:
                p[row][i] *= 1 - lr * decay
                m[row][i] = 0.8 * m[row][i] + 0.2 * values[i]
                v[row][i] = 0.9 * v[row][i] + 0.1 * values[i] ** 2
                p[row][i] -= lr * (m[row][i] / (1 - 0.8**t)) / ((v[row][i] / (1 - 0.9**t)) ** 0.5 + 1e-3)
    return torch.tensor(p), torch.tensor(m), torch.tensor(v)


@pytest.mark.parametrize("topk", [1, 2, 7])
def test_lazy_adamw_moves_what_is_selected_and_leaves_the_rest(topk):
    torch.manual_seed(0)
    settings = {"lr": 0.3, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    logits, other = (nn.Parameter(torch.randn(3, 2, 7, dtype=torch.float64)) for _ in range(2))
    dense = nn.Parameter(other.detach().clone())
    optimizer = LazyAdamW([{"name": "logits", "params": [logits]}, {"params": [other]}], topk, **settings)
    adamw = torch.optim.AdamW([dense], **settings)
    before, gradients = logits.detach().clone().view(-1, 7), []
    for _ in range(6):
        # Selections change on the way: a step of 0.3 is larger than what is between two logits.
        logits.grad, other.grad = torch.randn_like(logits), torch.randn_like(other)
        gradients.append(logits.grad.view(-1, 7))
        dense.grad = other.grad.clone()
        optimizer.step()
        adamw.step()
    wanted = by_hand(before, gradients, topk, 0.3, 0.1)
    state = optimizer.state[logits]
    for found, hand in zip((logits, state["exp_avg"], state["exp_avg_sq"]), wanted, strict=True):
        torch.testing.assert_close(found.detach().view(-1, 7), hand.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(other, dense)
    # Entries that were never selected have no moments, and are what they were.
    never = state["exp_avg_sq"].view(-1, 7) == 0
    assert torch.equal(logits.detach().view(-1, 7)[never], before[never])
    assert never.any() == (topk < 7)


def test_lazy_adamw_with_all_vectors_is_adamw_and_their_states_go_both_ways(model):
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    lazy = LazyAdamW(parameter_groups(model, weight_decay=0.1), topk=5, lr=0.2)
    adamw = torch.optim.AdamW(parameter_groups(twin, weight_decay=0.1), lr=0.2)
    for _ in range(3):
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            if one.requires_grad:
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
        lazy.step()
        adamw.step()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other)
        states = lazy.state_dict(), adamw.state_dict()
        lazy.load_state_dict(states[1])
        adamw.load_state_dict(states[0])


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.outer(self.inner(x))


def with_two_topks():
    torch.manual_seed(0)
    config = {"r": 2, "num_vectors": 12, "vector_length": 4, "init_logits_std": 1.0, "init_vector_bank_bound": 0.5}
    model = get_peft_model(_Two(), VBLoRAConfig(topk=4, target_modules=["inner"], **config))
    model.add_adapter("wide", VBLoRAConfig(topk=2, target_modules=["inner", "outer"], **config))
    model.base_model.set_adapter(["default", "wide"])
    return model


def test_lazy_adamw_moves_the_k_of_each_adapter_and_resumes(tmp_path):
    model = with_two_topks()
    groups = parameter_groups(model)
    assert [(g["name"], g.get("topk"), len(g["params"])) for g in groups] == [
        ("vector_bank", None, 2), ("logits", 4, 2), ("logits", 2, 4),
    ]  # fmt: skip

    def train(model, optimizer, steps=2):
        for step in range(steps):
            model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = LazyAdamW(groups)
    for k, group in ((4, groups[1]), (2, groups[2])):
        for parameter in group["params"]:
            before = parameter.detach().clone()
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            parameter.grad = None
            moved = torch.zeros(before.shape, dtype=torch.bool).scatter(-1, before.topk(k).indices, True)
            assert torch.equal(parameter != before, moved)
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "all.pt")
    train(model, optimizer)
    saved, again = torch.load(tmp_path / "all.pt"), with_two_topks()
    again.load_state_dict(saved["model"])
    resumed = LazyAdamW(parameter_groups(again))
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_lazy_adamw_refuses_one_k_for_several_and_none_for_groups_without(model):
    with pytest.raises(ValueError, match="`topk` is 2, and that of the groups of logits is 2 and 4: give groups"):
        LazyAdamW(parameter_groups(with_two_topks()), topk=2)
    with pytest.raises(ValueError, match="`topk` is None, and that of the groups of logits is None"):
        LazyAdamW([{"name": "logits", "params": list(model.parameters())}])


def test_lazy_adamw_refuses_numbers_out_of_range(model):
    for wrong in ({"topk": 0}, {"lr": -1.0}, {"eps": float("nan")}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is "):
            LazyAdamW(parameter_groups(model), **{"topk": 2} | wrong)
