"""Products over the input: s = x A^T forward; dA = ds^T x and dx = ds A in one pass over x backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .compose import mix
from .dropout import Dropout, keep_mask
from .expand import launch_expand
from .launch import launch
from .split import dot, sum_copies, term


@triton.jit(do_not_specialize=["M", "blocks_each"])
def _shrink_fwd_kernel(
    X_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Seed_ptr,
    S_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    tiles,
    blocks_each,
    drop_threshold,
    drop_scale,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """s = dropout(x) A^T, with A (R, K) mixed from the bank tile by tile.

    Program (i, j) reads BLOCK_M rows and blocks_each * BLOCK_K columns of x (M, K), each element once, and writes its
    rows of partial j of s (partials, M, R).
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    partial = tl.program_id(1)
    offs_n = tl.arange(0, COPIES * R_PAD)
    offs_i = offs_n % R_PAD
    mask_i = (offs_i < R) & (offs_n // R_PAD < SPLITS)
    acc = tl.zeros((BLOCK_M, COPIES * R_PAD), dtype=tl.float32)
    first_k = partial * blocks_each * BLOCK_K
    end_k = tl.minimum(K, first_k + blocks_each * BLOCK_K)
    for start_k in range(first_k, end_k, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x_ptrs = X_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        if Seed_ptr is not None:
            x = tl.where(keep_mask(Seed_ptr, offs_m, start_k, drop_threshold, BLOCK_K), x, 0.0)
        a = mix(
            Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_k, K, VECTOR, TOPK, BLOCK_K, stride_i=tiles, stride_t=1
        )  # (COPIES * R_PAD, BLOCK_K)
        acc = dot(x, tl.trans(term(a, (offs_n // R_PAD)[:, None], SPLITS)), acc, INPUT_PRECISION)
    offs_r = tl.arange(0, R_PAD)
    s_ptrs = S_ptr + (partial.to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :]
    s = sum_copies(acc, R_PAD, COPIES)
    if Seed_ptr is not None:
        # Here and not on x: kept elements go into the product unrounded.
        s *= drop_scale
    tl.store(s_ptrs, s, mask=mask_m[:, None] & (offs_r < R)[None, :])


def launch_shrink_fwd(
    x: Tensor, vector_bank: Tensor, indices: Tensor, weights: Tensor, r: int, dropout: Dropout
) -> Tensor:
    """s = dropout(x) A^T, in partials.

    Args:
        x: (M, K), any strides.
        vector_bank: (num_vectors, vector_length), contiguous.
        indices, weights: (..., topk), int32 and fp32, contiguous: the selection of A's rows, r * K/vector_length of
            them.
        dropout: what to drop of x.
    Returns:
        (partials, M, r) fp32, to be added up in order.
    """
    M, K = x.shape
    config = tuning.shrink_fwd(M, K, x.dtype, r)
    partials = config.pop("PARTIALS")
    s = torch.empty((partials, M, r), dtype=torch.float32, device=x.device)
    launch(
        _shrink_fwd_kernel,
        (triton.cdiv(M, config["BLOCK_M"]), partials),
        X_ptr=x,
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        Seed_ptr=dropout.seed,
        S_ptr=s,
        M=M,
        K=K,
        R=r,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        tiles=K // vector_bank.shape[1],
        drop_threshold=dropout.threshold,
        drop_scale=dropout.scale,
        VECTOR=vector_bank.shape[1],
        TOPK=indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        **tuning.copies(x.dtype, r),
        **config,
    )
    return s


def launch_shrink_bwd(
    x: Tensor,
    ds: Tensor,
    vector_bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    dropout: Dropout,
    dx: Tensor | None,
    *,
    need_dA: bool,
) -> Tensor | None:
    """dx = dropout'(ds A) and dA = ds^T dropout(x), in one pass over x.

    Args:
        x: (M, K), any strides.
        ds: (M, r) fp32, contiguous.
        vector_bank, indices, weights, dropout: as in `launch_shrink_fwd`.
        dx: (M, K) in x's dtype, contiguous, written; None where not needed.
    Returns:
        dA, (partials, r, K) fp32, to be added up in order; None where not needed.
    """
    strides = (x.shape[1] // vector_bank.shape[1], 1)
    return launch_expand(
        ds[None], vector_bank, indices, weights, strides, x=x if need_dA else None, y=dx, dropout=dropout
    )
