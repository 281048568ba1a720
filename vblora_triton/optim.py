"""Optimizer groups, for the parts of an adapter each train at a rate of their own; and AdamW for sparse gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from vblora_triton.methods import methods
from vblora_triton.ops import selected_entries
from vblora_triton.vblora.layer import trained_logits


def parameter_groups(
    model: nn.Module, *, lr: float | None = None, weight_decay: float = 0.0, **rates: float
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of an adapted model into groups for a torch optimizer.

    Every parameter with `requires_grad` is in exactly one group; empty groups are left out. Each group also carries a
    "name": "vector_bank", "logits", "lambda", "other", or "other_no_decay" (biases and scales, which are not decayed).
    Logits carry the "topk" of their adapter, and adapters whose k differ have a group of logits each.

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
    made = []
    for name, settings in groups.items():
        given = {"name": name, **{key: value for key, value in settings.items() if value is not None}}
        if name == "logits":
            topk = trained_logits(model)
            for k in dict.fromkeys(topk[parameter] for parameter in members[name]):
                made.append(given | {"topk": k, "params": [p for p in members[name] if topk[p] == k]})
        elif members[name]:
            made.append(given | {"params": members[name]})
    return made


class LazyAdamW(torch.optim.Optimizer):
    """AdamW that touches, of each row of logits, the k entries alone that are selected: the others have no gradient.

        t <- t + 1
        for index in top_k(logits[row]), with g = gradient[row, index] and m, v, p of the same entry:
            p <- (1 - lr weight_decay) p
            m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
            p <- p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    It reads all logits once, to find the entries, where AdamW reads and writes parameters, gradients and two moments
    whole. It is another optimizer, not AdamW computed in another way: entries that are not selected keep their moments
    instead of letting them fade, stay where they are instead of moving on by what is left of their momentum, and are
    not decayed; t counts the steps of the tensor, not those of the entry. With k = num_vectors it is AdamW. All other
    groups train by AdamW. State dicts go both ways between the two.

        optimizer = LazyAdamW(parameter_groups(model))

    Not for CUDA graphs, nor for GradScaler's fused unscaling: t is a number on the CPU.

    Args:
        params: groups; those whose "name" is "logits", as `parameter_groups` calls them, are lazy.
        topk: k, of the adapters' configuration; by default the "topk" that each group of logits carries.
        lr, betas, eps, weight_decay: as torch.optim.AdamW has them.
    Raises:
        ValueError: a number is out of range, or k is not known, or is not that of the groups, which differ in it.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        topk: int | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        at_least = {"topk": (topk, 1), "lr": (lr, 0), "eps": (eps, 0), "weight_decay": (weight_decay, 0)}
        for name, (value, least) in at_least.items():
            if value is not None and not value >= least:
                raise ValueError(f"`{name}` is {value}; give at least {least}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` is {betas}; give two numbers of at least 0 and below 1.")
        super().__init__(params, {"topk": topk, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        known = {group["topk"] for group in self.param_groups if group.get("name") == "logits"}
        if (topk is None and None in known) or (topk is not None and len(known) > 1):
            names = " and ".join(sorted(map(str, known)))
            raise ValueError(
                f"`topk` is {topk}, and that of the groups of logits is {names}: "
                "give groups that `parameter_groups` has made, and no `topk`, or the one that holds for all."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; `closure`, where there is one, computes the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            found = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in found:
                if not self.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter].update(step=torch.tensor(0.0), **moments)
            if group.get("name") == "logits":
                for parameter in found:
                    self._step_selected(parameter, group)
            elif found:
                states = [self.state[parameter] for parameter in found]
                adamw(
                    found,
                    [parameter.grad for parameter in found],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    amsgrad=False,
                    maximize=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    **{name: group[name] for name in ("lr", "weight_decay", "eps")},
                )
        return loss

    def _step_selected(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["step"] += 1
        t = state["step"].item()
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        logits, grads, exp_avg, exp_avg_sq = (_own_rows(tensor) for tensor in tensors)
        entries = selected_entries(logits, self.defaults["topk"] or group["topk"])
        g, m, v, p = (rows.gather(1, entries) for rows in (grads, exp_avg, exp_avg_sq, logits))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scale = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        p.addcdiv_(m, scale, value=-group["lr"] / (1 - beta1**t))
        for rows, values in ((exp_avg, m), (exp_avg_sq, v), (logits, p)):
            rows.scatter_(1, entries, values)


def _own_rows(tensor: Any) -> Tensor:
    """Logits, or what goes with them, as the memory of the rows that this process holds: FSDP2 keeps whole rows."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.view(-1, own.shape[-1])
