"""Trainings go on as before when PEFT's layers run our ops: Trainer's, TRL's and a loop of one's own."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.integrations.peft_case import BOTH, by_peft, logits
from tests.integrations.test_trainer import adapter_values, assert_same_values, losses, rows
from vblora_triton import is_patched, patch_peft

pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

OPTIONS = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.2,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}


def with_transformers(model: nn.Module, folder: str) -> Trainer:
    return Trainer(model=model, args=TrainingArguments(output_dir=folder, **OPTIONS), train_dataset=rows(first=3))


def with_trl(model: nn.Module, folder: str) -> Trainer:
    trl = pytest.importorskip("trl")
    data = pytest.importorskip("datasets").Dataset.from_list(rows(first=3))
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    # In float32: under autocast PEFT rounds the adapters' products to 16 bits, and we do not.
    args = trl.SFTConfig(output_dir=folder, max_length=16, bf16=False, **OPTIONS)
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)


@BOTH
@pytest.mark.parametrize("make", [with_transformers, with_trl])
def test_ten_steps_have_the_losses_of_peft(make, method, tmp_path):
    runs = []
    for patched in (False, True):
        run = make(by_peft(method, task_type="CAUSAL_LM", **{f"{method}_dropout": 0.1}), str(tmp_path))
        with patch_peft() if patched else nullcontext():
            assert is_patched(run.model) == patched
            run.train()
        runs.append(run)
    expected, own = map(losses, runs)
    assert len(own) == OPTIONS["max_steps"]
    assert own == pytest.approx(expected, rel=0, abs=1e-5)
    assert own[-1] < own[0] - 0.1
    assert_same_values(*(adapter_values(run.model) for run in runs), rtol=1e-3, atol=1e-3)


def test_a_training_loop_patched_midway_goes_on_as_before():
    model, found = by_peft("vblora").train(), []
    for patched in (False, True):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=0.02)
        for step in range(6):
            if patched and step == 3:
                patch_peft(backend="reference")
                assert is_patched(copied)
            loss = logits(copied).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert found[6:] == pytest.approx(found[:6], rel=1e-5)
