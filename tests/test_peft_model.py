"""The model that a user holds: task classes, forwarding, and several adapters on one model."""

import copy
import inspect
from functools import partial

import pytest
import torch

import vblora_triton
from tests.models import (
    adapted_by,
    assert_unchanged,
    enlarge,
    outputs,
    snapshot,
    some_ids,
    tiny_gpt2,
    tiny_llama,
)
from vblora_triton import PeftModel, TaskType, VBLoRAConfig, VBLoRAModel, get_peft_model
from vblora_triton.task_models import TASK_CLASSES

FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16}
TARGETS = ["q_proj", "v_proj"]


def config(**changes) -> VBLoRAConfig:
    return VBLoRAConfig(**{"target_modules": TARGETS} | FIELDS | changes)


adapted = partial(adapted_by, VBLoRAConfig, {"target_modules": TARGETS} | FIELDS)


def two_adapters() -> PeftModel:
    """ "default" and "other", of different sizes, on layers of which they share some."""
    model = adapted()
    other = config(r=2, num_vectors=7, vector_length=8, topk=1, target_modules=["v_proj", "down_proj"])
    model.add_adapter("other", other)
    return enlarge(model)


def alone(model: PeftModel, name: str) -> torch.Tensor:
    """The outputs with one adapter active."""
    copied = copy.deepcopy(model)
    copied.set_adapter(name)
    return outputs(copied)


@pytest.mark.parametrize("task", list(TaskType))
def test_the_task_type_chooses_the_class(task):
    model = get_peft_model(tiny_llama(), config(task_type=task.value))
    assert type(model) is TASK_CLASSES[task]
    assert type(model) is getattr(vblora_triton, type(model).__name__)
    assert isinstance(model, PeftModel)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert type(get_peft_model(tiny_llama(), config())) is PeftModel


def test_attribute_paths_are_pefts():
    base = tiny_llama()
    model = get_peft_model(base, config())
    assert isinstance(model.base_model, VBLoRAModel)
    assert model.base_model.model is base
    assert model.get_base_model() is base
    assert model.base_model.vblora_vector_bank["default"].shape == (10, 16)
    assert base.model.layers[0].self_attn.q_proj.vblora_logits_A["default"].shape == (3, 4, 10)
    assert model.peft_config == {"default": model.active_peft_config}
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]
    assert model.config is base.config
    assert model.device == base.device
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute


def test_the_users_config_object_is_the_models():
    own = config(target_modules=None)
    model = get_peft_model(tiny_llama(), own)
    assert model.peft_config["default"] is own
    assert own.target_modules == {"q_proj", "v_proj"}


def test_only_the_adapter_is_trained_and_counted(capsys):
    model = get_peft_model(tiny_llama(), config())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("vblora_" in name for name in trained)
    own, total = model.get_nb_trainable_parameters()
    assert own == model.get_nb_savable_parameters()[0]
    assert total == own + sum(p.numel() for p in tiny_llama().parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {own:,d} || all params: {total:,d}" in capsys.readouterr().out


def test_generate_uses_the_adapter():
    model = adapted(task_type="CAUSAL_LM")
    options = {"input_ids": some_ids(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(model.generate(**options), merged.generate(**options))
    assert not torch.equal(model.generate(**options), tiny_llama().generate(**options))


def test_disabling_gives_the_base_model_and_only_inside_the_context():
    model, base = adapted(), outputs(tiny_llama())
    own = outputs(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), base)
        with model.disable_adapter():
            pass
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), own)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(outputs(model), own)


def test_an_adapter_that_is_added_while_adapters_are_disabled_is_disabled():
    model = adapted()
    with model.disable_adapter():
        model.add_adapter("other", config(target_modules=["down_proj"]))
        model.set_adapter("other")
        enlarge(model)
        assert torch.equal(outputs(model), outputs(tiny_llama()))
    assert not torch.allclose(outputs(model), outputs(tiny_llama()), atol=1e-3)


def test_disabling_leaves_a_frozen_adapter_frozen():
    model = adapted(inference_mode=True)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merge_and_unload_gives_a_plain_model_with_the_same_outputs(make, safe_merge):
    targets = "all-linear" if make is tiny_llama else ["c_attn", "c_proj"]
    model = enlarge(get_peft_model(make(), config(target_modules=targets))).eval()
    own = outputs(model)
    plain = model.merge_and_unload(safe_merge=safe_merge)
    assert type(plain) is type(make())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in make().named_modules()]
    torch.testing.assert_close(outputs(plain), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_original_back_bit_for_bit(merged):
    model = adapted()
    if merged:
        model.merge_adapter()
    plain = model.unload()
    assert torch.equal(outputs(plain), outputs(tiny_llama()))
    get_peft_model(plain, config())


def test_unmerging_restores_every_bit():
    model = adapted()
    own, weights = outputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), own, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_safe_merge_that_fails_in_one_layer_changes_none():
    model = adapted()
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.vblora_logits_B["default"].fill_(float("nan"))
    weights = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'default'"):
            merge(safe_merge=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert not any(layer.merged for _, layer in model.base_model.adapted_layers())


def test_merging_into_a_tied_weight_is_refused():
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), config(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match="lm_head"):
        model.merge_and_unload()


def test_adapters_of_different_sizes_switch_and_add_up():
    model = two_adapters()
    first, second = outputs(model), alone(model, "other")
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter(["default", "other"])
    both = outputs(model)
    assert not torch.allclose(both, first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(outputs(model), first)
    model.set_adapter(["other"])
    assert torch.equal(outputs(model), second)


def trained(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_new_adapter_neither_acts_nor_is_trained_until_it_is_set():
    model = adapted()
    before, names = outputs(model), trained(model)
    model.add_adapter("other", config(num_vectors=7))
    assert torch.equal(outputs(model), before)
    assert trained(model) == names
    model.set_adapter("other")
    assert trained(model) == {name.removesuffix("default") + "other" for name in names}
    model.set_adapter("other", inference_mode=True)
    assert not trained(model)


def test_deleting_leaves_the_others_as_they_were():
    model = two_adapters()
    second = alone(model, "other")
    model.set_adapter(["default", "other"])
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert list(model.peft_config) == ["other"]
    assert torch.equal(outputs(model), second)
    assert not any(".default" in name for name in model.state_dict())
    model.delete_adapter("other")
    assert torch.equal(outputs(model), outputs(tiny_llama()))
    model.add_adapter("default", config())
    model.set_adapter("default")
    outputs(model)


def test_the_first_adapter_left_acts_after_the_active_one_is_deleted():
    model = two_adapters()
    second = alone(model, "other")
    model.delete_adapter("default")
    assert torch.equal(outputs(model), second)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapter_that_acts_because_another_is_deleted_is_trained_only_if_it_may_be(frozen):
    model = adapted()
    model.add_adapter("other", config(inference_mode=frozen))
    model.delete_adapter("default")
    assert bool(trained(model)) is not frozen


def test_a_merged_adapter_cannot_be_deleted():
    model = two_adapters()
    model.merge_adapter(["default"])
    before = outputs(model)
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("default")
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("name", ["q_proj", "vblora", "model", "base_layer", "A", "vblora_logits_A", "a b", "é"])
def test_any_name_that_is_no_path_works(name, tmp_path):
    model = enlarge(get_peft_model(tiny_llama(), config(modules_to_save=["lm_head"]), adapter_name=name)).eval()
    model.add_adapter("proj", config(num_vectors=5))
    enlarge(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(outputs(model.merge_and_unload()), outputs(again.merge_and_unload()))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "v1.0", "keys", "train", 3, None])
def test_a_name_that_cannot_be_one_is_refused(name):
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match="`adapter_name`"):
        get_peft_model(model, config(), adapter_name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda m: m.add_adapter("default", config()), "'default'"),
        (lambda m: m.set_adapter("missing"), "'missing'"),
        (lambda m: m.set_adapter(["default", "missing"]), "'missing'"),
        (lambda m: m.delete_adapter("missing"), "'missing'"),
        (lambda m: m.merge_adapter(["missing"]), "'missing'"),
        (lambda m: m.merge_and_unload(adapter_names=["missing"]), "'missing'"),
        (lambda m: m.set_requires_grad("missing"), "'missing'"),
        (lambda m: m.save_pretrained("nowhere", selected_adapters=["missing"]), "'missing'"),
        (lambda m: m.save_pretrained("nowhere", save_embedding_layers=True), "`save_embedding_layers`"),
        (lambda m: m.merge_adapter("default"), "`adapter_names`"),
        (lambda m: m.add_adapter("x", {"r": 3}), "`peft_config`"),
        (lambda m: m(input_ids=some_ids(), adapter_names=["default", "__base__"]), "`adapter_names`"),
        (lambda m: m.generate(input_ids=some_ids(), adapter_names=["default", "default"]), "`adapter_names`"),
        (lambda m: get_peft_model(m, config()), "`model`"),
        (lambda m: get_peft_model(m.base_model, config()), "`model`"),
        (lambda m: get_peft_model(m.get_base_model(), config(vector_length=24)), "`vector_length`"),
        (lambda m: get_peft_model(m.get_base_model(), config(), "a/b"), "`adapter_name`"),
        (lambda m: get_peft_model(tiny_llama(), config(), mixed=True), "`mixed`"),
        (lambda m: get_peft_model("gpt2", config()), "`model`"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_changes_nothing(call, word):
    model = adapted()
    before, result = snapshot(model), outputs(model)
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=word):
        call(model)
    model_before = {k: v for k, v in before.items() if k != "random"}
    assert_unchanged(model, model_before | {"random": torch.get_rng_state()})
    assert torch.equal(outputs(model), result)


@pytest.mark.parametrize("merged", [False, True])
def test_a_second_get_peft_model_starts_from_the_plain_model(merged):
    first = adapted(modules_to_save=["lm_head"], bias="all")
    if merged:
        first.merge_adapter()
    base = first.get_base_model()
    fields = {"target_modules": ["down_proj"], "init_vector_bank_bound": 1.0}
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="taken off"):
        second = get_peft_model(base, config(**fields))
    expected = tiny_llama()
    torch.manual_seed(5)
    expected = get_peft_model(expected, config(**fields))
    assert torch.equal(outputs(second), outputs(expected))
    assert trained(second) == trained(expected)
    assert [name for name, _ in second.named_modules()] == [name for name, _ in expected.named_modules()]


def test_a_new_layer_keeps_the_mode_of_the_one_it_replaces():
    model = get_peft_model(tiny_llama().eval(), config(vblora_dropout=0.5))
    assert not any(module.training for module in model.base_model.model.modules())
    model.train()
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        base = tiny_llama().train()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": True})
        model = enlarge(get_peft_model(base, config()))
        model(input_ids=some_ids(), labels=some_ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for own, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(own, expected)


def test_low_cpu_mem_usage_makes_no_values_and_takes_no_random_numbers():
    base = tiny_llama()
    random = torch.get_rng_state()
    model = get_peft_model(base, config(), low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.is_meta == ("vblora_" in name) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="meta"):
        model.save_pretrained("nowhere")


def test_importing_the_package_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, vblora_triton; vblora_triton.VBLoRAConfig(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_name_of_the_package_is_there():
    assert all(hasattr(vblora_triton, name) for name in vblora_triton.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vblora_triton.no_such_name
