"""The linear adapted by VeRA as operators: the projection of its input, and what is made of it."""

import math

import torch
from torch import Tensor

from vblora_triton.ops.register import (
    below_autograd,
    define,
    define_differentiable,
    first_derivative_only,
    scatter,
)
from vblora_triton.ops.support import on_device


def _project(x: Tensor, A: Tensor, wide: bool, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    from vblora_triton.kernels.dropout import Dropout
    from vblora_triton.kernels.vera import launch_project

    if x.numel() == 0:
        # The projection of nothing is zero, whatever there is of it.
        return tuple(t.zero_() for t in _project_fake(x, A, wide, dropout_p, seed))  # type: ignore[return-value]
    K = x.shape[-1]
    with on_device(x.device):
        return launch_project(x.reshape(-1, K), A[:, :K], Dropout.of(dropout_p, seed), all_fp32=wide)


def _project_fake(x: Tensor, A: Tensor, wide: bool, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    from vblora_triton.kernels.tuning import packs

    M = math.prod(x.shape[:-1])
    packed = packs(M, wide)
    values = x.new_empty((M, A.shape[0]), dtype=torch.int16 if packed else torch.float32)
    return values, x.new_empty((M if packed else 0,), dtype=torch.float32)


def _is_wide(x_dtype: torch.dtype, y_dtype: torch.dtype) -> bool:
    return x_dtype == y_dtype == torch.float32


def _update(
    base_out: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    out: Tensor,
    wide: bool,
) -> None:
    from vblora_triton.kernels.vera import ProjectedInput, launch_update

    N = lambda_b.shape[0]
    if out.numel() == 0:
        return
    base_rows = None if base_out is None else base_out.reshape(-1, N)
    with on_device(out.device):
        scales = lambda_b.contiguous(), lambda_d.contiguous()
        launch_update(ProjectedInput(values, scale), base_rows, *scales, B[:N], out.view(-1, N), all_fp32=wide)


def _linear_fwd(
    x: Tensor,
    base_out: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    out = _linear_fwd_fake(x, base_out, lambda_b, lambda_d, A, B, values, scale, dropout_p, seed)
    _update(base_out, lambda_b, lambda_d, B, values, scale, out, _is_wide(x.dtype, out.dtype))
    return out


def _linear_fwd_fake(
    x: Tensor,
    base_out: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return (x if base_out is None else base_out).new_empty((*x.shape[:-1], lambda_b.shape[0]))


def _linear_fwd_(
    base_out: Tensor, lambda_b: Tensor, lambda_d: Tensor, B: Tensor, values: Tensor, scale: Tensor, wide: bool
) -> None:
    _update(base_out, lambda_b, lambda_d, B, values, scale, base_out, wide)


def _linear_fwd_fake_(
    base_out: Tensor, lambda_b: Tensor, lambda_d: Tensor, B: Tensor, values: Tensor, scale: Tensor, wide: bool
) -> None:
    return None


def _backward(
    dy: Tensor,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    x_shape: list[int],
    x_dtype: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, lambda_b and lambda_d that `needs` asks for, in this order."""
    from vblora_triton.kernels.dropout import Dropout
    from vblora_triton.kernels.vera import ProjectedInput, launch_input_grad, launch_scale_grads

    need_x, *need_scales = needs
    grads = _backward_fake(
        dy, lambda_b, lambda_d, A, B, values, scale, x_shape, x_dtype, dropout_p, seed, needs
    )  # fmt: skip
    K, N = x_shape[-1], lambda_b.shape[0]
    if dy.numel() == 0 or K == 0:
        return [grad.zero_() for grad in grads]
    dy_rows, scales = dy.reshape(-1, N), (lambda_b.contiguous(), lambda_d.contiguous())
    wide = _is_wide(x_dtype, dy.dtype)
    with on_device(dy.device):
        if need_x:
            dropout = Dropout.of(dropout_p, seed)
            launch_input_grad(dy_rows, *scales, A[:, :K], B[:N], dropout, grads[0].view(-1, K), all_fp32=wide)
        if any(need_scales):
            both = launch_scale_grads(dy_rows, ProjectedInput(values, scale), *scales, B[:N], all_fp32=wide)
            grads[need_x:] = [grad for grad, need in zip(both, need_scales, strict=True) if need]
    return grads


def _backward_fake(
    dy: Tensor,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    x_shape: list[int],
    x_dtype: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    like = ((tuple(x_shape), x_dtype), (lambda_b.shape, lambda_b.dtype), (lambda_d.shape, lambda_d.dtype))
    return [dy.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


class _Linear(torch.autograd.Function):
    linear_in = 2

    @staticmethod
    def forward(ctx, x, base_out, lambda_b, lambda_d, A, B, values, scale, dropout_p, seed):
        # x is not saved: its gradient needs only its shape, and no gradient needs more of it than its projection.
        ctx.save_for_backward(lambda_b, lambda_d, A, B, values, scale, seed)
        ctx.x_shape, ctx.x_dtype, ctx.dropout_p = x.shape, x.dtype, dropout_p
        with below_autograd():
            return torch.ops.vblora_triton.vera_linear_fwd(
                x, base_out, lambda_b, lambda_d, A, B, values, scale, dropout_p, seed
            )

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        need_x, need_base, *need_scales = ctx.needs_input_grad[:4]
        needs = [need_x, *need_scales]
        grads: list[Tensor] = []
        if any(needs):
            *saved, seed = ctx.saved_tensors
            with below_autograd():
                grads = torch.ops.vblora_triton.vera_linear_bwd(
                    dy, *saved, ctx.x_shape, ctx.x_dtype, ctx.dropout_p, seed, needs
                )
        dx, *scales = scatter(needs, grads)
        return dx, dy if need_base else None, *scales, None, None, None, None, None, None


class _LinearInPlace(_Linear):
    @staticmethod
    def forward(ctx, x, base_out, lambda_b, lambda_d, A, B, values, scale, dropout_p, seed):
        ctx.save_for_backward(lambda_b, lambda_d, A, B, values, scale, seed)
        ctx.x_shape, ctx.x_dtype, ctx.dropout_p = x.shape, x.dtype, dropout_p
        with below_autograd():
            wide = _is_wide(x.dtype, base_out.dtype)
            torch.ops.vblora_triton.vera_linear_fwd_(base_out, lambda_b, lambda_d, B, values, scale, wide)
        ctx.mark_dirty(base_out)
        return base_out


def linear_(
    x: Tensor,
    base_out: Tensor,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """`torch.ops.vblora_triton.vera_linear`, written into base_out, which is contiguous. Not for torch.compile."""
    return _LinearInPlace.apply(x, base_out, lambda_b, lambda_d, A, B, values, scale, dropout_p, seed)


_PROJECTED = "Tensor values, Tensor scale"
_LINEAR = (
    f"Tensor x, Tensor? base_out, Tensor lambda_b, Tensor lambda_d, Tensor A, Tensor B, {_PROJECTED}, "
    "float dropout_p, Tensor? seed"
)

define(
    "vera_project",
    "Tensor x, Tensor A, bool wide, float dropout_p, Tensor? seed",
    f"({_PROJECTED})",
    _project,
    _project_fake,
)
define("vera_linear_fwd", _LINEAR, "Tensor", _linear_fwd, _linear_fwd_fake)
define(
    "vera_linear_fwd_",
    f"Tensor(a!) base_out, Tensor lambda_b, Tensor lambda_d, Tensor B, {_PROJECTED}, bool wide",
    "()",
    _linear_fwd_,
    _linear_fwd_fake_,
)
define(
    "vera_linear_bwd",
    f"Tensor dy, Tensor lambda_b, Tensor lambda_d, Tensor A, Tensor B, {_PROJECTED}, SymInt[] x_shape, "
    "ScalarType x_dtype, float dropout_p, Tensor? seed, bool[] needs",
    "Tensor[]",
    _backward,
    _backward_fake,
)
define_differentiable("vera_linear", _LINEAR, _Linear, "vera_linear_fwd", _linear_fwd_fake)
