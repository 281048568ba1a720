"""Whether a provider's results are right: no time is given to those that are not."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.providers import Adapt, ours
from bench.workloads import Workload

# Above twice the error of plain PyTorch in the same dtypes. Products in bf16 halves of float32 numbers keep 16 bits;
# autocast rounds parameters and every product to bf16.
FLOOR = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
AUTOCAST_FLOOR = 5e-2
# What plain PyTorch itself may be off by, before something is wrong with the definition or the machine. A whole model
# in 16 bits adds its layers' rounding up.
EAGER_LIMIT = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
MODEL_LIMIT = 0.3


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, or ||value|| where the truth is zero; infinite for NaN or a wrong shape."""
    if value.shape != truth.shape:
        return float("inf")
    difference, scale = (value.detach().double() - truth.double()).norm().item(), truth.double().norm().item()
    error = difference / scale if scale > 0 else difference
    return error if error == error else float("inf")


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The error of each result; infinite for one that is missing."""
    return {name: relative_error(results[name], t) if name in results else float("inf") for name, t in truth.items()}


def wide(case: Case) -> torch.dtype:
    """float64; float32 for whole models in 16 bits, whose float64 would not fit beside them."""
    return torch.float32 if case.suite in ("model", "decode") and case.dtype != "fp32" else torch.float64


def widened(workload: Workload, dtype: torch.dtype) -> Workload:
    """The same rounded inputs in a wide dtype."""
    other = Workload.__new__(Workload)
    # A whole model's activations in a wide dtype would not fit.
    case = replace(workload.case, checkpointing=True) if workload.case.suite == "model" else workload.case
    sets = [_widened(entry, dtype) for entry in workload.sets[:1]]
    other.__dict__ = dict(workload.__dict__, _optimizers={}, sets=sets, case=case)
    return other


def _widened(entry: tuple[Tensor, list[Tensor]], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x, dys = entry
    if x.is_floating_point():
        x = x.detach().to(dtype).requires_grad_(x.requires_grad)
    return x, [dy.to(dtype) for dy in dys]


def truth_of(case: Case, workload: Workload, base: nn.Module, adapt: Adapt | None = None) -> dict[str, Tensor]:
    """The results in a wide dtype, from the same rounded weights and inputs.

    Args:
        adapt: makes the model; by default the definition of the case's method, in plain PyTorch.
    """
    dtype = wide(case)
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # .to() of the copy itself would put wide weights into the parameters that it shares with the base.
        copied = copy.deepcopy(base).to(dtype)
        model = (adapt or ours("reference"))(case, copied).to(dtype)
        other = widened(workload, dtype)
        return {name: t.detach() for name, t in other.results(other.prepare(model)).items()}
    finally:
        torch.set_float32_matmul_precision(matmul)


def limits(eager: dict[str, float], dtype: str, autocast: bool) -> dict[str, float]:
    """2 err(plain PyTorch in the same dtypes) + a floor, for each result."""
    floor = AUTOCAST_FLOOR if autocast else FLOOR[dtype]
    return {name: 2 * error + floor for name, error in eager.items()}


def verdict(found: dict[str, float], allowed: dict[str, float]) -> str | None:
    """What is wrong, or None."""
    for name, error in found.items():
        # Not `error > allowed`: NaN must fail.
        if not error <= allowed.get(name, allowed.get("*", 0.0)):
            return f"{name}: relative error {error:.1e}, allowed {allowed.get(name, allowed.get('*', 0.0)):.1e}"
    return None


def eager_limit(case: Case) -> dict[str, float]:
    """What plain PyTorch itself is held to."""
    whole = case.suite in ("model", "decode") and case.dtype != "fp32"
    return {"*": MODEL_LIMIT if whole else EAGER_LIMIT[case.dtype]}
