"""Products over the input: s = x A^T forward; dA = ds^T x and dx = ds A in one pass over x backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .compose import mix
from .dropout import Dropout, drop, keep_mask
from .launch import launch
from .partials import load_rank_tile
from .split import dot, dot_terms, right_terms, sum_copies, term


@triton.jit(do_not_specialize=["M", "blocks_each"])
def _shrink_fwd_kernel(
    X_ptr,
    A_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Seed_ptr,
    S_ptr,
    M,
    K,
    R,
    blocks_each,
    stride_xm,
    stride_xk,
    tiles,
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
    """s = dropout(x) A^T, with A (R, K) read in its terms, A (SPLITS, R, K), or mixed from the bank tile by tile.

    Program (i, j) reads BLOCK_M rows and blocks_each blocks of BLOCK_K columns of x (M, K), each element once, and
    writes its rows of partial j of s (partials, M, R).
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    partial = tl.program_id(1)
    offs_n = tl.arange(0, COPIES * R_PAD)
    offs_i, copy = offs_n % R_PAD, offs_n // R_PAD
    mask_i = (offs_i < R) & (copy < SPLITS)
    acc = tl.zeros((BLOCK_M, COPIES * R_PAD), dtype=tl.float32)
    first_k = partial * blocks_each * BLOCK_K
    for start_k in range(first_k, tl.minimum(K, first_k + blocks_each * BLOCK_K), BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x_ptrs = X_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        if Seed_ptr is not None:
            x = drop(x, keep_mask(Seed_ptr, offs_m, start_k, drop_threshold, BLOCK_K))
        if A_ptr is not None:
            a_ptrs = A_ptr + ((copy * R + offs_i).to(tl.int64)[:, None] * K + offs_k[None, :])
            a = tl.load(a_ptrs, mask=mask_i[:, None] & (offs_k < K)[None, :], other=0.0)  # (COPIES * R_PAD, BLOCK_K)
        else:
            a = mix(
                Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_k, K, VECTOR, TOPK, BLOCK_K, stride_i=tiles, stride_t=1
            )  # (COPIES * R_PAD, BLOCK_K); l2: bytes / COPIES
            a = term(a, copy[:, None], SPLITS)
        acc = dot(x, tl.trans(a), acc, INPUT_PRECISION)
    offs_r = tl.arange(0, R_PAD)
    s_ptrs = S_ptr + (partial.to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :]
    s = sum_copies(acc, R_PAD, COPIES)
    if Seed_ptr is not None:
        # Here and not on x: kept elements go into the product unrounded.
        s *= drop_scale
    tl.store(s_ptrs, s, mask=mask_m[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "blocks_each"])
def _shrink_bwd_kernel(
    X_ptr,
    DS_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Seed_ptr,
    Added_ptr,
    DX_ptr,
    DA_ptr,
    M,
    K,
    R,
    blocks_each,
    stride_xm,
    stride_xk,
    tiles,
    drop_threshold,
    drop_scale,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = added + ds A and dA = ds^T x, with the mask and the scale of dropout on x and ds A; each where its pointer
    is given.

    Program (i, j) takes BLOCK_C columns of x (M, K) and blocks_each blocks of BLOCK_M rows. It mixes the columns of A
    (R, K) that they meet once, and streams x and ds (M, R) past them: it reads each element of x once, writes that of
    dx (M, K) once, and writes its columns of partial j of dA (partials, R, K).
    """
    start_k = tl.program_id(0) * BLOCK_C
    chunk = tl.program_id(1).to(tl.int64)
    offs_k = (start_k + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_k = offs_k < K
    offs_n = tl.arange(0, COPIES * R_PAD)
    offs_i, copy = offs_n % R_PAD, offs_n // R_PAD
    mask_i = (offs_i < R) & (copy < SPLITS)
    if DX_ptr is not None:
        a = mix(
            Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_k, K, VECTOR, TOPK, BLOCK_C, stride_i=tiles, stride_t=1
        )  # (COPIES * R_PAD, BLOCK_C); l2: bytes / COPIES
        a_high, a_middle, a_low = right_terms(a, SPLITS)
    acc_da = tl.zeros((BLOCK_C, COPIES * R_PAD), dtype=tl.float32)
    first_m = chunk * blocks_each * BLOCK_M
    for start_m in range(first_m, tl.minimum(M, first_m + blocks_each * BLOCK_M), BLOCK_M):
        offs_m = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask_mk = mask_m[:, None] & mask_k[None, :]
        if Seed_ptr is not None:
            keep = keep_mask(Seed_ptr, offs_m, start_k, drop_threshold, BLOCK_C)
        ds = load_rank_tile(
            DS_ptr, offs_m, mask_m, offs_i, mask_i, R, partials=1, stride_p=0, AHEAD=1
        )  # l2: bytes / COPIES
        ds = term(ds, copy[None, :], SPLITS)  # (BLOCK_M, COPIES * R_PAD)
        if DA_ptr is not None:
            x_ptrs = X_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
            x = tl.load(x_ptrs, mask=mask_mk, other=0.0)  # (BLOCK_M, BLOCK_C)
            if Seed_ptr is not None:
                x = drop(x, keep)
            acc_da = dot(tl.trans(x), ds, acc_da, INPUT_PRECISION)
        if DX_ptr is not None:
            dx = dot_terms(ds, a_high, a_middle, a_low, SPLITS, INPUT_PRECISION)
            if Seed_ptr is not None:
                dx = drop((dx * drop_scale).to(DX_ptr.dtype.element_ty), keep)
            offs_dx = offs_m[:, None] * K + offs_k[None, :]
            if Added_ptr is not None:
                dx += tl.load(Added_ptr + offs_dx, mask=mask_mk, other=0.0).to(tl.float32)
            tl.store(DX_ptr + offs_dx, dx.to(DX_ptr.dtype.element_ty), mask=mask_mk)
    if DA_ptr is not None:
        offs_r = tl.arange(0, R_PAD)
        da_ptrs = DA_ptr + (chunk * R + offs_r)[None, :] * K + offs_k[:, None]
        da = sum_copies(acc_da, R_PAD, COPIES)
        if Seed_ptr is not None:
            da *= drop_scale
        tl.store(da_ptrs, da, mask=mask_k[:, None] & (offs_r < R)[None, :])


def launch_shrink_fwd(
    x: Tensor, A: Tensor | None, vector_bank: Tensor, indices: Tensor, weights: Tensor, r: int, dropout: Dropout
) -> Tensor:
    """s = dropout(x) A^T, in partials.

    Args:
        x: (M, K), any strides.
        A: A's terms (`compose.new_terms`), written; None where A is to be mixed here, tile by tile.
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
        (tuning.cdiv(M, config["BLOCK_M"]), partials),
        X_ptr=x,
        A_ptr=A,
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        Seed_ptr=dropout.seed,
        S_ptr=s,
        M=M,
        K=K,
        R=r,
        blocks_each=config.pop("blocks_each"),
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
    added: Tensor | None = None,
    *,
    need_dA: bool,
) -> Tensor | None:
    """dx = added + dropout'(ds A) and dA = ds^T dropout(x), in one pass over x.

    Args:
        x: (M, K), any strides.
        ds: (M, r) fp32, contiguous.
        vector_bank, indices, weights, dropout: as in `launch_shrink_fwd`.
        dx: (M, K) in x's dtype, contiguous, written; None where not needed.
        added: (M, K), contiguous, or None; may be `dx` itself.
    Returns:
        dA, (partials, r, K) fp32, to be added up in order; None where not needed.
    """
    M, K = x.shape
    r, vector_length = ds.shape[1], vector_bank.shape[1]
    config = tuning.two_products(M, K, x.dtype, r, True, added is not None, dropout.seed is not None)
    partials = config.pop("PARTIALS")
    dA = torch.empty((partials, r, K), dtype=torch.float32, device=x.device) if need_dA else None
    launch(
        _shrink_bwd_kernel,
        (tuning.cdiv(K, config["BLOCK_C"]), partials),
        X_ptr=x,
        DS_ptr=ds,
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        Seed_ptr=dropout.seed,
        Added_ptr=added,
        DX_ptr=dx,
        DA_ptr=dA,
        M=M,
        K=K,
        R=r,
        blocks_each=config.pop("blocks_each"),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        tiles=K // vector_length,
        drop_threshold=dropout.threshold,
        drop_scale=dropout.scale,
        VECTOR=vector_length,
        TOPK=indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        **tuning.copies(x.dtype, r),
        **config,
    )
    return dA
