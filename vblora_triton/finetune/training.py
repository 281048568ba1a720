"""Training through transformers.Trainer, and what is measured on a model: held-out loss, logits, step times."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from vblora_triton.finetune.data import IGNORED
from vblora_triton.finetune.processes import is_main, world_size
from vblora_triton.ops import use_backend

WARMUP_SHARE = 0.05

# What every training here asks of Trainer: to train, show a bar, keep quiet, and write nothing. The labels are named
# because Trainer finds them by itself only where the model is one of transformers' own, or of peft's.
_TRAINER: dict[str, Any] = {
    "log_level": "error",
    "logging_nan_inf_filter": False,
    "disable_tqdm": False,
    "label_names": ["labels"],
    "remove_unused_columns": False,
    # There are none, and looking for them takes time.
    "ddp_find_unused_parameters": False,
}


@dataclass(frozen=True)
class Checkpoints:
    """What a training keeps on its way.

    folder: for Trainer's checkpoints, the newest two.    every: so many steps.    resume: the one to go on from.
    """

    folder: Path
    every: int | None
    resume: Path | None


class _Rows(Dataset):
    """Rows of token ids, as a causal language model takes them; it shifts the labels itself."""

    def __init__(self, sequences: Tensor, labels: Tensor) -> None:
        self.sequences, self.labels = sequences, labels

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.labels[index]}


def _batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put rows together, without the columns behind the last label: they change nothing before them."""
    columns = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    length = int((columns["labels"] != IGNORED).any(0).nonzero().max()) + 1
    return {name: column[:, :length] for name, column in columns.items()}


class _LossBar(TrainerCallback):
    """A progress bar with the loss in it, in place of Trainer's, which prints a line for each.

    A loss that is not finite ends the training: no later step would mend it.
    """

    def __init__(self, what: str, steps: int) -> None:
        self.bar = tqdm(total=steps, desc=what, dynamic_ncols=True, disable=not is_main())

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.bar.set_postfix(loss=f"{loss:.3f}")
        if not math.isfinite(loss):
            control.should_training_stop = True


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a short linear warm-up, then half a cosine down to 0."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(
    model: nn.Module,
    sequences: Tensor,
    groups: list[dict[str, Any]],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    what: str,
    use_cpu: bool,
    scale_loss: bool = False,
    labels: Tensor | None = None,
    checkpoints: Checkpoints | None = None,
    report_to: Sequence[str] = (),
) -> list[tuple[int, float]]:
    """Train a causal language model with AdamW through transformers.Trainer; leaves it in eval mode.

    Args:
        model: trained in place; it is moved to the GPU unless `use_cpu`.
        sequences: (n, seq_len) int64, gone through in an order that `seed` decides, as often as the steps need.
        groups: of the optimizer, each with its learning rate.
        batch_size: sequences in a step, shared by the processes that there are.
        what: stands before the progress bar.
        scale_loss: scale the loss up for the backward pass (float16 on a GPU, whose small gradients would vanish).
        labels: (n, seq_len) int64, IGNORED where a token is not to be learned; all are by default.
        checkpoints: to keep and to go on from; none by default.
        report_to: names of what Trainer reports its losses to, such as "tensorboard".
    Returns:
        (step, mean training loss since the last one), at up to about 50 steps.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    config: Any = model.config
    use_cache = getattr(config, "use_cache", None)
    every = checkpoints.every if checkpoints else None
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch if checkpoints is None else str(checkpoints.folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size // world_size(),
            seed=seed,
            use_cpu=use_cpu,
            fp16=scale_loss,
            logging_steps=max(1, steps // 50),
            dataloader_pin_memory=not use_cpu,
            save_strategy="no" if every is None else "steps",
            save_steps=every or steps,
            save_total_limit=2,
            report_to=list(report_to) or "none",
            **_TRAINER,
        )
        if not use_cpu and world_size() == 1:
            # One GPU in a process: Trainer would split every batch over all of them with DataParallel.
            arguments._setup_devices  # noqa: B018
            arguments._n_gpu = 1
        data = _Rows(sequences, sequences if labels is None else labels)
        both = (optimizer, rates)
        trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=both, data_collator=_batch)
        bar = _LossBar(what, steps)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(bar)
        # The model's own mean is the loss wanted; not every model takes the count of labels that Trainer would pass.
        trainer.model_accepts_loss_kwargs = False
        resume = checkpoints.resume if checkpoints else None
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        finally:
            # After Ctrl-C too, or it would be drawn once more over what is said then.
            bar.bar.close()
        # Takes autocast off the forward again, where scale_loss has put it on.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if use_cache is not None:
        # Trainer turns it off for training, and it would be off in the saved configuration.
        config.use_cache = use_cache
    model.eval()
    return [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]


def learned_tokens(labels: Tensor) -> int:
    """Count the tokens that a loss is over: each is predicted from those before it, so that the first is none."""
    return int((labels[:, 1:] != IGNORED).sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Tensor, batch_size: int, labels: Tensor | None = None) -> float:
    """Return the mean negative log-likelihood of a token, over sequences (n, seq_len), in nats; see `train`."""
    device = next(model.parameters()).device
    wanted = sequences if labels is None else labels
    total = 0.0
    for batch, label in zip(sequences.split(batch_size), wanted.split(batch_size), strict=True):
        # A mean of means weighted by their numbers of tokens is the mean over tokens.
        loss = model(input_ids=batch.to(device), labels=label.to(device)).loss
        total += float(loss) * learned_tokens(label)
    return total / learned_tokens(wanted)


@torch.no_grad()
def logits(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return a model's logits (n, seq_len, vocabulary) for sequences (n, seq_len), on the CPU."""
    return model(input_ids=sequences.to(next(model.parameters()).device)).logits.cpu()


def step_milliseconds(model: nn.Module, sequences: Tensor, backend: str, repeats: int = 10) -> float:
    """Measure a training step (forward and backward) on the GPU with one backend; the median, in milliseconds.

    Leaves the parameters as they are and no gradients.
    """
    batch = sequences.to(next(model.parameters()).device)
    times = []
    model.train()
    with use_backend(backend):
        # The first three compile the kernels and fill the allocator.
        for repeat in range(3 + repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(input_ids=batch, labels=batch).loss.backward()
            torch.cuda.synchronize()
            if repeat >= 3:
                times.append(1e3 * (time.perf_counter() - start))
            model.zero_grad(set_to_none=True)
    model.eval()
    return statistics.median(times)
