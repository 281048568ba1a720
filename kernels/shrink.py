"""Products over the input: s = x A^T forward; dA = ds^T x and dx = ds A in one pass over x backward."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .select import Selected
from .tiles import dot, fold, keep_mask, left_term, load_rank_tile, mix, right_term, select_tiles, term


@triton.jit
def _shrink_fwd_kernel(
    X_ptr,
    Logits_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Seed_ptr,
    S_ptr,
    M,
    K,
    R,
    H,
    stride_xm,
    stride_xk,
    stride_row,
    stride_i,
    stride_t,
    drop_threshold,
    drop_scale,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    TERMS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    SELECT: tl.constexpr,
    K_PAD: tl.constexpr,
    R_SELECT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    plane = tl.program_id(1)
    offs_n = tl.arange(0, COPIES * R_PAD)
    offs_i = offs_n % R_PAD
    mask_i = (offs_i < R) & (offs_n // R_PAD < TERMS)
    acc = tl.zeros((BLOCK_M, COPIES * R_PAD), dtype=tl.float32)
    end_k = tl.minimum(K, (plane + 1) * COLUMNS)
    if SELECT:
        select_tiles(
            Logits_ptr, Idx_ptr, W_ptr, plane * COLUMNS, end_k, R, H, stride_row, stride_i, stride_t,
            VECTOR, TOPK, K_PAD, R_SELECT, ONE_BLOCK, BLOCK_H,
        )  # fmt: skip
    for start_k in range(plane * COLUMNS, end_k, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x_ptrs = X_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        if DROPOUT:
            x = tl.where(keep_mask(Seed_ptr, offs_m, start_k, drop_threshold, BLOCK_M, BLOCK_K), x, 0.0)
        a = mix(
            Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_k, K, stride_i, stride_t, VECTOR, TOPK, BLOCK_K
        )  # (COPIES * R_PAD, BLOCK_K)
        acc = dot(x, tl.trans(term(a, (offs_n // R_PAD)[:, None], TERMS)), acc, INPUT_PRECISION)
    offs_r = tl.arange(0, R_PAD)
    s_ptrs = S_ptr + (plane.to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :]
    s = fold(acc, R_PAD, COPIES)
    if DROPOUT:
        # Here and not on x: kept elements go into the product unrounded.
        s *= drop_scale
    tl.store(s_ptrs, s, mask=mask_m[:, None] & (offs_r < R)[None, :])


@triton.jit
def _shrink_bwd_kernel(
    X_ptr,
    DS_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Seed_ptr,
    DX_ptr,
    DA_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_i,
    stride_t,
    drop_threshold,
    drop_scale,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    TERMS: tl.constexpr,
    P_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start_k = tl.program_id(0) * BLOCK_C
    chunk = tl.program_id(1).to(tl.int64)
    offs_k = (start_k + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_k = offs_k < K
    offs_n = tl.arange(0, COPIES * R_PAD)
    offs_i = offs_n % R_PAD
    mask_i = (offs_i < R) & (offs_n // R_PAD < TERMS)
    offs_p = tl.arange(0, PARTS * P_PAD)
    offs_pi = offs_p % P_PAD
    if NEED_DX:
        a = mix(
            Bank_ptr, Idx_ptr, W_ptr, offs_pi, offs_pi < R, start_k, K, stride_i, stride_t, VECTOR, TOPK, BLOCK_C
        )  # (PARTS * P_PAD, BLOCK_C)
        a = term(a, right_term(offs_p // P_PAD)[:, None], TERMS)
    acc_da = tl.zeros((BLOCK_C, COPIES * R_PAD), dtype=tl.float32)
    for start_m in range(chunk * ROWS, tl.minimum(M, (chunk + 1) * ROWS), BLOCK_M):
        offs_m = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask_mk = mask_m[:, None] & mask_k[None, :]
        if DROPOUT:
            keep = keep_mask(Seed_ptr, offs_m, start_k, drop_threshold, BLOCK_M, BLOCK_C)
        if NEED_DA:
            x_ptrs = X_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
            x = tl.load(x_ptrs, mask=mask_mk, other=0.0)  # (BLOCK_M, BLOCK_C)
            if DROPOUT:
                x = tl.where(keep, x, 0.0)
            ds = load_rank_tile(DS_ptr, offs_m, mask_m, offs_i, mask_i, R, 1, 0)
            ds = term(ds, (offs_n // R_PAD)[None, :], TERMS)  # (BLOCK_M, COPIES * R_PAD)
            acc_da = dot(tl.trans(x), ds, acc_da, INPUT_PRECISION)
        if NEED_DX:
            ds = load_rank_tile(DS_ptr, offs_m, mask_m, offs_pi, offs_pi < R, R, 1, 0)
            ds = term(ds, left_term(offs_p // P_PAD)[None, :], TERMS)  # (BLOCK_M, PARTS * P_PAD)
            dx = tl.dot(ds, a, input_precision=INPUT_PRECISION)
            if DROPOUT:
                dx = tl.where(keep, dx * drop_scale, 0.0)
            dx_ptrs = DX_ptr + offs_m[:, None] * K + offs_k[None, :]
            tl.store(dx_ptrs, dx.to(DX_ptr.dtype.element_ty), mask=mask_mk)
    if NEED_DA:
        offs_r = tl.arange(0, R_PAD)
        da_ptrs = DA_ptr + (chunk * R + offs_r)[None, :] * K + offs_k[:, None]
        da = fold(acc_da, R_PAD, COPIES)
        if DROPOUT:
            da *= drop_scale
        tl.store(da_ptrs, da, mask=mask_k[:, None] & (offs_r < R)[None, :])


class Dropout(NamedTuple):
    """Drop an element of x where its 16 random bits are below `threshold`; multiply the others by `scale`."""

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> "Dropout":
        """With probability p, to the nearest multiple of 2^-16, from an int64 seed of one element; None for none."""
        threshold = round(p * 2**16)
        return cls(seed, threshold, 2**16 / (2**16 - threshold) if threshold < 2**16 else 0.0)


def launch_shrink_fwd(
    x: Tensor, vector_bank: Tensor, selected: Selected, logits: Tensor | None, r: int, dropout: Dropout
) -> Tensor:
    """s = dropout(x) A^T, in planes to be added up in order.

    Args:
        x: (M, K), any strides.
        vector_bank: (num_vectors, vector_length), contiguous.
        selected: of A's rows; where `logits` are given it is written, by the same launch.
        logits: those of A, (rows, num_vectors), the last dimension contiguous.
        dropout: what to drop of x.
    Returns:
        (planes, M, r) fp32.
    """
    M, K = x.shape
    config = tuning.shrink_fwd(M, K, x.dtype, r)
    topk = selected.indices.shape[-1]
    planes = config.pop("SPLIT")
    s = torch.empty((planes, M, r), dtype=torch.float32, device=x.device)
    vector_length = vector_bank.shape[1]
    launch(
        _shrink_fwd_kernel,
        (triton.cdiv(M, config["BLOCK_M"]), planes),
        X_ptr=x,
        Logits_ptr=logits,
        Bank_ptr=vector_bank,
        Idx_ptr=selected.indices,
        W_ptr=selected.weights,
        Seed_ptr=dropout.seed,
        S_ptr=s,
        M=M,
        K=K,
        R=r,
        H=vector_bank.shape[0],
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_row=0 if logits is None else logits.stride(0),
        stride_i=K // vector_length,
        stride_t=1,
        drop_threshold=dropout.threshold,
        drop_scale=dropout.scale,
        VECTOR=vector_length,
        TOPK=topk,
        INPUT_PRECISION=tuning.input_precision(),
        DROPOUT=dropout.seed is not None,
        SELECT=logits is not None,
        **tuning.select_tiles(vector_bank.shape[0], topk, r),
        **tuning.rank_layout(x.dtype, r),
        **config,
    )
    return s


def launch_shrink_bwd(
    x: Tensor,
    ds: Tensor,
    vector_bank: Tensor,
    selected: Selected,
    dropout: Dropout,
    dx: Tensor | None,
    *,
    need_dA: bool,
) -> Tensor | None:
    """dx = dropout'(ds A) and dA = ds^T dropout(x), in one pass over x.

    Args:
        x: (M, K), any strides.
        ds: (M, r) fp32, contiguous.
        vector_bank, selected, dropout: as in `launch_shrink_fwd`.
        dx: (M, K) in x's dtype, contiguous, written; None where not needed.
    Returns:
        dA, (planes, r, K) fp32, to be added up in order; None where not needed.
    """
    M, K = x.shape
    r, vector_length = ds.shape[1], vector_bank.shape[1]
    config = tuning.two_products(M, K, x.dtype, r)
    planes = triton.cdiv(M, config["ROWS"])
    dA = torch.empty((planes, r, K), dtype=torch.float32, device=x.device) if need_dA else None
    launch(
        _shrink_bwd_kernel,
        (triton.cdiv(K, config["BLOCK_C"]), planes),
        X_ptr=x,
        DS_ptr=ds,
        Bank_ptr=vector_bank,
        Idx_ptr=selected.indices,
        W_ptr=selected.weights,
        Seed_ptr=dropout.seed,
        DX_ptr=dx,
        DA_ptr=dA,
        M=M,
        K=K,
        R=r,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_i=K // vector_length,
        stride_t=1,
        drop_threshold=dropout.threshold,
        drop_scale=dropout.scale,
        VECTOR=vector_length,
        TOPK=selected.indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        DROPOUT=dropout.seed is not None,
        NEED_DX=dx is not None,
        NEED_DA=need_dA,
        **(tuning.rank_layout(x.dtype, r) | tuning.product_layout(x.dtype, r)),
        **config,
    )
    return dA
