"""The kernels as PyTorch operators: schemas, implementations, fake implementations and autograd formulas.

`ops` has checked the arguments; nothing here does again. Kernels are imported at the first call, so that importing the
package needs neither triton nor a GPU.

Each public operator has an autograd.Function as its Autograd kernel (the cheapest form that torch.compile and opcheck
accept), whose two halves are operators themselves, opaque to the compiler.
"""

import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Limits of the kernels; ops' documentation names them.
MAX_RANK = 64
MAX_TOPK = 1024
MAX_VECTORS = 65536
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("vblora_triton", "DEF")


def unfit(topk: int, r: int, num_vectors: int, *tensors: Tensor) -> tuple[type[Exception], str] | None:
    """Why the kernels cannot run on these arguments: the error to raise and the reason, or None where they can."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return TypeError, f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
    if r > MAX_RANK:
        return ValueError, f"r is {r}, its limit {MAX_RANK}"
    if topk > MAX_TOPK:
        return ValueError, f"topk is {topk}, its limit {MAX_TOPK}"
    if num_vectors > MAX_VECTORS:
        return ValueError, f"the bank has {num_vectors} vectors, its limit is {MAX_VECTORS}"
    # Nothing that asks a device can be traced; a graph is compiled for one that runs it.
    reason = None if torch.compiler.is_compiling() else _unfit_device(tensors[0].device)
    return None if reason is None else (ValueError, reason)


@lru_cache
def _unfit_device(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None
    if device.type == "cpu":
        from vblora_triton.kernels.launch import is_interpreted

        if is_interpreted():
            return None
        return "the tensors are on the CPU, and TRITON_INTERPRET=1 was not set before triton was imported"
    return f"the tensors are on {device.type}"


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows(logits: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _linear_fwd(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from vblora_triton.kernels.expand import launch_expand_fwd
    from vblora_triton.kernels.select import launch_select
    from vblora_triton.kernels.shrink import Dropout, launch_shrink_fwd

    if x.numel() == 0:
        # No row, no launch: backward looks at none of these either.
        return _linear_fwd_fake(x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed)
    r, tiles_A, _ = logits_A.shape
    N = logits_B.shape[0] * vector_bank.shape[1]
    x_rows = x.reshape(-1, x.shape[-1])
    base_rows = None if base_out is None else base_out.reshape(-1, N)
    bank = vector_bank.contiguous()
    with _on_device(x.device):
        indices, weights = launch_select(_rows(logits_A), _rows(logits_B), topk)
        rows_A = r * tiles_A
        planes = launch_shrink_fwd(x_rows, bank, indices[:rows_A], weights[:rows_A], r, Dropout.of(dropout_p, seed))
        dtype = x.dtype if base_out is None else base_out.dtype
        y, s = launch_expand_fwd(planes, base_rows, bank, indices[rows_A:], weights[rows_A:], N, dtype)
    return y.view(*x.shape[:-1], N), s, indices, weights


def _linear_fwd_fake(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r, tiles_A, _ = logits_A.shape
    rows = r * tiles_A + r * logits_B.shape[0]
    y_like = x if base_out is None else base_out
    return (
        y_like.new_empty((*x.shape[:-1], logits_B.shape[0] * vector_bank.shape[1])),
        x.new_empty((math.prod(x.shape[:-1]), r), dtype=torch.float32),
        x.new_empty((rows, topk), dtype=torch.int32),
        x.new_empty((rows, topk), dtype=torch.float32),
    )


def _linear_bwd(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    indices: Tensor,
    weights: Tensor,
    vector_bank: Tensor,
    shape_A: list[int],
    shape_B: list[int],
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, logits_A, logits_B and vector_bank that `needs` asks for, in this order."""
    from vblora_triton.kernels.expand import launch_expand_bwd
    from vblora_triton.kernels.parameters import launch_parameter_grads, launch_sum_planes
    from vblora_triton.kernels.shrink import Dropout, launch_shrink_bwd

    need_x, need_logits_A, need_logits_B, need_bank = needs
    need_dA, need_dB = need_logits_A or need_bank, need_logits_B or need_bank
    x_rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    bank = vector_bank.contiguous()
    rows_A = shape_A[0] * shape_A[1]
    if x.numel() == 0:
        empty = _linear_bwd_fake(
            dy, x, s, indices, weights, vector_bank, shape_A, shape_B, dtype_A, dtype_B, dropout_p, seed, needs
        )
        return [grad.zero_() for grad in empty]
    dx = dA = None
    dropout = Dropout.of(dropout_p, seed)
    with _on_device(x.device):
        ds_planes, dB = launch_expand_bwd(
            dy_rows, s, bank, indices[rows_A:], weights[rows_A:], need_ds=need_x or need_dA, need_dB=need_dB
        )
        if ds_planes is not None:
            ds = launch_sum_planes(ds_planes)
            dx, dA = launch_shrink_bwd(
                x_rows, ds, bank, indices[:rows_A], weights[:rows_A], dropout, need_dx=need_x, need_dA=need_dA
            )
        grads = launch_parameter_grads(
            dA,
            dB,
            bank,
            indices,
            weights,
            (torch.Size(shape_A), torch.Size(shape_B)),
            (dtype_A, dtype_B),
            need_logits_A=need_logits_A,
            need_logits_B=need_logits_B,
            need_bank=need_bank,
        )
    return [g for g in (None if dx is None else dx.view(x.shape), *grads) if g is not None]


def _linear_bwd_fake(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    indices: Tensor,
    weights: Tensor,
    vector_bank: Tensor,
    shape_A: list[int],
    shape_B: list[int],
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    shapes_dtypes = (
        (x.shape, x.dtype),
        (shape_A, dtype_A),
        (shape_B, dtype_B),
        (vector_bank.shape, vector_bank.dtype),
    )
    return [
        x.new_empty(tuple(shape), dtype=dtype)
        for (shape, dtype), need in zip(shapes_dtypes, needs, strict=True)
        if need
    ]


def _scatter(needs: list[bool], grads: list[Tensor]) -> list[Tensor | None]:
    given = iter(grads)
    return [next(given) if need else None for need in needs]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed):
        with torch._C._AutoDispatchBelowAutograd():
            y, s, indices, weights = torch.ops.vblora_triton.vblora_linear_fwd(
                x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p, seed
            )
        ctx.save_for_backward(x, s, indices, weights, vector_bank, seed)
        ctx.dropout_p = dropout_p
        ctx.shapes_dtypes = (logits_A.shape, logits_B.shape, logits_A.dtype, logits_B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_x, need_base, *need_parameters = ctx.needs_input_grad[:5]
        needs = [need_x, *need_parameters]
        grads: list[Tensor] = []
        if any(needs):
            x, s, indices, weights, vector_bank, seed = ctx.saved_tensors
            with torch._C._AutoDispatchBelowAutograd():
                grads = torch.ops.vblora_triton.vblora_linear_bwd(
                    dy, x, s, indices, weights, vector_bank, *ctx.shapes_dtypes, ctx.dropout_p, seed, needs
                )
        dx, *parameter_grads = _scatter(needs, grads)
        return dx, dy if need_base else None, *parameter_grads, None, None, None


def _compose_fwd(logits: Tensor, vector_bank: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    from vblora_triton.kernels.compose import launch_compose_fwd
    from vblora_triton.kernels.select import launch_select

    rows, bank = _rows(logits), vector_bank.contiguous()
    with _on_device(logits.device):
        indices, weights = launch_select(rows, rows[:0], topk)
        out = launch_compose_fwd(bank, indices, weights)
    return out.view(*logits.shape[:-1], bank.shape[1]), indices, weights


def _compose_fwd_fake(logits: Tensor, vector_bank: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(logits.shape[:-1])
    return (
        vector_bank.new_empty((*logits.shape[:-1], vector_bank.shape[1])),
        logits.new_empty((rows, topk), dtype=torch.int32),
        logits.new_empty((rows, topk), dtype=torch.float32),
    )


def _compose_bwd(
    d_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    vector_bank: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of logits and vector_bank that `needs` asks for, in this order."""
    from vblora_triton.kernels.parameters import launch_parameter_grads

    rows, h = indices.shape[0], vector_bank.shape[0]
    # The rows are those of one A of rank 1, as wide as all mixtures together.
    with _on_device(d_out.device):
        d_logits, _, d_bank = launch_parameter_grads(
            d_out.reshape(1, 1, -1).float().contiguous(),
            None,
            vector_bank.contiguous(),
            indices,
            weights,
            (torch.Size((1, rows, h)), torch.Size((0, 1, h))),
            (dtype, dtype),
            need_logits_A=needs[0],
            need_logits_B=False,
            need_bank=needs[1],
        )
    return [g for g in (None if d_logits is None else d_logits.view(shape), d_bank) if g is not None]


def _compose_bwd_fake(
    d_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    vector_bank: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    grads = (d_out.new_empty(tuple(shape), dtype=dtype), torch.empty_like(vector_bank))
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, vector_bank, topk):
        with torch._C._AutoDispatchBelowAutograd():
            out, indices, weights = torch.ops.vblora_triton.compose_fwd(logits, vector_bank, topk)
        ctx.save_for_backward(indices, weights, vector_bank)
        ctx.shape_dtype = (logits.shape, logits.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        needs = list(ctx.needs_input_grad[:2])
        indices, weights, vector_bank = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            grads = torch.ops.vblora_triton.compose_bwd(d_out, indices, weights, vector_bank, *ctx.shape_dtype, needs)
        return *_scatter(needs, grads), None


def _define(name: str, arguments: str, returns: str, implementation: Callable, fake: Callable) -> None:
    _library.define(f"{name}({arguments}) -> {returns}")
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"vblora_triton::{name}", fake, lib=_library)


def _define_differentiable(name: str, arguments: str, function: Any, fwd: str, fwd_fake: Callable) -> None:
    """Define the public operator `name`, which returns the first result of the operator `fwd`."""

    def forward(*args):
        return getattr(torch.ops.vblora_triton, fwd)(*args)[0]

    def autograd(*args):
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*args)

    _define(name, arguments, "Tensor", forward, lambda *args: fwd_fake(*args)[0])
    _library.impl(name, autograd, "Autograd")


_LINEAR = (
    "Tensor x, Tensor? base_out, Tensor logits_A, Tensor logits_B, Tensor vector_bank, int topk, float dropout_p, "
    "Tensor? seed"
)
_define("vblora_linear_fwd", _LINEAR, "(Tensor, Tensor, Tensor, Tensor)", _linear_fwd, _linear_fwd_fake)
_define(
    "vblora_linear_bwd",
    "Tensor dy, Tensor x, Tensor s, Tensor indices, Tensor weights, Tensor vector_bank, SymInt[] shape_A, "
    "SymInt[] shape_B, ScalarType dtype_A, ScalarType dtype_B, float dropout_p, Tensor? seed, bool[] needs",
    "Tensor[]",
    _linear_bwd,
    _linear_bwd_fake,
)
_define_differentiable("vblora_linear", _LINEAR, _Linear, "vblora_linear_fwd", _linear_fwd_fake)

_COMPOSE = "Tensor logits, Tensor vector_bank, int topk"
_define("compose_fwd", _COMPOSE, "(Tensor, Tensor, Tensor)", _compose_fwd, _compose_fwd_fake)
_define(
    "compose_bwd",
    "Tensor d_out, Tensor indices, Tensor weights, Tensor vector_bank, SymInt[] shape, ScalarType dtype, bool[] needs",
    "Tensor[]",
    _compose_bwd,
    _compose_bwd_fake,
)
_define_differentiable("compose", _COMPOSE, _Compose, "compose_fwd", _compose_fwd_fake)
