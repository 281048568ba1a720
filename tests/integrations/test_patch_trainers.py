"""Trainings by transformers' Trainer and TRL's SFTTrainer go on as before when PEFT's layers run our ops."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.integrations.peft_case import METHODS, by_peft
from tests.models import VOCABULARY
from vblora_triton import is_patched, patch_peft

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

STEPS = 10
TEXTS = ["a red fox", "a blue dog", "the red dog sat", "the fox ran", "a dog ran", "the blue fox sat"]
OPTIONS = {
    "max_steps": STEPS,
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


def adapted(method: str) -> nn.Module:
    return by_peft(method, task_type="CAUSAL_LM", **{f"{method}_dropout": 0.1})


def with_transformers(method: str, folder) -> Trainer:
    ids = torch.randint(3, 9, (16, 6), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row.clone()} for row in ids]
    return Trainer(model=adapted(method), args=TrainingArguments(output_dir=str(folder), **OPTIONS), train_dataset=data)


def tokenizer():
    """One token for each word, made in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    assert len(words) < VOCABULARY
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=16
    )


def with_trl(method: str, folder):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    return trl.SFTTrainer(
        model=adapted(method),
        # In float32: under autocast PEFT rounds the adapters' products to 16 bits, and we do not.
        args=trl.SFTConfig(output_dir=str(folder), max_length=16, bf16=False, **OPTIONS),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=tokenizer(),
    )


def train(make, method: str, folder) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = make(method, folder)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [with_transformers, with_trl])
def test_ten_steps_have_the_losses_of_peft(make, method, tmp_path):
    expected, parameters = train(make, method, tmp_path / "peft")
    with patch_peft():
        assert is_patched(make(method, tmp_path / "unused").model)
        losses, own = train(make, method, tmp_path / "patched")
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert own.keys() == parameters.keys()
    for name in own:
        torch.testing.assert_close(own[name], parameters[name], rtol=1e-3, atol=1e-3)
