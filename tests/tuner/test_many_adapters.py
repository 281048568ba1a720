"""Adapters by the hundreds: what a switch costs grows as their number does, and not as its square."""

import copy
import sys
from collections import Counter
from functools import partial

import pytest

from tests.models import adapted_by, tiny_bert
from vblora_triton import VBLoRAConfig, VeraConfig

FIELDS = {"target_modules": ["query"], "r": 1}
VBLORA = partial(VBLoRAConfig, **FIELDS, num_vectors=4, vector_length=16)
VERA = partial(VeraConfig, **FIELDS)


def with_adapters(make_config, number):
    """A classifier with `number` adapters, each with a head of its own, the first of them with biases."""
    model = adapted_by(make_config, {"modules_to_save": ["classifier"], "bias": "all"}, tiny_bert(), "a0")
    for n in range(1, number):
        model.add_adapter(f"a{n}", make_config(modules_to_save=["classifier"]))
    return model


OPERATIONS = {
    "set": lambda model, folder: model.set_adapter("a1"),
    "set_frozen": lambda model, folder: model.set_adapter("a1", inference_mode=True),
    "delete_active": lambda model, folder: model.delete_adapter("a0"),
    "delete_other": lambda model, folder: model.delete_adapter("a1"),
    "add": lambda model, folder: model.add_adapter("new", copy.copy(model.peft_config["a1"])),
    "load": lambda model, folder: model.load_adapter(folder, "new"),
    "refill": lambda model, folder: model.load_adapter(folder, "a1"),
    "disable": lambda model, folder: model.base_model.disable_adapter_layers(),
}


def calls_of(operation, model, folder) -> int:
    """Count the calls, of Python functions and of C functions, that an operation makes."""
    counts = Counter()

    def profile(frame, event, argument):
        counts[event] += 1

    sys.setprofile(profile)
    try:
        operation(model, folder)
    finally:
        sys.setprofile(None)
    return counts["call"] + counts["c_call"]


@pytest.mark.parametrize("make_config", [VBLORA, VERA], ids=["vblora", "vera"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_the_work_grows_no_faster_than_the_number_of_adapters(operation, make_config, tmp_path):
    few, many = 10, 40
    adapted_by(make_config, {"modules_to_save": ["classifier"]}, tiny_bert()).save_pretrained(tmp_path)
    # The first time finds imports to do.
    calls_of(operation, with_adapters(make_config, 2), tmp_path)
    work = {number: calls_of(operation, with_adapters(make_config, number), tmp_path) for number in (few, many)}
    assert work[many] < work[few] * many / few


@pytest.mark.parametrize("make_config", [VBLORA, VERA], ids=["vblora", "vera"])
def test_the_active_adapter_is_trained_with_its_head_and_biases_and_no_other(make_config):
    model = with_adapters(make_config, 6)
    for active in ("a3", "a0", "a5"):
        model.set_adapter(active)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        own = {name for name, _ in model.named_parameters() if f".{active}." in name or name.endswith(f".{active}")}
        biases = {name for name, _ in model.named_parameters() if name.endswith("bias") and "classifier" not in name}
        assert own
        assert trained == (own | biases if active == "a0" else own)
    with pytest.raises(ValueError, match="classifier"):
        model.set_adapter(["a1", "a3"])


def test_several_adapters_without_copies_of_modules_are_trained_together():
    model = adapted_by(VBLORA, {}, tiny_bert(), "a0")
    for n in range(1, 5):
        model.add_adapter(f"a{n}", VBLORA())
    model.set_adapter(["a1", "a3"])
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a1", "a3"}
