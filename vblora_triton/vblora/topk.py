"""The small form of logits: which entries are the top k, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from vblora_triton import reference


def index_dtype(num_vectors: int) -> torch.dtype:
    """Return the smallest dtype that files use for indices into a bank of this size."""
    if num_vectors < 2**8:
        return torch.uint8
    if num_vectors < 2**15:
        return torch.int16
    return torch.int32 if num_vectors < 2**31 else torch.int64


def encode_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Reduce logits to what inference needs of them.

    Args:
        logits: (*rows, num_vectors), floating.
        topk: entries to keep of each row.
    Returns:
        indices (*rows, topk), dtype `index_dtype`, and weights (*rows, topk - 1), float32: softmax(top_k(logits))
        without its last entry, which is what is missing to 1.
    """
    indices, weights = reference.select(logits.detach().float(), topk)
    return indices.to(index_dtype(logits.shape[-1])), weights[..., :-1].contiguous()


def decode_topk(indices: Tensor, weights: Tensor, num_vectors: int) -> Tensor:
    """Make logits that select these indices with these weights.

    logits[index_j] = log(weight_j), -inf elsewhere; weight_k = max(0, 1 - sum of the others)

    Args:
        indices: (*rows, topk), an integer dtype, from 0 to num_vectors - 1, no two of a row equal.
        weights: (*rows, topk - 1), floating; computed in float32.
    Returns:
        (*rows, num_vectors), float32.
    """
    weights = weights.float()
    # Rounding can bring the sum above 1, and the log of a negative number would be NaN.
    last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
    log_weights = torch.cat([weights, last], dim=-1).log()
    empty = torch.full((*indices.shape[:-1], num_vectors), -torch.inf, device=indices.device)
    return empty.scatter(-1, indices.long(), log_weights)


def topk_problem(indices: Tensor, weights: Tensor, num_vectors: int) -> str | None:
    """Say what makes a pair of tensors of a file no top-k form, or None."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        return f"indices of dtype {indices.dtype}, integers are needed"
    if not weights.is_floating_point():
        return f"weights of dtype {weights.dtype}, floating ones are needed"
    wide = indices.long()
    if wide.numel() and (wide.min() < 0 or wide.max() >= num_vectors):
        return f"indices from {wide.min()} to {wide.max()}, where the bank has 0 to {num_vectors - 1}"
    ordered = wide.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "the same index twice in one row"
    total = weights.float().sum(-1)
    # 16-bit weights of another writer may add up to a little more than 1; 0.02 is five roundings of bfloat16.
    if not torch.isfinite(weights).all() or (weights < 0).any() or (total > 1.02).any():
        return "weights that are not finite, negative, or add up to more than 1"
    return None
