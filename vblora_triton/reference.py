"""Both methods in plain PyTorch: their definition, the path on CPU, and the oracle that the kernels are tested against.

The shortest correct PyTorch, differentiable by autograd, without speed tricks. Shapes are checked in `ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    indices, weights = select(logits, topk)
    return (weights.unsqueeze(-1) * vector_bank[indices]).sum(-2).to(vector_bank.dtype)


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
    r = logits_A.shape[0]
    A = compose(logits_A, vector_bank, topk).reshape(r, -1)
    B = compose(logits_B, vector_bank, topk).transpose(1, 2).reshape(-1, r)
    return A, B


def vblora_linear(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Add the low-rank update of VB-LoRA to the output of the base layer.

    out = base_out + dropout(x) A^T B^T      (VB-LoRA, section 3)

    The update is computed in the wider of the dtypes of `x` and the parameters, and added before the one rounding to
    the result's dtype.

    Args:
        x: (*batch, in).
        base_out: (*batch, out), or None for the update alone.
        logits_A, logits_B, vector_bank, topk: see `low_rank_matrices`.
        dropout_p: the probability that an element of x is dropped, in [0, 1], while `training`.
    Returns:
        (*batch, out), in the dtype of `base_out`, or of `x` where there is none.
    """
    A, B = low_rank_matrices(logits_A, logits_B, vector_bank, topk)
    dtype = torch.promote_types(x.dtype, A.dtype)
    update = F.linear(F.linear(F.dropout(x, dropout_p, training).to(dtype), A.to(dtype)), B.to(dtype))
    return update.to(x.dtype) if base_out is None else (base_out + update).to(base_out.dtype)
