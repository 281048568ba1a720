"""The numbers of a run, as a table for the reader, as report.json, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.methods import methods

# What the format calls torch's dtypes, without the number of bits.
_SAFETENSORS_KINDS = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U", "bool": "BOOL"}


@dataclass(frozen=True)
class Report:
    """What a run measured.

    backend: what computed the adapter in training: "triton", "cpu" or "reference".
    bytes: of the weight files: "base", "full", its method's small form ("topk", "without_projections"), "lora".
    max_abs_diff: of logits from the trained model's: "reloaded_full", "reloaded_" and the small form, "merged".
    seconds: that adapting took.
    """

    method: str
    backend: str
    loss_before: float
    loss_after: float
    trainable_parameters: int
    bytes: dict[str, int]
    max_abs_diff: dict[str, float]
    steps: int
    seconds: float

    def write(self, path: Path) -> None:
        """Write the numbers as JSON, each field under its name."""
        path.write_text(json.dumps(vars(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def safetensors_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> int:
    """Compute the size of a safetensors file from its tensors' names, dtypes and shapes.

    8 bytes of length + a JSON header padded to a multiple of 8 + the data
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # As the format's writer orders them: the widest elements first, then by name.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        kind = str(dtype).removeprefix("torch.").rstrip("0123456789")
        dtype_name = _SAFETENSORS_KINDS.get(kind, kind) + ("" if dtype == torch.bool else str(8 * dtype.itemsize))
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def lora_bytes(layers: Mapping[str, tuple[int, int]], r: int) -> int:
    """Compute the size of the file that a LoRA adapter of rank r would have.

    Args:
        layers: name in the base model -> (in_features, out_features) of each adapted layer.
    """
    tensors: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for name, (in_features, out_features) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (torch.float32, (r, in_features))
        tensors[f"base_model.model.{name}.lora_B.weight"] = (torch.float32, (out_features, r))
    return safetensors_bytes(tensors)


def model_bytes(model: nn.Module) -> int:
    """Compute the size of a model's weights as one safetensors file; tied weights count once."""
    unique: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        unique.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return safetensors_bytes({name: (tensor.dtype, tensor.shape) for name, tensor in unique.values()})


def table(report: Report, title: str, *, held_out_tokens: int, lora_r: int, step_ms: Mapping[str, float]) -> str:
    """Lay a report out for the terminal.

    Args:
        title: names the base model.
        held_out_tokens: that the losses are means over.
        lora_r: rank of the LoRA adapter that the sizes are compared with.
        step_ms: backend -> milliseconds of a training step, where they were measured.
    """
    change = 100 * (report.loss_after / report.loss_before - 1)
    base, method = report.bytes["base"], methods()[report.method]

    def size(label: str, key: str) -> tuple[str, str]:
        return label, f"{report.bytes[key]:,} ({100 * report.bytes[key] / base:.3g} % of the base)"

    def difference(label: str, key: str) -> tuple[str, str]:
        value = report.max_abs_diff[key]
        return label, "0 (exactly)" if value == 0 else f"{value:.1e}"

    sections: list[tuple[str, list[tuple[str, str]]]] = [
        (
            f"Held-out loss (nats per token, over {held_out_tokens:,} tokens)",
            [
                ("before (base model alone)", f"{report.loss_before:.4f}"),
                ("after", f"{report.loss_after:.4f} ({change:+.1f} %)"),
            ],
        ),
        (
            "Size of the weights on disk (bytes)",
            [
                ("base model", f"{base:,}"),
                size(f"LoRA, r={lora_r}, same layers (computed)", "lora"),
                *(size(f"{method.title} adapter, {form.label}", form.key) for form in method.forms),
            ],
        ),
        (
            "Largest absolute difference of logits from the trained model's",
            [
                *(difference(f"reloaded from the {form.file}", f"reloaded_{form.key}") for form in method.forms),
                difference("merged into the base", "merged"),
            ],
        ),
        (
            "Run",
            [
                ("trainable parameters", f"{report.trainable_parameters:,}"),
                ("steps", f"{report.steps:,} in {report.seconds:.1f} s"),
                ("backend that ran", report.backend),
                *((f"forward + backward, {name}", f"{ms:.2f} ms") for name, ms in step_ms.items()),
            ],
        ),
    ]
    width = max(len(label) for _, rows in sections for label, _ in rows)
    lines = [f"{method.title} on {title}"]
    for heading, rows in sections:
        lines += ["", heading, *(f"  {label:<{width}}  {value}" for label, value in rows)]
    return "\n".join(lines)


def plot(path: Path, losses: Sequence[tuple[int, float]], report: Report) -> bool:
    """Draw the training loss between the held-out losses, where matplotlib is installed; say whether it was."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*losses, strict=True), label="training")
    axes.plot([0, report.steps], [report.loss_before, report.loss_after], "o", label="held out, before and after")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=methods()[report.method].title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
