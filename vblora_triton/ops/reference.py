"""Both methods in plain PyTorch: their definition, and the oracle that the other backends are tested against.

The shortest correct PyTorch, differentiable by autograd, without speed tricks. Shapes are checked in `ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Selection(NamedTuple):
    """What the logits of a layer select: their top-k indices, largest logit first, and softmax weights.

    indices_A, weights_A: (r, in/b, topk), int32 and float32.
    indices_B, weights_B: (out/b, r, topk), likewise.
    """

    indices_A: Tensor
    weights_A: Tensor
    indices_B: Tensor
    weights_B: Tensor


class FrozenLinear(NamedTuple):
    """A linear layer that is not trained, in the place of its result: y = x W^T + bias.

    weight: (out, in), any strides.
    bias: (out), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def again(self) -> Callable[[], Tensor] | None:
        """What makes the weight once more for backward, so that none of its size is kept; None: it is kept itself."""
        return None


class DequantizedLinear(FrozenLinear):
    """A FrozenLinear whose layer keeps a quantised weight, of which this one was made, and is made for backward."""

    _again: Callable[[], Tensor]

    def __new__(cls, weight: Tensor, bias: Tensor | None, again: Callable[[], Tensor]) -> DequantizedLinear:
        made = super().__new__(cls, weight, bias)
        made._again = again
        return made

    @property
    def again(self) -> Callable[[], Tensor]:
        """Makes the weight."""
        return self._again


class _MadeAgain(torch.autograd.Function):
    """F.linear with a frozen weight that is made again for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, again: Callable[[], Tensor]) -> Tensor:
        ctx.again, ctx.dtype = again, x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = (dy @ ctx.again().to(dy.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None


def frozen_product(x: Tensor, base: FrozenLinear) -> Tensor:
    """Return x W^T + bias, differentiable in x; in the weight and the bias too where that is not made again."""
    return F.linear(x, base.weight, base.bias) if base.again is None else _MadeAgain.apply(x, *base, base.again)


def select(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Choose, for each row of logits, its top-k entries and their weights.

    weights = softmax(top_k(logits))      (VB-LoRA, arXiv 2405.15179, eq. 2)

    Equal logits go to the lowest index; NaN counts as the largest value, so that it shows in the weights.

    Args:
        logits: (*rows, num_vectors), floating.
        topk: 1 <= topk <= num_vectors.
    Returns:
        indices (*rows, topk) int64, largest logit first, and weights (*rows, topk) in the dtype of `logits`.
    """
    # A stable sort, because torch.topk leaves the order of equal values open.
    indices = logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return indices, logits.gather(-1, indices).softmax(-1)


def selection(logits_A: Tensor, logits_B: Tensor, topk: int) -> Selection:
    """Select for both matrices of a layer; see `select`, and `Selection` for the dtypes.

    Args:
        logits_A, logits_B: see `low_rank_matrices`.
    """
    (indices_A, weights_A), (indices_B, weights_B) = select(logits_A, topk), select(logits_B, topk)
    return Selection(indices_A.int(), weights_A.float(), indices_B.int(), weights_B.float())


def compose(logits: Tensor, vector_bank: Tensor, topk: int) -> Tensor:
    """Mix, for each row of logits, its top-k bank vectors.

    out = sum_k softmax(top_k(logits))_k * vector_bank[index_k]      (VB-LoRA, eq. 2)

    Args:
        logits: (*rows, num_vectors), floating.
        vector_bank: (num_vectors, vector_length), floating.
        topk: 1 <= topk <= num_vectors.
    Returns:
        (*rows, vector_length), in the dtype of `vector_bank`.
    """
    return compose_selected(*select(logits, topk), vector_bank)


def compose_selected(indices: Tensor, weights: Tensor, vector_bank: Tensor) -> Tensor:
    """Mix bank vectors that were selected before: sum_k weights_k * vector_bank[indices_k].

    Args:
        indices: (*rows, topk), integer.
        weights: (*rows, topk), floating.
        vector_bank: (num_vectors, vector_length), floating.
    Returns:
        (*rows, vector_length), in the dtype of `vector_bank`.
    """
    # Long, because uint8 would index as a mask.
    return (weights.unsqueeze(-1) * vector_bank[indices.long()]).sum(-2).to(vector_bank.dtype)


def low_rank_matrices(logits_A: Tensor, logits_B: Tensor, vector_bank: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Put the composed bank vectors together into A and B.

    A[i, t*b:(t+1)*b] = compose(logits_A)[i, t]      B[t*b:(t+1)*b, i] = compose(logits_B)[t, i]

    Args:
        logits_A: (r, in/b, num_vectors).
        logits_B: (out/b, r, num_vectors).
        vector_bank: (num_vectors, b).
    Returns:
        A (r, in) and B (out, r), in the dtype of `vector_bank`.
    """
    return _placed(compose(logits_A, vector_bank, topk), compose(logits_B, vector_bank, topk))


def _placed(rows_A: Tensor, rows_B: Tensor) -> tuple[Tensor, Tensor]:
    return rows_A.flatten(1), rows_B.transpose(1, 2).flatten(0, 1)


def vblora_linear(
    x: Tensor,
    base: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """Add the low-rank update of VB-LoRA to the output of the base layer.

    out = base + dropout(x) A^T B^T      (VB-LoRA, section 3)

    The update is computed in the wider of the dtypes of `x` and the parameters, and added before the one rounding to
    the result's dtype.

    Args:
        x: (*batch, in).
        base: (*batch, out), or None for the update alone.
        logits_A, logits_B, vector_bank, topk: see `low_rank_matrices`.
        dropout_p: the probability that an element of x is dropped, in [0, 1].
    Returns:
        (*batch, out), in the dtype of `base`, or of `x` where there is none.
    """
    return _add_update(x, base, *low_rank_matrices(logits_A, logits_B, vector_bank, topk), dropout_p)


def vblora_linear_selected(
    x: Tensor,
    base: Tensor | None,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dropout_p: float = 0.0,
) -> Tensor:
    """`vblora_linear` from selections made before.

    Args:
        indices_A, weights_A: (r, in/b, topk), integer and floating.
        indices_B, weights_B: (out/b, r, topk).
        x, base, vector_bank, dropout_p: see `vblora_linear`.
    """
    rows = compose_selected(indices_A, weights_A, vector_bank), compose_selected(indices_B, weights_B, vector_bank)
    return _add_update(x, base, *_placed(*rows), dropout_p)


def vera_linear(
    x: Tensor,
    base: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    dropout_p: float = 0.0,
) -> Tensor:
    """Add the low-rank update of VeRA to the output of the base layer.

    out = base + lambda_b * ((lambda_d * (dropout(x) A[:, :in]^T)) B[:out]^T)      (VeRA, arXiv 2310.11454, eq. 2)

    The update is computed in the wider of the dtypes of `x`, `lambda_d` and A, and added before the one rounding to the
    result's dtype.

    Args:
        x: (*batch, in).
        base: (*batch, out), or None for the update alone.
        lambda_b: (out).
        lambda_d: (r).
        A: (r, at least in).
        B: (at least out, r).
        dropout_p: the probability that an element of x is dropped, in [0, 1].
    Returns:
        (*batch, out), in the dtype of `base`, or of `x` where there is none.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, A.dtype), lambda_d.dtype)
    A, B = A[:, : x.shape[-1]].to(dtype), B[: lambda_b.shape[0]].to(dtype)
    update = lambda_b * F.linear(lambda_d * F.linear(F.dropout(x, dropout_p).to(dtype), A), B)
    return update.to(x.dtype) if base is None else (base + update).to(base.dtype)


def _add_update(x: Tensor, base: Tensor | None, A: Tensor, B: Tensor, dropout_p: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, A.dtype)
    update = F.linear(F.linear(F.dropout(x, dropout_p).to(dtype), A.to(dtype)), B.to(dtype))
    return update.to(x.dtype) if base is None else (base + update).to(base.dtype)
