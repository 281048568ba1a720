"""Where accelerate, transformers and trl ask for PEFT's classes or call its functions, they get right answers."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import is_peft_model
from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict
from safetensors.torch import load_file
from transformers.distributed.fsdp import update_fsdp_plugin_peft

from tests.models import adapted_by, assert_unchanged, enlarge, outputs, snapshot, tiny_bert, tiny_llama
from vblora_triton import (
    AdapterFileError,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model_state_dict,
)

peft = pytest.importorskip("peft")

FIELDS = {"r": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], "bias": "all"}
BANK = {"num_vectors": 10, "vector_length": 16}
METHODS = {"vblora": (VBLoRAConfig, FIELDS | BANK), "vera": (VeraConfig, FIELDS)}


def adapted(method, seed=0, **changes) -> PeftModel:
    """A classifier whose adapter, head and biases are other ones for each seed."""
    config_class, fields = METHODS[method]
    model = adapted_by(config_class, fields | changes, tiny_bert(), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in name or name.endswith("bias")):
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("topk", [False, True], ids=["full", "topk"])
@pytest.mark.parametrize("method", METHODS)
def test_accelerate_saves_and_restores_all_of_an_adapter(method, topk):
    changes = {"save_only_topk_weights": topk} if method == "vblora" else {}
    model, other = adapted(method, **changes), adapted(method, seed=1, **changes)
    assert not torch.allclose(outputs(other), outputs(model), atol=1e-3)
    assert is_peft_model(model)
    saved = _get_model_state_dict(model, adapter_only=True)
    _set_model_state_dict(other, {key: tensor.clone() for key, tensor in saved.items()}, adapter_only=True)
    torch.testing.assert_close(outputs(other), outputs(model), rtol=0, atol=2e-6 if topk else 0)
    # What PEFT itself saves of an adapter of the same kind.
    fields = METHODS[method][1] | changes
    theirs = peft.get_peft_model(tiny_bert(), getattr(peft, METHODS[method][0].__name__)(**fields))
    wanted = {key: tensor.shape for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    # Of a module that is saved whole it names the bias twice more, inside its wrapper.
    wanted = {key: shape for key, shape in wanted.items() if ".modules_to_save." not in key and ".original" not in key}
    assert {key: tensor.shape for key, tensor in saved.items()} == wanted


def test_an_adapter_of_a_topk_file_is_saved_and_restored(tmp_path):
    adapted("vblora", save_only_topk_weights=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    other = adapted("vblora", seed=1, save_only_topk_weights=True)
    _set_model_state_dict(other, _get_model_state_dict(model, adapter_only=True), adapter_only=True)
    torch.testing.assert_close(outputs(other), outputs(model), rtol=0, atol=2e-6)


def test_what_was_restored_does_not_follow_the_state_dict():
    model, other = adapted("vera"), adapted("vera", seed=1, projection_prng_key=1)
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(other, state)
    for tensor in state.values():
        tensor.zero_()
    torch.testing.assert_close(outputs(other), outputs(adapted("vera")), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(method, change):
    model = adapted(method)
    state = peft.get_peft_model_state_dict(adapted(method, seed=1))
    key = "base_model.model.classifier.weight"
    tensor = state.pop(key)
    state |= {"missing": {}, "unknown": {key: tensor, "other": tensor}, "shape": {key: tensor[1:]}}[change]
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="other" if change == "unknown" else "classifier"):
        peft.set_peft_model_state_dict(model, state)
    assert_unchanged(model, before)


def test_the_active_adapter_of_several_is_meant_and_a_list_must_name_one():
    model = adapted("vera")
    model.add_adapter("second", VeraConfig(r=2, target_modules=["key"]))
    model.set_adapter("second")
    assert {k.split(".")[-2] for k in _get_model_state_dict(model, adapter_only=True) if "lambda" in k} == {"key"}
    assert get_peft_model_state_dict(model, adapter_name=["second"]).keys()
    model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one adapter"):
        _get_model_state_dict(model, adapter_only=True)


def test_a_wrapped_model_is_found():
    model = adapted("vblora")
    wrapped = torch.nn.DataParallel(model)
    assert peft.get_peft_model_state_dict(wrapped).keys() == get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("kind", ["VBLoRAConfig", "LoraConfig"])
def test_pefts_own_models_are_still_pefts_to_answer_for(kind):
    adapted("vblora")
    fields = {"target_modules": ["query"], "r": 2} | (BANK if kind == "VBLoRAConfig" else {})
    theirs = peft.get_peft_model(tiny_bert(), getattr(peft, kind)(**fields))
    state = {key: torch.ones_like(tensor) for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    assert all((tensor == 1).all() for tensor in peft.get_peft_model_state_dict(theirs).values())
    with pytest.raises(TypeError, match="vblora_triton"):
        get_peft_model_state_dict(theirs)


def test_pefts_own_model_around_one_of_ours_is_pefts_to_answer_for(tmp_path):
    outer = torch.nn.Module()
    outer.encoder, outer.head = adapted("vblora"), torch.nn.Linear(4, 4)
    theirs = peft.get_peft_model(outer, peft.LoraConfig(r=2, target_modules=["head"]))
    assert is_peft_model(outer.encoder)
    found = peft.get_peft_model_state_dict(theirs)
    theirs.save_pretrained(tmp_path)
    assert found.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {f"base_model.model.head.lora_{matrix}.weight" for matrix in "AB"} <= found.keys()
    assert peft.set_peft_model_state_dict(theirs, found).unexpected_keys == []


@pytest.mark.parametrize("method", METHODS)
def test_layers_tuners_and_configurations_are_pefts_to_isinstance(method):
    model = adapted(method)
    layer = next(module for module in model.modules() if type(module).__name__ == "Linear" and hasattr(module, "r"))
    assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    assert isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner)
    config = model.active_peft_config
    assert isinstance(config, (peft.PeftConfig, getattr(peft, type(config).__name__)))
    assert not isinstance(config, peft.LoraConfig)
    assert not isinstance(torch.nn.Linear(2, 2), peft.tuners.tuners_utils.BaseTunerLayer)
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(again) is type(config)
        assert again == config
    assert VeraConfig(r=5) != VeraConfig(r=6)


def test_transformers_sets_the_wrap_policy_of_fsdp():
    plugin = SimpleNamespace(auto_wrap_policy=None)
    update_fsdp_plugin_peft(adapted("vblora"), SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.auto_wrap_policy is not None


@pytest.mark.parametrize("order", ["peft first", "package first", "no peft"])
def test_it_does_not_matter_when_or_whether_peft_is_imported(order):
    code = f"""
import sys
order = {order!r}
if order == "no peft":
    sys.modules["peft"] = None
if order == "peft first":
    import peft
from tests.models import adapted_by, outputs
from vblora_triton import VeraConfig, get_peft_model_state_dict, set_peft_model_state_dict
make = lambda seed: adapted_by(VeraConfig, dict(r=2, target_modules=["q_proj"]), seed=seed)
model, other = make(0), make(1)
if order == "package first":
    import peft
if order == "no peft":
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
else:
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict
    _set_model_state_dict(other, _get_model_state_dict(model, adapter_only=True), adapter_only=True)
    assert isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner)
assert (outputs(model) == outputs(other)).all()
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_trl_takes_a_configuration_of_ours_and_the_result_is_ours_to_load(tmp_path):
    from trl.trainer.sft_trainer import PeftConfig, get_peft_model

    config = VBLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **BANK)
    assert isinstance(config, PeftConfig)
    model = enlarge(get_peft_model(tiny_llama(), config)).eval()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {
        *("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    }
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-5)
