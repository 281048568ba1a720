"""VeRA's kernels as operators: the projected input, and the adapted linear made of it.

With p = dropout(x) A^T, the projected input, which is all that backward keeps of x; formulas in kernels/vera.py.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vblora_triton.ops.register import Differentiable, Operator, on_device, rows_of


@cache
def _kernels() -> SimpleNamespace:
    """The launchers, which are imported at the first call of an operator."""
    from vblora_triton.kernels import dropout, vera

    found = {name: value for name, value in vars(vera).items() if name.startswith("launch_")}
    return SimpleNamespace(**found, Dropout=dropout.Dropout, ProjectedInput=vera.ProjectedInput)


_PROJECTED = "Tensor values, Tensor scale"


def _project(x: Tensor, A: Tensor, all_fp32: bool, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        # The projection of nothing is zero, whatever there is of it.
        values, scale = _project_fake(x, A, all_fp32, dropout_p, seed)
        return values.zero_(), scale.zero_()
    K = x.shape[-1]
    with on_device(x.device):
        kernels = _kernels()
        return kernels.launch_project(rows_of(x), A[:, :K], kernels.Dropout.of(dropout_p, seed), all_fp32=all_fp32)


def _project_fake(x: Tensor, A: Tensor, all_fp32: bool, *_: Any) -> tuple[Tensor, Tensor]:
    from vblora_triton.kernels.tuning import packs

    M = math.prod(x.shape[:-1])
    packed = packs(M, all_fp32)
    values = x.new_empty((M, A.shape[0]), dtype=torch.int16 if packed else torch.float32)
    return values, x.new_empty((M if packed else 0,), dtype=torch.float32)


project = Operator(
    "vera_project",
    "Tensor x, Tensor A, bool all_fp32, float dropout_p, Tensor? seed",
    f"({_PROJECTED})",
    _project,
    _project_fake,
)


def is_all_fp32(x: torch.dtype, y: torch.dtype) -> bool:
    """Say whether the activations on both sides are float32, and are multiplied as such."""
    return x == y == torch.float32


def _linear_fwd(
    y: Tensor,
    x: Tensor,
    base: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """Write y; nothing more is kept."""
    N = lambda_b.shape[0]
    if y.numel() > 0:
        kernels, base_rows = _kernels(), None if base is None else rows_of(base)
        projected = kernels.ProjectedInput(values, scale)
        scales, all_fp32 = (lambda_b.contiguous(), lambda_d.contiguous()), is_all_fp32(x.dtype, y.dtype)
        with on_device(y.device):
            kernels.launch_update(projected, base_rows, *scales, B[:N], rows_of(y), all_fp32=all_fp32)
    return ()


def _linear_bwd(
    dy: Tensor,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    x_shape: list[int],
    x_dtype: torch.dtype,
    needs: list[bool],
    others_dx: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of x, lambda_b and lambda_d that `needs` asks for, in this order.

    Args:
        others_dx: what that of x is added to, in place.
    """
    need_x, *need_scales = needs
    grads = _linear_bwd_fake(dy, lambda_b, lambda_d, A, B, values, scale, seed, dropout_p, x_shape, x_dtype, needs)
    K, N = x_shape[-1], lambda_b.shape[0]
    if dy.numel() == 0 or K == 0:
        grads = [grad.zero_() for grad in grads]
        return grads if others_dx is None else [others_dx, *grads[1:]]
    if others_dx is not None:
        grads[0] = others_dx
    kernels, dy_rows, scales = _kernels(), rows_of(dy), (lambda_b.contiguous(), lambda_d.contiguous())
    all_fp32 = is_all_fp32(x_dtype, dy.dtype)
    with on_device(dy.device):
        if need_x:
            dropout, dx_rows, adds = kernels.Dropout.of(dropout_p, seed), rows_of(grads[0]), others_dx is not None
            kernels.launch_input_grad(
                dy_rows, *scales, A[:, :K], B[:N], dropout, dx_rows, all_fp32=all_fp32, add_to_dx=adds
            )
        if any(need_scales):
            projected = kernels.ProjectedInput(values, scale)
            both = kernels.launch_scale_grads(dy_rows, projected, *scales, B[:N], all_fp32=all_fp32)
            grads[need_x:] = [grad for grad, need in zip(both, need_scales, strict=True) if need]
    return grads


def _linear_bwd_fake(dy: Tensor, lambda_b: Tensor, lambda_d: Tensor, *rest: Any) -> list[Tensor]:
    *_, x_shape, x_dtype, needs = rest
    like = ((tuple(x_shape), x_dtype), (lambda_b.shape, lambda_b.dtype), (lambda_d.shape, lambda_d.dtype))
    return [dy.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


def _linear_saved(kept: Any, x: Tensor, base: Any, *rest: Any) -> Any:
    # Not x: its gradient needs only its shape, and no gradient needs more of it than the projected input.
    *tensors, dropout_p, seed = rest
    return (*tensors, seed), (dropout_p, x.shape, x.dtype)


linear = Differentiable(
    "vera_linear",
    f"Tensor x, Tensor? base, Tensor lambda_b, Tensor lambda_d, Tensor A, Tensor B, {_PROJECTED}, "
    "float dropout_p, Tensor? seed",
    "",
    allocate=lambda x, base, lambda_b, *_: (x if base is None else base).new_empty((*x.shape[:-1], len(lambda_b))),
    forward=_linear_fwd,
    fake=lambda *_: (),
    saved=_linear_saved,
    backward=Operator(
        "vera_linear_bwd",
        f"Tensor dy, Tensor lambda_b, Tensor lambda_d, Tensor A, Tensor B, {_PROJECTED}, Tensor? seed, "
        "float dropout_p, SymInt[] x_shape, ScalarType x_dtype, bool[] needs",
        "Tensor[]",
        _linear_bwd,
        _linear_bwd_fake,
    ),
    gradients=(0, 2, 3),
    has_base=True,
)
