"""Whether a provider's results are right: no time is given to those that are not.

The bound is that of the test suite, `tests.tolerance`. What has no counterpart there has a bound of its own here.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.providers import Adapt, ours
from bench.workloads import DTYPES, Workload
from tests.tolerance import allowed_error, relative_error

# Autocast rounds parameters and every product to bf16, which plain PyTorch in the same dtypes does not.
AUTOCAST_FLOOR = 5e-2
# Of whole models. Their loss is one number, which plain PyTorch may meet by chance, so that twice its error allows
# nothing; and for 16 bits the truth is in float32.
MODEL_FLOOR = {"fp32": 1e-5, "bf16": 1e-3}
# What plain PyTorch itself may be off by, before something is wrong with the definition or the device. A whole model
# in 16 bits adds its layers' rounding up.
EAGER_LIMIT = {"fp32": 1e-3, "bf16": 5e-2}
EAGER_MODEL_LIMIT = 0.3


class WrongError(Exception):
    """A result is off by more than it may be; the message says which."""


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The error of each result; infinite for one that is missing, holds NaN or has another shape."""
    found = {}
    for name, wanted in truth.items():
        same = name in results and results[name].shape == wanted.shape
        error = relative_error(results[name], wanted) if same else float("inf")
        found[name] = error if error == error else float("inf")
    return found


def is_whole(case: Case) -> bool:
    """Whether a case runs a whole model."""
    return case.suite in ("model", "decode")


def wide(case: Case) -> torch.dtype:
    """float64; float32 for whole models in 16 bits, whose float64 would not fit beside them."""
    return torch.float32 if is_whole(case) and case.dtype != "fp32" else torch.float64


def widened(workload: Workload, dtype: torch.dtype) -> Workload:
    """The same rounded inputs in a wide dtype."""
    other = copy.copy(workload)
    if workload.case.suite == "model":
        # A whole model's activations in a wide dtype would not fit.
        other.case = replace(workload.case, checkpointing=True)
    x, dys = workload.sets[0]
    if x.is_floating_point():
        x = x.detach().to(dtype).requires_grad_(x.requires_grad)
    other.sets = [(x, [dy.to(dtype) for dy in dys])]
    return other


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


def limits(case: Case, eager: dict[str, float], autocast: bool) -> dict[str, float]:
    """What each result may be off by, where plain PyTorch in the same dtypes is off by `eager`."""
    own_floor = AUTOCAST_FLOOR if autocast else MODEL_FLOOR[case.dtype] if is_whole(case) else None
    if own_floor is not None:
        return {name: 2 * error + own_floor for name, error in eager.items()}
    return {name: allowed_error(error, DTYPES[case.dtype]) for name, error in eager.items()}


def eager_limit(case: Case) -> float:
    """What plain PyTorch itself is held to."""
    return EAGER_MODEL_LIMIT if is_whole(case) and case.dtype != "fp32" else EAGER_LIMIT[case.dtype]


def check(found: dict[str, float], allowed: dict[str, float]) -> None:
    """Raise WrongError where an error is larger than what is allowed."""
    for name, error in found.items():
        if error > allowed[name]:
            raise WrongError(f"{name}: relative error {error:.1e}, allowed {allowed[name]:.1e}")
