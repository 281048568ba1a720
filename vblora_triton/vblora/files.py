"""The small form of logits, in files and in memory: which entries are the top k, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.ops import cpu, reference


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
    # Sorting all of the logits would take longer than writing the file.
    indices, weights = cpu.select(logits.detach().float(), topk)
    return indices.to(index_dtype(logits.shape[-1])), weights[..., :-1].contiguous()


def decode_topk(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Complete what a file holds of a selection.

    weight_k = max(0, 1 - sum of the others)

    Args:
        indices: (*rows, topk), an integer dtype.
        weights: (*rows, topk - 1), floating.
    Returns:
        indices (*rows, topk), int32, and weights (*rows, topk), float32, which add up to 1.
    """
    weights = weights.float()
    total = weights.sum(-1, keepdim=True)
    # Rounding, above all to 16 bits, can bring the sum above 1.
    complete = torch.cat([weights / total.clamp(min=1), (1 - total).clamp(min=0)], dim=-1)
    return indices.int(), complete


class TopkLogits(nn.Module):
    """What a layer holds of an adapter that was loaded from a top-k file: two selections, and no logits.

    indices_A, weights_A: buffers (r, in/b, topk), int32 and float32.
    indices_B, weights_B: buffers (out/b, r, topk).

    The weights stay float32 when the model is cast: the bank, which carries the values, follows the model.
    """

    indices_A: Tensor
    weights_A: Tensor
    indices_B: Tensor
    weights_B: Tensor

    def __init__(self, indices_A: Tensor, weights_A: Tensor, indices_B: Tensor, weights_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices_A", indices_A)
        self.register_buffer("weights_A", weights_A)
        self.register_buffer("indices_B", indices_B)
        self.register_buffer("weights_B", weights_B)

    def selection(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return indices_A, weights_A, indices_B, weights_B."""
        return self.indices_A, self.weights_A, self.indices_B, self.weights_B

    def compose(self, vector_bank: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the bank's vectors into the pieces of A, (r, in/b, b), and of B, (out/b, r, b)."""
        return (
            reference.compose_selected(self.indices_A, self.weights_A, vector_bank),
            reference.compose_selected(self.indices_B, self.weights_B, vector_bank),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {"weights_A": self.weights_A, "weights_B": self.weights_B}
        super()._apply(fn, recurse)
        for name, weights in exact.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:
                setattr(self, name, weights.to(now.device))
        return self


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
