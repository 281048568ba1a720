"""Optimizer groups: the parts of an adapter and everything else each train at a rate of their own."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

_BANK = {"vblora_vector_bank"}
_LOGITS = {"vblora_logits_A", "vblora_logits_B"}
_LAMBDA = {"vera_lambda_b", "vera_lambda_d"}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    vector_bank_lr: float = 1e-3,
    logits_lr: float = 1e-2,
    lambda_lr: float = 4e-3,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of an adapted model into groups for a torch optimizer.

    Every parameter with `requires_grad` is in exactly one group; empty groups are left out. Each group also carries a
    "name": "vector_bank", "logits", "lambda", "other", or "other_no_decay" (biases and scales, which are not decayed).

        optimizer = torch.optim.AdamW(parameter_groups(model))

    Args:
        model: a model with VB-LoRA or VeRA adapters.
        lr: rate of whatever is trained beside them (biases, `modules_to_save`); None for the optimizer's own.
        vector_bank_lr: rate of the vector bank; the default is that of the VB-LoRA paper.
        logits_lr: rate of the logits; the default is that of the paper.
        lambda_lr: rate of VeRA's scales; the default is that of the VeRA paper for instruction tuning. It takes up to
            ten times as much for smaller models.
        weight_decay: for every group but "other_no_decay".
    Returns:
        The groups, in the order above.
    Raises:
        ValueError: a rate or the decay is negative or not finite, or the model has nothing to train.
    """
    rates = {"lr": lr, "vector_bank_lr": vector_bank_lr, "logits_lr": logits_lr, "lambda_lr": lambda_lr}
    rates["weight_decay"] = weight_decay
    for name, value in rates.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` is {value}; give a finite number of at least 0.")
    groups: dict[str, dict[str, Any]] = {
        "vector_bank": {"lr": vector_bank_lr, "weight_decay": weight_decay},
        "logits": {"lr": logits_lr, "weight_decay": weight_decay},
        "lambda": {"lr": lambda_lr, "weight_decay": weight_decay},
        "other": {"lr": lr, "weight_decay": weight_decay},
        "other_no_decay": {"lr": lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter)].append(parameter)
    if not any(members.values()):
        raise ValueError(
            "`model` has no trainable parameter: its adapters are frozen or missing. Load them with "
            "`is_trainable=True`, or put one on with `get_peft_model`."
        )
    return [
        {"name": name, "params": members[name], **{key: value for key, value in settings.items() if value is not None}}
        for name, settings in groups.items()
        if members[name]
    ]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    # Whole components of the dotted name: an adapter may be called anything, also "vblora_logits_A2".
    components = set(name.split("."))
    if components & _BANK:
        return "vector_bank"
    if components & _LOGITS:
        return "logits"
    if components & _LAMBDA:
        return "lambda"
    return "other" if parameter.dim() > 1 else "other_no_decay"
