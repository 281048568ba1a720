"""The adapted linear as operators from a selection that was made before: no logits, and no gradients of any."""

import math
from typing import Any

import torch
from torch import Tensor

from vblora_triton.ops.register import below_autograd, define, define_differentiable, first_derivative_only
from vblora_triton.ops.support import on_device
from vblora_triton.ops.triton_vblora import SELECTION, Selection, empty_out, gradients, products, save, without_update


def _selected_fwd(
    x: Tensor,
    base_out: Tensor | None,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = empty_out(x, base_out, indices_B.shape[0] * vector_bank.shape[1])
    selection = (indices_A, weights_A, indices_B, weights_B)
    return out, _selected(x, base_out, selection, vector_bank, dropout_p, seed, out)


def _selected_fwd_(x: Tensor, base_out: Tensor, *rest: Any) -> Tensor:
    *selection, vector_bank, dropout_p, seed = rest
    return _selected(x, base_out, tuple(selection), vector_bank, dropout_p, seed, base_out)


def _selected(
    x: Tensor,
    base_out: Tensor | None,
    selection: Selection,
    vector_bank: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
) -> Tensor:
    if x.numel() == 0 or out.numel() == 0:
        without_update(out, base_out)
        return _selected_fake_(x, base_out, *selection)
    with on_device(x.device):
        return products(x, base_out, selection, None, vector_bank, selection[0].shape[0], dropout_p, seed, out)


def _selected_fwd_fake(
    x: Tensor,
    base_out: Tensor | None,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = empty_out(x, base_out, indices_B.shape[0] * vector_bank.shape[1])
    return out, _selected_fake_(x, base_out, indices_A)


def _selected_fake_(x: Tensor, base_out: Tensor | None, indices_A: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((math.prod(x.shape[:-1]), indices_A.shape[0]), dtype=torch.float32)


class _Selected(torch.autograd.Function):
    linear_in = 2

    @staticmethod
    def forward(ctx, x, base_out, indices_A, weights_A, indices_B, weights_B, vector_bank, dropout_p, seed):
        selection = (indices_A, weights_A, indices_B, weights_B)
        with below_autograd():
            y, s = torch.ops.vblora_triton.vblora_linear_selected_fwd(
                x, base_out, *selection, vector_bank, dropout_p, seed
            )
        save(ctx, x, vector_bank, seed, dropout_p, s, *selection)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        need_x, need_base, *_, need_bank = ctx.needs_input_grad[:7]
        # No gradient of the logits: their dtypes do not matter.
        dx, _, _, dbank = gradients(ctx, dy, [need_x, False, False, need_bank], (torch.float32, torch.float32))
        return dx, dy if need_base else None, None, None, None, None, dbank, None, None


class _SelectedInPlace(_Selected):
    @staticmethod
    def forward(ctx, x, base_out, indices_A, weights_A, indices_B, weights_B, vector_bank, dropout_p, seed):
        selection = (indices_A, weights_A, indices_B, weights_B)
        with below_autograd():
            s = torch.ops.vblora_triton.vblora_linear_selected_fwd_(
                x, base_out, *selection, vector_bank, dropout_p, seed
            )
        save(ctx, x, vector_bank, seed, dropout_p, s, *selection)
        ctx.mark_dirty(base_out)
        return base_out


def linear_selected_(x: Tensor, base_out: Tensor, *rest: Any) -> Tensor:
    """`torch.ops.vblora_triton.vblora_linear_selected`, written into base_out; as `linear_`."""
    return _SelectedInPlace.apply(x, base_out, *rest)


_SELECTED_REST = f"{SELECTION}, Tensor vector_bank, float dropout_p, Tensor? seed"
_SELECTED = "Tensor x, Tensor? base_out, " + _SELECTED_REST

define("vblora_linear_selected_fwd", _SELECTED, "(Tensor y, Tensor s)", _selected_fwd, _selected_fwd_fake)
define(
    "vblora_linear_selected_fwd_",
    "Tensor x, Tensor(a!) base_out, " + _SELECTED_REST,
    "Tensor s",
    _selected_fwd_,
    _selected_fake_,
)
define_differentiable("vblora_linear_selected", _SELECTED, _Selected, "vblora_linear_selected_fwd", _selected_fwd_fake)
