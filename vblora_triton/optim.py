"""Optimizer groups: the parts of an adapter and everything else each train at a rate of their own."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vblora_triton.methods import methods


def parameter_groups(
    model: nn.Module, *, lr: float | None = None, weight_decay: float = 0.0, **rates: float
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of an adapted model into groups for a torch optimizer.

    Every parameter with `requires_grad` is in exactly one group; empty groups are left out. Each group also carries a
    "name": "vector_bank", "logits", "lambda", "other", or "other_no_decay" (biases and scales, which are not decayed).

        optimizer = torch.optim.AdamW(parameter_groups(model))

    Args:
        model: a model with VB-LoRA or VeRA adapters.
        lr: rate of whatever is trained beside them (biases, `modules_to_save`); None for the optimizer's own.
        weight_decay: for every group but "other_no_decay".
        rates: of the parts of an adapter, each by default that of its paper: `vector_bank_lr` (1e-3) and `logits_lr`
            (1e-2) of VB-LoRA; `lambda_lr` of VeRA, its scales (4e-3, for instruction tuning; smaller models take up to
            ten times as much).
    Returns:
        The groups, in the order above.
    Raises:
        ValueError: a rate or the decay is negative or not finite, or the model has nothing to train.
        TypeError: there is no such rate.
    """
    parts = {rate: (rate[:-3], part) for method in methods().values() for rate, part in method.rates.items()}
    unknown = [name for name in rates if name not in parts]
    if unknown:
        raise TypeError(f"`{unknown[0]}` is no rate of an adapter's part; there are {', '.join(parts)}.")
    for name, value in {"lr": lr, "weight_decay": weight_decay, **rates}.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` is {value}; give a finite number of at least 0.")
    groups: dict[str, dict[str, Any]] = {
        name: {"lr": rates.get(rate, part.default), "weight_decay": weight_decay}
        for rate, (name, part) in parts.items()
    }
    groups["other"] = {"lr": lr, "weight_decay": weight_decay}
    groups["other_no_decay"] = {"lr": lr, "weight_decay": 0.0}
    group_of = {attribute: name for name, part in parts.values() for attribute in part.parameters}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # An adapter's parameter ends in its attribute and the adapter's name, which may be that of an attribute.
            *_, whole, attribute, _ = ("", "", *name.split("."))
            own = group_of.get(attribute) if whole != "modules_to_save" else None
            members[own or ("other" if parameter.dim() > 1 else "other_no_decay")].append(parameter)
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
