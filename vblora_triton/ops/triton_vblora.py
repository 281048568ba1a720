"""The adapted linear as operators, into new memory or into the base layer's output."""

import math
from typing import Any

import torch
from torch import Tensor

from vblora_triton.ops.register import (
    below_autograd,
    define,
    define_differentiable,
    first_derivative_only,
    scatter,
)
from vblora_triton.ops.support import as_rows, on_device

# indices_A, weights_A: (r, in/b, topk), int32 and fp32; indices_B, weights_B: (out/b, r, topk).
Selection = tuple[Tensor, Tensor, Tensor, Tensor]


def _empty_selection(logits_A: Tensor, logits_B: Tensor, topk: int) -> Selection:
    shape_A, shape_B = (*logits_A.shape[:-1], topk), (*logits_B.shape[:-1], topk)
    return (
        logits_A.new_empty(shape_A, dtype=torch.int32),
        logits_A.new_empty(shape_A, dtype=torch.float32),
        logits_A.new_empty(shape_B, dtype=torch.int32),
        logits_A.new_empty(shape_B, dtype=torch.float32),
    )


def products(
    x: Tensor,
    base_out: Tensor | None,
    selection: Selection,
    logits: tuple[Tensor, Tensor] | None,
    vector_bank: Tensor,
    r: int,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
) -> Tensor:
    """out = base_out + dropout(x) A^T B^T; from the selection, or writing it, where `logits` are given. Returns s."""
    from vblora_triton.kernels.dropout import Dropout
    from vblora_triton.kernels.expand import launch_expand_fwd
    from vblora_triton.kernels.shrink import launch_shrink_fwd

    x_rows, N = x.reshape(-1, x.shape[-1]), out.shape[-1]
    base_rows = None if base_out is None else base_out.reshape(-1, N)
    logits_A, logits_B = (None, None) if logits is None else map(as_rows, logits)
    bank = vector_bank.contiguous()
    partials = launch_shrink_fwd(x_rows, bank, *selection[:2], logits_A, r, Dropout.of(dropout_p, seed))
    return launch_expand_fwd(partials, base_rows, bank, *selection[2:], logits_B, out.view(-1, N))


def _forward(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from vblora_triton.kernels.tuning import FEW_ROWS

    r = logits_A.shape[0]
    if x.numel() == 0 or out.numel() == 0:
        # Nothing to multiply, no launch: backward looks at none of these either.
        without_update(out, base_out)
        return _forward_fake_(x, out, logits_A, logits_B, vector_bank, topk, dropout_p, seed)
    with on_device(x.device):
        logits = None
        if x.numel() <= FEW_ROWS * x.shape[-1]:
            logits = (logits_A, logits_B)
            selection = _empty_selection(logits_A, logits_B, topk)
        else:
            selection = _select(logits_A, logits_B, topk)
        s = products(x, base_out, selection, logits, vector_bank, r, dropout_p, seed, out)
    return s, *selection


def without_update(out: Tensor, base_out: Tensor | None) -> Tensor:
    return out.zero_() if base_out is None else out.copy_(base_out)


def _linear_fwd(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    out = empty_out(x, base_out, logits_B.shape[0] * vector_bank.shape[1])
    return out, *_forward(x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed, out)


def empty_out(x: Tensor, base_out: Tensor | None, N: int) -> Tensor:
    return (x if base_out is None else base_out).new_empty((*x.shape[:-1], N))


def _linear_fwd_fake(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    out = empty_out(x, base_out, logits_B.shape[0] * vector_bank.shape[1])
    return out, *_forward_fake_(x, out, logits_A, logits_B, vector_bank, topk, dropout_p, seed)


def _linear_fwd_(
    x: Tensor,
    base_out: Tensor,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed, base_out)


def _forward_fake_(
    x: Tensor,
    base_out: Tensor,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = x.new_empty((math.prod(x.shape[:-1]), logits_A.shape[0]), dtype=torch.float32)
    return s, *_empty_selection(logits_A, logits_B, topk)


def _backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, logits_A, logits_B and vector_bank that `needs` asks for, in this order."""
    from vblora_triton.kernels.dropout import Dropout
    from vblora_triton.kernels.expand import launch_expand_bwd
    from vblora_triton.kernels.parameters import launch_parameter_grads
    from vblora_triton.kernels.partials import launch_sum_partials
    from vblora_triton.kernels.shrink import launch_shrink_bwd

    need_x, need_logits_A, need_logits_B, need_bank = needs
    need_dA, need_dB = need_logits_A or need_bank, need_logits_B or need_bank
    if x.numel() == 0 or dy.numel() == 0:
        empty = _backward_fake(
            dy, x, s, indices_A, weights_A, indices_B, weights_B, vector_bank, dtype_A, dtype_B, dropout_p, seed, needs
        )
        return [grad.zero_() for grad in empty]
    x_rows, dy_rows, bank = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), vector_bank.contiguous()
    A, B = (indices_A, weights_A), (indices_B, weights_B)
    # Of x's shape from the start: a view of it autograd could not add to in place.
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    dA = None
    with on_device(x.device):
        ds_partials, dB = launch_expand_bwd(dy_rows, s, bank, *B, need_ds=need_x or need_dA, need_dB=need_dB)
        if ds_partials is not None:
            dropout = Dropout.of(dropout_p, seed)
            ds = launch_sum_partials(ds_partials)
            dx_rows = None if dx is None else dx.view(x_rows.shape)
            dA = launch_shrink_bwd(x_rows, ds, bank, *A, dropout, dx_rows, need_dA=need_dA)
        grads = launch_parameter_grads(
            dA,
            dB,
            bank,
            (*A, *B),
            _logits_shapes(indices_A, indices_B, vector_bank),
            (dtype_A, dtype_B),
            need_logits_A=need_logits_A,
            need_logits_B=need_logits_B,
            need_bank=need_bank,
        )
    return [g for g in (dx, *grads) if g is not None]


def _logits_shapes(indices_A: Tensor, indices_B: Tensor, bank: Tensor) -> tuple[torch.Size, torch.Size]:
    return torch.Size((*indices_A.shape[:2], bank.shape[0])), torch.Size((*indices_B.shape[:2], bank.shape[0]))


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    shape_A, shape_B = _logits_shapes(indices_A, indices_B, vector_bank)
    like = ((x.shape, x.dtype), (shape_A, dtype_A), (shape_B, dtype_B), (vector_bank.shape, vector_bank.dtype))
    return [x.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


def save(ctx: Any, x: Tensor, vector_bank: Tensor, seed: Tensor | None, dropout_p: float, *results: Tensor) -> None:
    ctx.save_for_backward(x, *results, vector_bank, seed)
    ctx.dropout_p = dropout_p


def gradients(ctx: Any, dy: Tensor, needs: list[bool], dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor | None]:
    """The gradients of x, logits_A, logits_B and vector_bank; None where not needed."""
    if not any(needs):
        return [None] * 4
    *saved, seed = ctx.saved_tensors
    with below_autograd():
        grads = torch.ops.vblora_triton.vblora_linear_bwd(dy, *saved, *dtypes, ctx.dropout_p, seed, needs)
    return scatter(needs, grads)


class _Linear(torch.autograd.Function):
    linear_in = 2

    @staticmethod
    def forward(ctx, x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed):
        with below_autograd():
            y, *results = torch.ops.vblora_triton.vblora_linear_fwd(
                x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed
            )
        save(ctx, x, vector_bank, seed, dropout_p, *results)
        ctx.dtypes = (logits_A.dtype, logits_B.dtype)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        need_x, need_base, *need_parameters = ctx.needs_input_grad[:5]
        dx, *grads = gradients(ctx, dy, [need_x, *need_parameters], ctx.dtypes)
        return dx, dy if need_base else None, *grads, None, None, None


class _LinearInPlace(_Linear):
    @staticmethod
    def forward(ctx, x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed):
        with below_autograd():
            results = torch.ops.vblora_triton.vblora_linear_fwd_(
                x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed
            )
        save(ctx, x, vector_bank, seed, dropout_p, *results)
        ctx.dtypes = (logits_A.dtype, logits_B.dtype)
        ctx.mark_dirty(base_out)
        return base_out


def linear_(
    x: Tensor,
    base_out: Tensor,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """`torch.ops.vblora_triton.vblora_linear`, written into base_out, which is contiguous. Not for torch.compile."""
    return _LinearInPlace.apply(x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed)


def _select(logits_A: Tensor, logits_B: Tensor, topk: int) -> Selection:
    from vblora_triton.kernels.select import launch_select

    with on_device(logits_A.device):
        indices_A, weights_A, indices_B, weights_B = launch_select(as_rows(logits_A), as_rows(logits_B), topk)
    shape_A, shape_B = (*logits_A.shape[:-1], topk), (*logits_B.shape[:-1], topk)
    return indices_A.view(shape_A), weights_A.view(shape_A), indices_B.view(shape_B), weights_B.view(shape_B)


_PARAMETERS = "Tensor logits_A, Tensor logits_B, Tensor vector_bank, int topk, float dropout_p, Tensor? seed"
_LINEAR = "Tensor x, Tensor? base_out, " + _PARAMETERS
SELECTION = "Tensor indices_A, Tensor weights_A, Tensor indices_B, Tensor weights_B"

define("vblora_select", "Tensor logits_A, Tensor logits_B, int topk", f"({SELECTION})", _select, _empty_selection)
define("vblora_linear_fwd", _LINEAR, f"(Tensor y, Tensor s, {SELECTION})", _linear_fwd, _linear_fwd_fake)
define(
    "vblora_linear_fwd_",
    "Tensor x, Tensor(a!) base_out, " + _PARAMETERS,
    f"(Tensor s, {SELECTION})",
    _linear_fwd_,
    _forward_fake_,
)
define(
    "vblora_linear_bwd",
    f"Tensor dy, Tensor x, Tensor s, {SELECTION}, Tensor vector_bank, ScalarType dtype_A, ScalarType dtype_B, "
    "float dropout_p, Tensor? seed, bool[] needs",
    "Tensor[]",
    _backward,
    _backward_fake,
)
define_differentiable("vblora_linear", _LINEAR, _Linear, "vblora_linear_fwd", _linear_fwd_fake)
