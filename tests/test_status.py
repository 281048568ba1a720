"""What get_layer_status and get_model_status say is what is so, and what PEFT says of the same state."""

import dataclasses

import pytest
import torch

from tests.models import tiny_bert, tiny_llama
from vblora_triton import PeftModel, VBLoRAConfig, get_layer_status, get_model_status, get_peft_model
from vblora_triton.status import TunerLayerStatus, TunerModelStatus

FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16}


def make(kind, config_class, head):
    """A classifier with two adapters on the same layers, of which the first may have a head of its own."""
    model = kind(tiny_bert(), config_class(**FIELDS, target_modules=["query"], modules_to_save=head))
    model.add_adapter("other", config_class(**FIELDS | {"r": 2}, target_modules=["query"]))
    return model


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STATES = {
    "new": lambda model: None,
    "other": lambda model: model.set_adapter("other"),
    "both": lambda model: model.base_model.set_adapter(["default", "other"]),
    "merged": lambda model: model.merge_adapter(),
    "partly": lambda model: next(iter(layers(model))).merge(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "one-disabled": lambda model: next(iter(layers(model))).enable_adapters(False),
    "frozen": lambda model: model.requires_grad_(False),
    "one-frozen": lambda model: next(iter(layers(model))).vblora_logits_A["default"].requires_grad_(False),
}


def layers(model):
    return (module for module in model.modules() if hasattr(module, "vblora_logits_A"))


# Where ours means something else: to disable adapters freezes none, and a module that is trained whole follows the
# model's active adapters, also those that have no copy of it.
DIFFERENT = {"disabled": {"requires_grad"}, "one-disabled": {"requires_grad"}}
HEADLESS = {"other", "both"}


@pytest.mark.parametrize("state", STATES)
def test_the_status_is_pefts_of_the_same_state(state):
    peft = pytest.importorskip("peft")
    left_out = {"trainable_params", "total_params"} | DIFFERENT.get(state, set())

    def compared(status) -> dict:
        return {key: value for key, value in dataclasses.asdict(status).items() if key not in left_out}

    head = None if state in HEADLESS else ["classifier"]
    here = make(get_peft_model, VBLoRAConfig, head)
    there = make(peft.get_peft_model, peft.VBLoRAConfig, head)
    for model in (here, there):
        STATES[state](model)
    assert compared(get_model_status(here)) == compared(peft.get_model_status(there))
    own, theirs = get_layer_status(here), peft.get_layer_status(there)
    assert [compared(layer) for layer in own] == [compared(layer) for layer in theirs]


def test_the_fields_are_pefts():
    peft = pytest.importorskip("peft")
    for own, theirs in (
        (TunerLayerStatus, peft.peft_model.TunerLayerStatus),
        (TunerModelStatus, peft.peft_model.TunerModelStatus),
    ):
        assert [field.name for field in dataclasses.fields(own)] == [field.name for field in dataclasses.fields(theirs)]


def test_the_counts_and_types_are_those_of_the_model():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS, target_modules=["q_proj"]))
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "VBLoRAModel")
    assert status.peft_types == {"default": "VBLORA"}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.total_params == sum(p.numel() for p in model.parameters())
    assert status.num_adapter_layers == 2
    assert [layer.name for layer in model.get_layer_status()] == [
        f"model.model.layers.{n}.self_attn.q_proj" for n in (0, 1)
    ]
    assert {layer.module_type for layer in model.get_layer_status()} == {"vblora.Linear"}


def test_a_layer_names_only_the_adapters_that_it_has():
    """PEFT's names every one, because the bank of every adapter is registered in each layer."""
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS, target_modules=["q_proj"]))
    model.add_adapter("other", VBLoRAConfig(**FIELDS, target_modules=["v_proj"]))
    found = {layer.name.rpartition(".")[2]: layer.available_adapters for layer in model.get_layer_status()}
    assert found == {"q_proj": ["default"], "v_proj": ["other"]}


def test_a_loaded_adapter_reads_as_frozen(tmp_path):
    config = VBLoRAConfig(**FIELDS, target_modules=["q_proj"], save_only_topk_weights=True)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    status = get_model_status(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    assert status.requires_grad == {"default": False}
    assert status.devices == {"default": ["cpu"]}


def test_a_plain_module_with_adapted_layers_has_a_status_and_one_without_is_refused():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS, target_modules=["q_proj"]))
    status = get_model_status(model.get_base_model())
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "None")
    assert status.num_adapter_layers == 2
    with pytest.raises(ValueError, match="`model` is a Linear"):
        get_layer_status(torch.nn.Linear(2, 2))
