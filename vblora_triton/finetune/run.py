"""A whole fine-tuning run: train, save, reload, merge, compare, report."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vblora_triton.errors import InputError
from vblora_triton.finetune import advice, checkpoints
from vblora_triton.finetune import base as bases
from vblora_triton.finetune import output as outputs
from vblora_triton.finetune import report as reports
from vblora_triton.finetune.options import Options, Plan, check
from vblora_triton.finetune.processes import from_main, is_main, leave, rank
from vblora_triton.finetune.training import (
    Checkpoints,
    held_out_loss,
    learned_tokens,
    logits,
    step_milliseconds,
    train,
)
from vblora_triton.ops import backends_that_run, use_backend
from vblora_triton.optim import parameter_groups
from vblora_triton.peft_model import PeftModel, get_peft_model

# How many tokens' logits are compared: enough to see a difference, few enough to hold those of a large vocabulary.
COMPARED_TOKENS = 512


@dataclass(frozen=True)
class Adapted:
    """A trained model and what was measured on it.

    losses: (step, training loss).
    backend: what computed the adapter in training.
    step_ms: backend -> milliseconds of a training step; empty on a CPU.
    """

    model: PeftModel
    base_bytes: int
    loss_before: float
    loss_after: float
    losses: list[tuple[int, float]]
    seconds: float
    backend: str
    step_ms: dict[str, float]


def finetune(options: Options) -> None:
    """Fine-tune, write the results to `options.output`, and print what was measured.

    Of several processes the first one prints and writes, and all train.

    Raises:
        InputError: something asked for cannot be done. Nothing has been written but checkpoints that were asked for.
    """
    with bases.quiet():
        try:
            plan = check(options)
        except InputError:
            if is_main():
                raise
            # The first process finds the same, and says it.
            raise SystemExit(2) from None
    try:
        with use_backend(options.backend):
            report, source = _run(plan)
    except InputError as error:
        if is_main():
            raise
        raise InputError(f"process {rank()}: {error}") from error
    finally:
        leave()
    if report is not None:
        _tell(plan, *report, source)


def _say(*lines: str) -> None:
    if is_main():
        print(*lines, sep="\n", flush=True)


def _run(plan: Plan) -> tuple[tuple[reports.Report, Adapted] | None, str]:
    """Do all the work, and return what was measured, in the first process; and where the base model is."""
    options = plan.options
    _say(
        f"{plan.method.title} on {plan.base.title}: {len(plan.layers)} layers, backend {plan.backend} on {plan.device}."
    )
    if plan.left_out:
        _say(
            f"{plan.left_out:,} examples are left out: their answers begin beyond --seq-len {options.seq_len}.",
        )
    with tempfile.TemporaryDirectory() as scratch:
        source = plan.base.source or _embedded(plan, Path(scratch))
        try:
            # Not for a model from the hub, whose download shows its progress.
            with bases.quiet() if os.path.isdir(source) else nullcontext():
                model = _load(plan, source)
            with bases.quiet():
                adapted = _adapt(plan, model)
                if not is_main():
                    return None, source
                report = _write(plan, adapted, source)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"The GPU's memory does not hold it ({bases.one_line(error)}); lower --batch-size or --seq-len, or "
                "give a narrower --dtype."
            ) from None
    return (report, adapted), source


def _embedded(plan: Plan, scratch: Path) -> str:
    """Return the folder of the default base model, which is trained now unless the run that is resumed did."""
    options = plan.options
    kept = checkpoints.folder_of(plan.output) / outputs.BASE
    if options.resume and kept.is_dir():
        return str(kept)
    _say("First the base model itself, from scratch, on English text (pydoc's help topics):")
    folder = scratch / outputs.BASE
    with bases.quiet():
        bases.train_embedded(
            plan.base.config,
            str(folder),
            dtype=plan.dtype,
            steps=options.pretraining_steps,
            seed=options.seed,
            use_cpu=plan.device.type == "cpu",
        )
    if options.checkpoint_every is not None and is_main():
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    text = "the given text" if options.data else "Python source code (the standard library)"
    _say(f"Now it is frozen and adapted to {text}:")
    # transformers writes in the first process alone.
    return from_main(str(folder))


def _tell(plan: Plan, report: reports.Report, adapted: Adapted, source: str) -> None:
    """Print what was measured, what was written, and what to do with it."""
    sequences, lora_r = plan.sequences, _lora_rank(plan)
    labels = sequences.held_out if sequences.held_out_labels is None else sequences.held_out_labels
    tokens = learned_tokens(labels)
    _say("", reports.table(report, plan.base.title, held_out_tokens=tokens, lora_r=lora_r, step_ms=adapted.step_ms))
    if warning := advice.size_warning(report, lora_r):
        _say("", warning)
    written = ", ".join(name for name in outputs.results() if (plan.output / name).exists())
    _say("", f"Written to {plan.output}: {written}")
    if plan.options.load_in_4bit:
        _say("The base is in 4 bits, to which merging rounds; merge into the unquantised model to lose nothing by it.")
    if not (plan.output / outputs.PLOT).exists():
        _say(advice.no_picture())
    tokenizer = str(plan.output / outputs.BASE) if plan.base.source is None else source
    adapter, merged = plan.output / plan.method.forms[0].folder, plan.output / "merged"
    _say("", "To load it, generate and merge, in Python:", "")
    _say(advice.next_steps(adapter, tokenizer, merged, "def " if not plan.options.data else "Once"))


def _load(plan: Plan, source: str) -> nn.Module:
    """Return the base model with its weights, where it is to run."""
    if plan.options.load_in_4bit:
        return bases.load(source, plan.dtype, four_bits_on=plan.device)
    return bases.load(source, plan.dtype).to(plan.device)


def _adapt(plan: Plan, model: nn.Module) -> Adapted:
    """Put the adapter on a base model and train it."""
    options, held_out = plan.options, plan.sequences.held_out
    base_bytes = reports.model_bytes(model)
    scored = (held_out, options.batch_size, plan.sequences.held_out_labels)
    before = held_out_loss(model, *scored)
    if not math.isfinite(before):
        raise InputError(
            f"The loss of {plan.base.title} is {before} before any training; its weights are broken, or --dtype is too "
            "narrow for it: try float32."
        )
    torch.manual_seed(options.seed)
    adapted = get_peft_model(model, plan.config)
    kept = None
    if options.checkpoint_every is not None or options.resume:
        kept = Checkpoints(
            checkpoints.folder_of(plan.output),
            options.checkpoint_every,
            checkpoints.newest(plan.output) if options.resume else None,
        )
        if is_main():
            checkpoints.begin(plan.output, options)
    if "tensorboard" in options.report_to:
        # Its writer is told in no other way.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(plan.output / "runs"))
    start = time.perf_counter()
    with backends_that_run() as ran:
        losses = train(
            adapted,
            plan.sequences.train,
            parameter_groups(adapted, **plan.rates),
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            what="adapter",
            use_cpu=plan.device.type == "cpu",
            scale_loss=plan.device.type == "cuda" and plan.dtype == torch.float16,
            labels=plan.sequences.train_labels,
            checkpoints=kept,
            report_to=options.report_to,
        )
    seconds = time.perf_counter() - start
    after = held_out_loss(adapted, *scored)
    if not math.isfinite(after):
        rates = " and ".join(f"--{name.replace('_', '-')} ({rate:g})" for name, rate in plan.rates.items())
        raise InputError(
            f"Training diverged: the held-out loss went from {before:.4f} to {after}. Nothing was written; lower "
            f"{rates}."
        )
    backend = " and ".join(sorted(ran)) or plan.backend
    return Adapted(adapted, base_bytes, before, after, losses, seconds, backend, _step_times(plan, adapted))


def _step_times(plan: Plan, model: nn.Module) -> dict[str, float]:
    """Time a training step with both backends, where kernels ran on a GPU; a CPU's times say nothing about them."""
    if plan.device.type != "cuda" or plan.backend != "triton":
        return {}
    batch = plan.sequences.train[: plan.options.batch_size]
    return {backend: step_milliseconds(model, batch, backend) for backend in ("triton", "reference")}


def _write(plan: Plan, adapted: Adapted, source: str) -> reports.Report:
    """Save the adapter in both forms, compare what comes back, and write the report; all of it or nothing."""
    model = adapted.model
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with outputs.all_or_nothing(plan.output) as folder:
        _save(plan, model, folder, source)
        sizes = {"base": adapted.base_bytes}
        for form in plan.method.forms:
            sizes[form.key] = (folder / form.folder / "adapter_model.safetensors").stat().st_size
        sizes["lora"] = reports.lora_bytes(plan.layers, _lora_rank(plan))
        report = reports.Report(
            method=plan.options.method,
            backend=adapted.backend,
            loss_before=adapted.loss_before,
            loss_after=adapted.loss_after,
            trainable_parameters=trainable,
            bytes=sizes,
            max_abs_diff=_differences(plan, model, folder, source),
            steps=plan.options.steps,
            seconds=round(adapted.seconds, 3),
        )
        report.write(folder / outputs.REPORT)
        reports.plot(folder / outputs.PLOT, adapted.losses, report)
    checkpoints.finish(plan.output)
    return report


def _lora_rank(plan: Plan) -> int:
    return plan.method.lora_r or plan.config.r


def _save(plan: Plan, model: PeftModel, folder: Path, source: str) -> None:
    config = model.peft_config["default"]
    if plan.base.source is None:
        # Contents alone: some of its files are private to this user.
        shutil.copytree(source, folder / outputs.BASE, copy_function=shutil.copyfile)
        # From the adapter's own folder, so that the results can be moved together.
        config.base_model_name_or_path = f"../{outputs.BASE}"
    # The full form last, as which the model is trained.
    for form in reversed(plan.method.forms):
        vars(config).update(form.fields)
        model.save_pretrained(str(folder / form.folder))


def _differences(plan: Plan, model: PeftModel, folder: Path, source: str) -> dict[str, float]:
    """Compare the logits of the trained model with those of the reloaded and the merged one; `model` is used up."""
    held_out = plan.sequences.held_out
    compared = held_out[: max(1, COMPARED_TOKENS // held_out.shape[1])]
    trained = logits(model, compared)
    with warnings.catch_warnings():
        # The table shows by how much.
        warnings.filterwarnings("ignore", "The base weights are quantised")
        merged_model = model.merge_and_unload()
    merged = logits(merged_model, compared)
    # Callers still hold it, and the next model needs its memory.
    if not plan.options.load_in_4bit:
        merged_model.to("meta")

    def reloaded(name: str) -> Tensor:
        base = _load(plan, source)
        return logits(PeftModel.from_pretrained(base, str(folder / name)).eval(), compared)

    def largest(other: Tensor) -> float:
        return (other.double() - trained.double()).abs().max().item()

    differences = {f"reloaded_{form.key}": largest(reloaded(form.folder)) for form in plan.method.forms}
    return differences | {"merged": largest(merged)}
