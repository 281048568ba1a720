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

from vblora_triton.ops.modes import kept_beside
from vblora_triton.ops.register import Differentiable, Operator, on_device, rows_of


@cache
def _kernels() -> SimpleNamespace:
    """The launchers, which are imported at the first call of an operator."""
    from vblora_triton.kernels import dropout, vera

    found = {name: value for name, value in vars(vera).items() if name.startswith("launch_")}
    others = {name: getattr(vera, name) for name in ("ProjectedInput", "Scaled", "operand")}
    return SimpleNamespace(**found, **others, Dropout=dropout.Dropout)


def frozen_terms(A: Tensor, dtype: torch.dtype) -> Tensor:
    """[high; low; high] of A, (3 r, columns), where high + low = A to 16 bits in bf16, or 22 in fp16.

    Made once for all layers and adapters that share A, and kept beside it, on its device, while it has these values.
    """

    def made() -> Tensor:
        high = A.to(dtype)
        return torch.cat((high, (A.float() - high.float()).to(dtype), high))

    return kept_beside(A, dtype, made)


def _frozen(A: Tensor, x_dtype: torch.dtype, K: int, all_fp32: bool) -> Tensor:
    """What the products with A take."""
    return A[:, :K].float() if all_fp32 else frozen_terms(A, _kernels().operand(x_dtype))[:, :K]


_PROJECTED = "Tensor values, Tensor scale"


def _project(x: Tensor, A: Tensor, all_fp32: bool, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        # The projection of nothing is zero, whatever there is of it.
        values, scale = _project_fake(x, A, all_fp32, dropout_p, seed)
        return values.zero_(), scale.zero_()
    r, K = A.shape[0], x.shape[-1]
    with on_device(x.device):
        kernels, frozen = _kernels(), _frozen(A, x.dtype, K, all_fp32)
        return kernels.launch_project(rows_of(x), frozen, r, kernels.Dropout.of(dropout_p, seed), all_fp32=all_fp32)


def _project_fake(x: Tensor, A: Tensor, all_fp32: bool, *_: Any) -> tuple[Tensor, Tensor]:
    from vblora_triton.kernels.tuning import PACK_GROUP, cdiv, packed_columns

    M, r = math.prod(x.shape[:-1]), A.shape[0]
    if all_fp32:
        return x.new_empty((M, r)), x.new_empty(0, dtype=torch.bfloat16)
    values = x.new_empty((M, packed_columns(M, r)), dtype=torch.int16)
    return values, x.new_empty(M * cdiv(r, PACK_GROUP), dtype=torch.bfloat16)


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
        scaled, all_fp32 = (
            kernels.Scaled(B[:N], lambda_b.contiguous(), lambda_d.contiguous()),
            is_all_fp32(x.dtype, y.dtype),
        )
        with on_device(y.device):
            kernels.launch_update(projected, base_rows, scaled, rows_of(y), all_fp32=all_fp32)
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
    kernels, all_fp32 = _kernels(), is_all_fp32(x_dtype, dy.dtype)
    with on_device(dy.device):
        found = kernels.launch_bwd(
            rows_of(dy),
            kernels.ProjectedInput(values, scale),
            kernels.Scaled(B[:N], lambda_b.contiguous(), lambda_d.contiguous()),
            _frozen(A, x_dtype, K, all_fp32),
            kernels.Dropout.of(dropout_p, seed),
            rows_of(grads[0]) if need_x else None,
            need_scales=any(need_scales),
            all_fp32=all_fp32,
            add_to_dx=others_dx is not None,
        )
    if found is not None:
        grads[need_x:] = [grad for grad, need in zip(found, need_scales, strict=True) if need]
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
