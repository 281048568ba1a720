"""Whole adapted models that are cast, moved, copied, pickled and saved as objects, in the middle of training too."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.models import adapted_by, some_ids, tiny_llama
from tests.tolerance import relative_error
from vblora_triton import PeftModel, VBLoRAConfig, VeraConfig, get_peft_model, use_backend

METHODS = {
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 16}),
    "vera": (VeraConfig, {"r": 3}),
}
TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj"]}

both_methods = pytest.mark.parametrize("method", METHODS)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def with_two(method: str) -> PeftModel:
    """A model with two adapters, in training."""
    config_class, fields = METHODS[method]
    model = adapted_by(config_class, fields, **TARGETS)
    model.add_adapter("other", config_class(**fields, **TARGETS))
    return model.train()


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=some_ids(), labels=some_ids()).loss


def after_steps(model: nn.Module, steps: int = 2) -> dict[str, torch.Tensor]:
    """What training makes of the trained parameters."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in trained.items()}


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@both_methods
def test_a_copy_made_in_training_goes_on_as_the_model_does_and_apart_from_it(method, copied):
    model = with_two(method)
    after_steps(model)
    loss_of(model).backward()
    other = copied(model)
    assert isinstance(other, PeftModel)
    assert other.active_adapters == ["default"]
    assert other.training
    # The first one's steps do not reach the copy, which then takes the same.
    expected = after_steps(model)
    found = after_steps(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for one in (model, other):
        one.set_adapter("other")
    with model.disable_adapter(), other.disable_adapter():
        assert torch.equal(loss_of(model), loss_of(other))
    assert torch.equal(loss_of(model), loss_of(other))
    shared = other.base_model.tuner_layer_cls.shared_layer_names
    for name in shared:
        own = getattr(other.base_model, name)
        assert all(getattr(layer, name) is own for _, layer in other.base_model.adapted_layers())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@both_methods
def test_a_copy_of_a_merged_model_with_adapters_off_comes_back_to_the_same_weights(method, copied):
    model = with_two(method).eval()
    expected, plain = loss_of(model), loss_of(tiny_llama())
    model.merge_adapter()
    other = copied(model)
    torch.testing.assert_close(loss_of(other), expected)
    other.unmerge_adapter()
    for name, weight in tiny_llama().named_parameters():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(other.get_base_model().get_submodule(module), leaf), weight), name
    other.base_model.disable_adapter_layers()
    off = copied(other)
    torch.testing.assert_close(loss_of(off), plain)
    off.base_model.enable_adapter_layers()
    # What was frozen while they were off is trained again: the copy's own parameters.
    assert {n for n, p in off.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert torch.equal(loss_of(off), expected)


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.double()],
    ids=["half", "bfloat16", "to-bfloat16", "double"],
)
@both_methods
def test_a_model_that_is_cast_in_training_trains_on_in_that_dtype(method, cast):
    model = with_two(method)
    after_steps(model)
    loss_of(model).backward()
    dtype = cast(model).get_base_model().dtype
    model.zero_grad()
    exact = copy.deepcopy(model).double()
    with use_backend("reference"):
        expected = torch.autograd.grad(loss_of(exact), [p for p in exact.parameters() if p.requires_grad])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss_of(model), list(trained.values()))
    for (name, parameter), gradient, truth in zip(trained.items(), found, expected, strict=True):
        assert parameter.dtype == gradient.dtype == dtype, name
        assert relative_error(gradient, truth) < (1e-10 if dtype == torch.float64 else 0.1), name


@both_methods
def test_a_model_on_the_meta_device_computes_shapes_and_comes_back_by_its_state_dict(method):
    model = with_two(method)
    values, expected = model.state_dict(), loss_of(model)
    moved = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in (*moved.parameters(), *moved.buffers()))
    assert moved(input_ids=some_ids().to("meta")).logits.shape == (2, 7, 48)
    again = get_peft_model(tiny_llama(), METHODS[method][0](**METHODS[method][1], **TARGETS))
    again.add_adapter("other", METHODS[method][0](**METHODS[method][1], **TARGETS))
    again.load_state_dict(values)
    assert torch.equal(loss_of(again.train()), expected)
