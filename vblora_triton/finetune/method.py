"""What a run has to know of each method: its options, its configuration, its rates, and the two forms of its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vblora_triton import ops
from vblora_triton.tuner.config import PeftConfig
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vera.config import VeraConfig


@dataclass(frozen=True)
class Method:
    """One method of the command.

    title: names it for the reader.
    fields: the options that become fields of its configuration, and their defaults for a model of the user's.
    rates: the options that are learning rates, under the names that `parameter_groups` has, and their defaults there.
    embedded: what of these is another for the small embedded model.
    form: the field that says in which of two forms the adapter is saved, and its values for the full and the small one.
    small: the name of the small form in the report; its folder is "adapter-<small>", with hyphens.
    forms: how the table calls the full and the small form.
    small_file: how it calls the file of the small one.
    lora_r: the rank of the LoRA adapter that the sizes are compared with; None for the same rank.
    probe: runs the method's op once on x (1, 16) and returns what it gives.
    """

    title: str
    config_class: Callable[..., PeftConfig]
    fields: Mapping[str, int]
    rates: Mapping[str, float]
    embedded: Mapping[str, float]
    form: tuple[str, Any, Any]
    small: str
    forms: tuple[str, str]
    small_file: str
    lora_r: int | None
    probe: Callable[[Tensor, Any, str], Tensor]

    @property
    def folder(self) -> str:
        """Name the folder of the small form."""
        return f"adapter-{self.small.replace('_', '-')}"


def _probe_vblora(x: Tensor, config: Any, backend: str) -> Tensor:
    logits = torch.ones(2, config.r, config.num_vectors, device=x.device).unsqueeze(2)
    bank = torch.ones(config.num_vectors, 16, device=x.device)
    return ops.vblora_linear(x, None, logits[0], logits[1].transpose(0, 1), bank, config.topk, backend=backend)


def _probe_vera(x: Tensor, config: Any, backend: str) -> Tensor:
    A, ones = torch.ones(config.r, 16, device=x.device), torch.ones(max(16, config.r), device=x.device)
    return ops.vera_linear(x, None, ones[:16], ones[: config.r], A, A.T.contiguous(), backend=backend)


METHODS = {
    "vblora": Method(
        title="VB-LoRA",
        config_class=VBLoRAConfig,
        # vector_length: one that fits any layer, until the longest that fits them is known.
        fields={"r": 4, "num_vectors": 256, "vector_length": 1, "topk": 2},
        rates={"vector_bank_lr": 1e-3, "logits_lr": 1e-2},
        # A bank of 256 would outweigh its logits, and the loss falls by 17 % in 250 steps with these rates, 8 % with
        # the paper's.
        embedded={"num_vectors": 64, "vector_bank_lr": 1e-2, "logits_lr": 1e-1},
        form=("save_only_topk_weights", False, True),
        small="topk",
        forms=("full logits", "top-k only"),
        small_file="top-k file",
        lora_r=None,
        probe=_probe_vblora,
    ),
    "vera": Method(
        title="VeRA",
        config_class=VeraConfig,
        fields={"r": 256, "projection_prng_key": 0},
        rates={"lambda_lr": 4e-3},
        # Projections of rank 256 would be a tenth of the small model. After 100 steps of rank 64 the loss is 2.20 at
        # 1e-1, and 2.29 at 4e-2.
        embedded={"r": 64, "lambda_lr": 1e-1},
        form=("save_projection", True, False),
        small="without_projections",
        forms=("with projections", "without projections"),
        small_file="one without projections",
        # VeRA's own rank would make it a far larger adapter.
        lora_r=4,
        probe=_probe_vera,
    ),
}
