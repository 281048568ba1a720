"""Composition on its own as an operator."""

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
from vblora_triton.ops.support import as_rows, on_device


def _forward(logits: Tensor, vector_bank: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    from vblora_triton.kernels.compose import launch_compose_fwd
    from vblora_triton.kernels.select import launch_select

    rows, bank = as_rows(logits), vector_bank.contiguous()
    with on_device(logits.device):
        indices, weights, *_ = launch_select(rows, rows[:0], topk)
        out = launch_compose_fwd(bank, indices, weights)
    return out.view(*logits.shape[:-1], bank.shape[1]), indices, weights


def _forward_fake(logits: Tensor, vector_bank: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(logits.shape[:-1])
    return (
        vector_bank.new_empty((*logits.shape[:-1], vector_bank.shape[1])),
        logits.new_empty((rows, topk), dtype=torch.int32),
        logits.new_empty((rows, topk), dtype=torch.float32),
    )


def _backward(
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
    with on_device(d_out.device):
        d_logits, _, d_bank = launch_parameter_grads(
            d_out.reshape(1, 1, -1).float().contiguous(),
            None,
            vector_bank.contiguous(),
            (indices, weights, indices, weights),
            (torch.Size((1, rows, h)), torch.Size((0, 1, h))),
            (dtype, dtype),
            need_logits_A=needs[0],
            need_logits_B=False,
            need_bank=needs[1],
        )
    return [g for g in (None if d_logits is None else d_logits.view(shape), d_bank) if g is not None]


def _backward_fake(
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
        with below_autograd():
            out, indices, weights = torch.ops.vblora_triton.compose_fwd(logits, vector_bank, topk)
        ctx.save_for_backward(indices, weights, vector_bank)
        ctx.shape_dtype = (logits.shape, logits.dtype)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_out):
        needs = list(ctx.needs_input_grad[:2])
        with below_autograd():
            grads = torch.ops.vblora_triton.compose_bwd(d_out, *ctx.saved_tensors, *ctx.shape_dtype, needs)
        return *scatter(needs, grads), None


_COMPOSE = "Tensor logits, Tensor vector_bank, int topk"
define("compose_fwd", _COMPOSE, "(Tensor out, Tensor indices, Tensor weights)", _forward, _forward_fake)
define(
    "compose_bwd",
    "Tensor d_out, Tensor indices, Tensor weights, Tensor vector_bank, SymInt[] shape, ScalarType dtype, bool[] needs",
    "Tensor[]",
    _backward,
    _backward_fake,
)
define_differentiable("compose", _COMPOSE, _Compose, "compose_fwd", _forward_fake)
