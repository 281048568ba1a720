"""Projections: each adapter has its own, equal ones are one tensor, and no adapter ever changes another's."""

import copy
import io
import itertools
import pickle
from functools import partial

import pytest
import torch

from tests.models import adapted_by, outputs, tiny_llama
from vblora_triton import PeftModel, VeraConfig, get_peft_model
from vblora_triton.vera.projection import ProjectionDict, draw_projections

# Of different rank, key, and largest layer: k_proj is 64 -> 32, down_proj 96 -> 64.
SMALL = {"r": 6, "projection_prng_key": 1, "target_modules": ["k_proj"]}
LARGE = {"r": 9, "projection_prng_key": 5, "target_modules": ["k_proj", "down_proj"]}


adapted = partial(adapted_by, VeraConfig, SMALL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> the folder of an adapter, and what it computes alone."""
    found = {}
    for seed, (name, fields) in enumerate({"small": SMALL, "large": LARGE}.items()):
        folder = tmp_path_factory.mktemp(name)
        model = adapted(seed=seed, **fields)
        model.save_pretrained(folder)
        found[name] = folder, outputs(model)
    assert not torch.allclose(found["small"][1], found["large"][1], atol=1e-2)
    return found


@pytest.mark.parametrize("order", list(itertools.permutations(["small", "large"])), ids=str)
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_adapters_of_other_rank_key_and_shape_compute_together_what_each_does_alone(saved, order, low):
    first, second = order
    model = PeftModel.from_pretrained(tiny_llama(), saved[first][0], first)
    held = {name: getattr(model.base_model, name)[first].clone() for name in ("vera_A", "vera_B")}
    model.load_adapter(saved[second][0], second, low_cpu_mem_usage=low)
    assert torch.equal(outputs(model), saved[first][1])
    for name, before in held.items():
        assert torch.equal(getattr(model.base_model, name)[first], before)
    model.set_adapter(second)
    assert torch.equal(outputs(model), saved[second][1])
    model.delete_adapter(first)
    assert torch.equal(outputs(model), saved[second][1])
    model.delete_adapter(second)
    model.load_adapter(saved[first][0], first)
    model.set_adapter(first)
    assert torch.equal(outputs(model), saved[first][1])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("order", list(itertools.permutations(["small", "large"])), ids=str)
def test_peft_cannot(saved, order):
    """So that the test above is known to be one."""
    peft = pytest.importorskip("peft")
    first, second = order
    model = peft.PeftModel.from_pretrained(tiny_llama(), saved[first][0], first)
    torch.testing.assert_close(outputs(model), saved[first][1], rtol=0, atol=1e-6)
    with pytest.raises((ValueError, RuntimeError)):
        model.load_adapter(saved[second][0], second)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Unexpected keyword arguments")
def test_where_sizes_agree_pefts_second_adapter_changes_the_first_and_ours_does_not(tmp_path):
    peft = pytest.importorskip("peft")
    # As after training with projections of another source: the same key, other values.
    folders, alone = [tmp_path / "one", tmp_path / "two"], []
    for seed, folder in enumerate(folders):
        model = adapted(seed=seed)
        for held in (model.base_model.vera_A, model.base_model.vera_B) if seed else ():
            held["default"] = held["default"] * 0.5
        model.save_pretrained(folder)
        alone.append(outputs(model))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folders[0], "one")
    theirs.load_adapter(folders[1], "two")
    assert not torch.allclose(outputs(theirs), alone[0], atol=1e-3)
    ours = PeftModel.from_pretrained(tiny_llama(), folders[0], "one")
    ours.load_adapter(folders[1], "two")
    assert torch.equal(outputs(ours), alone[0])
    ours.set_adapter("two")
    assert torch.equal(outputs(ours), alone[1])


def shared(model: PeftModel, *names: str) -> bool:
    """Whether adapters have one A and one B among them."""
    tuner = model.base_model
    return all(len({held[name].data_ptr() for name in names}) == 1 for held in (tuner.vera_A, tuner.vera_B))


def test_equal_projections_are_one_tensor_through_moves_casts_copies_and_pickles(tmp_path):
    model = adapted(name="a")
    model.add_adapter("b", VeraConfig(**SMALL))
    model.add_adapter("other", VeraConfig(**SMALL | {"projection_prng_key": 2}))
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    model.load_adapter(tmp_path / "a", "c")
    assert shared(model, "a", "b", "c")
    assert not shared(model, "a", "other")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for changed in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).half().float().double(),
    ):
        assert shared(changed, "a", "b", "c")
        for name in ("vera_A", "vera_B"):
            held, before = (getattr(m.base_model, name)["a"] for m in (changed, model))
            assert held.dtype == torch.float32
            assert torch.equal(held, before)
            assert held.data_ptr() != before.data_ptr()
        for _, layer in changed.base_model.adapted_layers():
            assert layer.vera_A is changed.base_model.vera_A
            assert layer.vera_B is changed.base_model.vera_B
    empty = copy.deepcopy(model).to("meta")
    assert empty.base_model.vera_A["a"] is empty.base_model.vera_A["b"]
    model.delete_adapter("b")
    assert shared(model, "a", "c")


def test_loading_a_state_dict_gives_an_adapter_its_own_and_leaves_the_others():
    model = adapted(name="a")
    model.add_adapter("b", VeraConfig(**SMALL))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = state["base_model.vera_A.a"].clone()
    state["base_model.vera_A.b"] *= 2
    model.load_state_dict(state)
    assert torch.equal(model.base_model.vera_A["a"], before)
    assert torch.equal(model.base_model.vera_A["b"], 2 * before)
    state["base_model.vera_A.b"] = before
    model.load_state_dict(state)
    assert shared(model, "a", "b")


def test_projections_are_registered_once_on_the_model_and_never_trained():
    model = adapted(**LARGE)
    tuner, names = model.base_model, {"base_model.vera_A.default", "base_model.vera_B.default"}
    assert {name for name, _ in model.named_buffers(remove_duplicate=False) if "vera" in name} == names
    assert {name for name in model.state_dict() if "vera_A" in name or "vera_B" in name} == names
    for _, layer in tuner.adapted_layers():
        own = [*layer.state_dict(), *dict(layer.named_buffers()), *dict(layer.named_parameters())]
        assert own
        assert not [name for name in own if "vera_A" in name or "vera_B" in name]
        assert layer.vera_A["default"] is tuner.vera_A["default"]
    assert tuner.vera_A["default"].shape == (9, 96)
    assert tuner.vera_B["default"].shape == (64, 9)
    model.requires_grad_(True)
    model.set_adapter("default")
    assert not tuner.vera_A["default"].requires_grad
    assert not tuner.vera_B["default"].requires_grad


@pytest.mark.parametrize("key", [0, 42, 2**64 - 1])
def test_drawing_is_a_function_of_its_arguments_alone(key):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    A, B = draw_projections(key, 8, 40, 24)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.device("meta"):
        again = draw_projections(key, 8, 40, 24)
    torch.set_default_dtype(torch.float64)
    try:
        other = draw_projections(key, 8, 40, 24)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two, three in zip((A, B), again, other, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert one.dtype == three.dtype == torch.float32
    assert 0.95 * (6 / 40) ** 0.5 < A.abs().max() <= (6 / 40) ** 0.5
    assert 0.9 * (6 / 8) ** 0.5 < B.abs().max() <= (6 / 8) ** 0.5
    assert not torch.equal(draw_projections(key - 1 if key else 1, 8, 40, 24)[0], A)


def test_adding_an_adapter_leaves_torchs_generator_as_it_was():
    base = tiny_llama()
    state = torch.get_rng_state()
    get_peft_model(base, VeraConfig(**SMALL))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_projection_dict_is_a_mapping_of_frozen_float32():
    held = ProjectionDict()
    one = torch.randn(2, 3, requires_grad=True)
    held["a"], held["b"], held["c"] = one, one.detach().clone(), one.detach().half()
    assert list(held) == list(held.keys()) == ["a", "b", "c"]
    assert held["a"] is held["b"]
    assert held["a"] is not held["c"]
    assert held["c"].dtype == torch.float32
    assert not held["a"].requires_grad
    del held["a"]
    assert "a" not in held
    assert len(held) == 2
    held.clear()
    assert not list(held.values())
