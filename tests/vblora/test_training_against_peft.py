"""Trained on the same data from the same state, a model learns here what it learns with PEFT, step by step."""

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from tests.models import VOCABULARY, enlarge, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from vblora_triton import VBLoRAConfig, get_peft_model
from vblora_triton.checkpoint import adapter_state_dict

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set")

FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16, "topk": 2}
STEPS = 20


def tiny_roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3)
    return RobertaForSequenceClassification(config).eval()


# Model, targets (None: the defaults, which are PEFT's own there), task.
FAMILIES = {
    "llama": (tiny_llama, None, "CAUSAL_LM"),
    "llama-all": (tiny_llama, "all-linear", "CAUSAL_LM"),
    "opt": (tiny_opt, None, "CAUSAL_LM"),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj"], "CAUSAL_LM"),
    "t5": (tiny_t5, None, "SEQ_2_SEQ_LM"),
    "bert": (tiny_bert, ["query", "value"], "SEQ_CLS"),
    "roberta": (tiny_roberta, ["query", "value", "dense"], "SEQ_CLS"),
}


def batches(task: str) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(STEPS):
        # Few tokens and one class, so that there is something to learn.
        ids = torch.randint(3, 8, (4, 7), generator=generator)
        labels = torch.full((4,), 2) if task == "SEQ_CLS" else ids
        found.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return found


def train(model, task: str) -> list[float]:
    model.train()
    # The base models' own dropout draws the same in both.
    torch.manual_seed(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    losses = []
    for batch in batches(task):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bias", ["none", "vblora_only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_adamw_give_the_losses_of_peft(family, bias):
    make, targets, task = FAMILIES[family]
    fields = FIELDS | {"target_modules": targets, "task_type": task, "bias": bias}
    here = enlarge(get_peft_model(make(), VBLoRAConfig(**fields)))
    there = peft.get_peft_model(make(), peft.VBLoRAConfig(**fields))
    loaded = peft.set_peft_model_state_dict(there, adapter_state_dict(here.base_model, "default"))
    assert not loaded.unexpected_keys
    own, theirs = train(here, task), train(there, task)
    assert own == pytest.approx(theirs, rel=0, abs=1e-5)
    assert own[-1] < own[0] - 0.1
