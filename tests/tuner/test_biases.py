"""Biases that an adapter trains are in force while it acts, and not while another does."""

from functools import partial

import pytest
import torch

from tests.models import adapted_by, enlarge, outputs, tiny_bert
from vblora_triton import PeftModel, VBLoRAConfig, VeraConfig, get_peft_model

METHODS = {
    "vblora": partial(VBLoRAConfig, r=2, num_vectors=6, vector_length=16, target_modules=["query"]),
    "vera": partial(VeraConfig, r=4, target_modules=["query"]),
}


@pytest.fixture(params=METHODS)
def make_config(request):
    return METHODS[request.param]


def biased(make_config, name="default", mode="all") -> PeftModel:
    """A classifier with one adapter, whose biases are far from the model's."""
    model = enlarge(get_peft_model(tiny_bert(), make_config(bias=mode), name)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and parameter.requires_grad:
                parameter.normal_()
    return model


@pytest.mark.parametrize("mode", ["all", "own"])
def test_a_loaded_adapter_that_is_not_active_changes_no_output(mode, make_config, tmp_path):
    trained = biased(make_config, mode=mode if mode == "all" else f"{make_config().peft_type.value.lower()}_only")
    trained.save_pretrained(tmp_path)
    model = adapted_by(make_config, {}, tiny_bert(), "first")
    first = outputs(model)
    model.load_adapter(tmp_path, "second")
    assert torch.equal(outputs(model), first)
    for _ in range(2):
        model.set_adapter("second")
        assert torch.equal(outputs(model), outputs(trained))
        model.set_adapter("first")
        assert torch.equal(outputs(model), first)


def test_what_training_made_of_the_biases_stays_with_their_adapter(make_config, tmp_path):
    model = biased(make_config, "first")
    model.add_adapter("second", make_config())
    enlarge(model, seed=3)
    first = outputs(model)
    plain = adapted_by(make_config, {}, tiny_bert(), "second")
    own = {key: p for key, p in model.named_parameters() if key.endswith(".second")}
    plain.load_state_dict(own, strict=False)
    model.set_adapter("second")
    second = outputs(model)
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.endswith("bias"))
    torch.testing.assert_close(second, outputs(plain))
    # From here it is saved, refilled, and comes back.
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    model.load_adapter(tmp_path / "first", "first")
    assert torch.equal(outputs(model), second)
    model.set_adapter("first")
    assert torch.equal(outputs(model), first)
    for folder in (tmp_path, tmp_path / "given"):
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_bert(), folder / "first")), first)
    model.delete_adapter("first")
    assert torch.equal(outputs(model), second)


def test_biases_go_with_merging_and_come_off_with_the_adapter(make_config):
    base, model = outputs(tiny_bert()), biased(make_config, "first")
    first = outputs(model)
    model.add_adapter("second", make_config())
    model.set_adapter("second")
    second = outputs(model)
    model.merge_adapter(["first"])
    model.set_adapter("second")
    assert torch.equal(outputs(model), second)
    torch.testing.assert_close(outputs(model.merge_and_unload(adapter_names=["first"])), first, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(biased(make_config).unload()), base)
