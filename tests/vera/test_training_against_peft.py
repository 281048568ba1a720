"""Trained on the same data from the same state, a model learns here what it learns with PEFT, step by step."""

import pytest
import torch

from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.vblora.test_training_against_peft import train
from vblora_triton import VeraConfig, get_peft_model

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set")

# Model, targets (None: the defaults, which are PEFT's own), task.
FAMILIES = {
    "llama": (tiny_llama, None, "CAUSAL_LM"),
    "llama-all": (tiny_llama, "all-linear", "CAUSAL_LM"),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj"], "CAUSAL_LM"),
    "bert": (tiny_bert, ["query", "value"], "SEQ_CLS"),
}


@pytest.mark.parametrize("bias", ["none", "vera_only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_adamw_give_the_losses_of_peft(family, bias):
    make, targets, task = FAMILIES[family]
    # From where a new adapter starts, which is the same on either side.
    fields = {"r": 24, "target_modules": targets, "task_type": task, "bias": bias}
    here = get_peft_model(make(), VeraConfig(**fields))
    there = peft.get_peft_model(make(), peft.VeraConfig(**fields))
    before = {name: p.detach().clone() for name, p in here.named_parameters() if p.requires_grad}
    own, theirs = (train(model.train(), task, 0.03) for model in (here, there))
    assert own == pytest.approx(theirs, rel=0, abs=1e-5)
    assert own[-1] < own[0] - 0.1
    trained, other = dict(here.named_parameters()), dict(there.named_parameters())
    for name, start in before.items():
        assert not torch.equal(trained[name], start), name
        torch.testing.assert_close(trained[name], other[name], rtol=0, atol=1e-3)
