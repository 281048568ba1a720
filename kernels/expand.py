"""Products over the output: y = base + s B^T forward; ds = dy B and dB = dy^T s in one pass over dy backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .compose import mix
from .launch import launch
from .partials import load_rank_tile
from .select import select_tiles
from .split import dot, left_term, right_term, sum_copies, term


@triton.jit
def _expand_fwd_kernel(
    S_ptr,
    Base_ptr,
    Logits_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Y_ptr,
    STotal_ptr,
    M,
    N,
    R,
    H,
    partials,
    stride_sp,
    stride_bm,
    stride_bn,
    stride_ym,
    stride_yn,
    stride_row,
    stride_t,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    P_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    R_SELECT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = base + s B^T, with B (N, R) mixed from the bank tile by tile.

    Program (i, j) reads BLOCK_M rows of s (partials, M, R) and adds up its partials, reads base (M, N) where there is
    one, and writes BLOCK_M rows and BLOCK_N columns of y (M, N). Program (i, 0) also writes the sum of the partials to
    STotal (M, R), where it is given. Where there are logits a program first selects for its rows of B, and writes the
    selection.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(1) * BLOCK_N
    offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = offs_m < M
    mask_mn = mask_m[:, None] & (offs_n < N)[None, :]
    offs_p = tl.arange(0, PAIRS * P_PAD)
    offs_i = offs_p % P_PAD
    mask_i = offs_i < R
    s = load_rank_tile(S_ptr, offs_m, mask_m, offs_i, mask_i, R, partials, stride_sp)  # l2: bytes / PAIRS
    if STotal_ptr is not None:
        # Backward wants the sum of the partials; the first column of programs writes it, from its first pair.
        total_ptrs = STotal_ptr + offs_m[:, None] * R + offs_i[None, :]
        tl.store(total_ptrs, s, mask=mask_m[:, None] & (offs_p < tl.where(start_n == 0, R, 0))[None, :])
    if Logits_ptr is not None:
        select_tiles(
            Logits_ptr,
            Idx_ptr,
            W_ptr,
            start_c=start_n,
            end_c=tl.minimum(N, start_n + BLOCK_N),
            R=R,
            H=H,
            stride_row=stride_row,
            stride_i=1,
            stride_t=stride_t,
            VECTOR=VECTOR,
            TOPK=TOPK,
            R_SELECT=R_SELECT,
            ONE_BLOCK=ONE_BLOCK,
            BLOCK_H=BLOCK_H,
        )
    b = mix(
        Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_n, N, VECTOR, TOPK, BLOCK_N, stride_i=1, stride_t=stride_t
    )  # (PAIRS * P_PAD, BLOCK_N); l2: bytes / PAIRS
    s = term(s, left_term(offs_p // P_PAD)[None, :], SPLITS)  # (BLOCK_M, PAIRS * P_PAD)
    b = term(b, right_term(offs_p // P_PAD)[:, None], SPLITS)
    y = tl.dot(s, b, input_precision=INPUT_PRECISION)
    if Base_ptr is not None:
        base_ptrs = Base_ptr + offs_m[:, None] * stride_bm + offs_n[None, :] * stride_bn
        y += tl.load(base_ptrs, mask=mask_mn, other=0.0).to(tl.float32)
    y_ptrs = Y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, y.to(Y_ptr.dtype.element_ty), mask=mask_mn)


@triton.jit
def _expand_bwd_kernel(
    DY_ptr,
    S_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    DS_ptr,
    DB_ptr,
    M,
    N,
    R,
    blocks_each,
    stride_dym,
    stride_dyn,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MANY_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ds = dy B and dB = dy^T s; each where its pointer is given.

    Program (i, j) takes blocks_each blocks of BLOCK_C columns of dy (M, N), one after the other, and ROWS rows. It
    mixes the rows of B (N, R) that a block meets once, and streams dy and s (M, R) past them: it reads each element of
    dy once, adds up its rows of partial i of ds (partials, M, R), and writes its columns of partial j of dB (partials,
    R, N).
    """
    partial = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    offs_c = tl.arange(0, COPIES * R_PAD)
    offs_i = offs_c % R_PAD
    copy = offs_c // R_PAD
    mask_i = (offs_i < R) & (copy < SPLITS)
    offs_r = tl.arange(0, R_PAD)
    for block in range(0, blocks_each):
        start_n = (tl.program_id(0) * blocks_each + block) * BLOCK_C
        offs_n = (start_n + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask_n = offs_n < N
        if DS_ptr is not None:
            b = mix(
                Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_n, N, VECTOR, TOPK, BLOCK_C, stride_i=1, stride_t=R
            )  # (COPIES * R_PAD, BLOCK_C); l2: bytes / COPIES
            b = tl.trans(term(b, copy[:, None], SPLITS))
        acc_db = tl.zeros((BLOCK_C, COPIES * R_PAD), dtype=tl.float32)
        for start_m in range(chunk * ROWS, tl.minimum(M, (chunk + 1) * ROWS), BLOCK_M):
            offs_m = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask_m = offs_m < M
            dy_ptrs = DY_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
            dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_M, BLOCK_C)
            if DS_ptr is not None:
                ds = dot(dy, b, tl.zeros((BLOCK_M, COPIES * R_PAD), dtype=tl.float32), INPUT_PRECISION)
                ds = sum_copies(ds, R_PAD, COPIES)
                ds_ptrs = DS_ptr + (partial * M + offs_m)[:, None] * R + offs_r[None, :]
                mask_mr = mask_m[:, None] & (offs_r < R)[None, :]
                if MANY_BLOCKS:
                    # This program's own sum so far.
                    ds += tl.load(ds_ptrs, mask=mask_mr & (block > 0), other=0.0)
                tl.store(ds_ptrs, ds, mask=mask_mr)
            if DB_ptr is not None:
                s = load_rank_tile(
                    S_ptr, offs_m, mask_m, offs_i, mask_i, R, partials=1, stride_p=0
                )  # l2: bytes / COPIES
                s = term(s, copy[None, :], SPLITS)  # (BLOCK_M, COPIES * R_PAD)
                acc_db = dot(tl.trans(dy), s, acc_db, INPUT_PRECISION)
        if DB_ptr is not None:
            db_ptrs = DB_ptr + (chunk * R + offs_r)[None, :] * N + offs_n[:, None]
            tl.store(db_ptrs, sum_copies(acc_db, R_PAD, COPIES), mask=mask_n[:, None] & (offs_r < R)[None, :])
        if MANY_BLOCKS:
            # The next block's threads read what these wrote.
            tl.debug_barrier()


def launch_expand_fwd(
    s: Tensor,
    base: Tensor | None,
    vector_bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    y: Tensor,
) -> Tensor:
    """y = base + s B^T.

    Args:
        s: (partials, M, r) fp32, contiguous, of `shrink.launch_shrink_fwd`.
        base: (M, N), any strides, or None.
        vector_bank: (num_vectors, vector_length), contiguous.
        indices, weights: (..., topk), int32 and fp32, contiguous: the selection of B's rows, N/vector_length * r of
            them. Where `logits` are given this launch writes it.
        logits: those of B, (rows, num_vectors), the last dimension contiguous.
        y: (M, N), written; may be `base` itself.
    Returns:
        The sum of the partials of s, (M, r) fp32.
    """
    partials, M, r = s.shape
    N, (H, vector_length), topk = y.shape[1], vector_bank.shape, indices.shape[-1]
    total = torch.empty((M, r), dtype=torch.float32, device=s.device) if partials > 1 else None
    config = tuning.expand_fwd(M, y.dtype, r)
    launch(
        _expand_fwd_kernel,
        (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])),
        S_ptr=s,
        Base_ptr=base,
        Logits_ptr=logits,
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        Y_ptr=y,
        STotal_ptr=total,
        M=M,
        N=N,
        R=r,
        H=H,
        partials=partials,
        stride_sp=s.stride(0),
        stride_bm=0 if base is None else base.stride(0),
        stride_bn=0 if base is None else base.stride(1),
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        stride_row=0 if logits is None else logits.stride(0),
        stride_t=r,
        VECTOR=vector_length,
        TOPK=topk,
        INPUT_PRECISION=tuning.input_precision(),
        **tuning.select_tiles(H, topk, r),
        **tuning.pairs(y.dtype, r),
        **config,
    )
    return s[0] if total is None else total


def launch_expand_bwd(
    dy: Tensor,
    s: Tensor,
    vector_bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    need_ds: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """ds = dy B and dB = dy^T s, in one pass over dy.

    Args:
        dy: (M, N), any strides.
        s: (M, r) fp32, contiguous.
        vector_bank, indices, weights: as in `launch_expand_fwd`.
    Returns:
        ds (partials, M, r) and dB (partials, r, N), both fp32, to be added up in order; None where not needed.
    """
    M, N = dy.shape
    r = s.shape[1]
    config = tuning.two_products(M, N, dy.dtype, r)
    chunks, blocks = triton.cdiv(M, config["ROWS"]), triton.cdiv(N, config["BLOCK_C"])
    blocks_each = tuning.blocks_each(blocks, r)
    partials = triton.cdiv(blocks, blocks_each)
    ds = torch.empty((partials, M, r), dtype=torch.float32, device=dy.device) if need_ds else None
    dB = torch.empty((chunks, r, N), dtype=torch.float32, device=dy.device) if need_dB else None
    launch(
        _expand_bwd_kernel,
        (partials, chunks),
        DY_ptr=dy,
        S_ptr=s,
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        DS_ptr=ds,
        DB_ptr=dB,
        M=M,
        N=N,
        R=r,
        blocks_each=blocks_each,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        VECTOR=vector_bank.shape[1],
        TOPK=indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        MANY_BLOCKS=blocks_each > 1,
        **tuning.copies(dy.dtype, r),
        **config,
    )
    return ds, dB
