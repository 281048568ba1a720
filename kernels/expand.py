"""Products over the output: y = s B^T + bias + base forward; ds = dy B and dB = dy^T s in one pass over dy backward.

`launch_expand` is also the backward of the product over the input (shrink.py): dx = ds A and dA = ds^T x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .compose import mix
from .dropout import Dropout, keep_mask
from .launch import launch
from .partials import load_partials, load_rank_tile
from .split import dot, left_term, right_term, sum_copies, term


@triton.jit
def _mix_row(
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    i,
    start_c,
    C,
    R,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    stride_i,
    stride_t,
):
    """Row i of a composed (R, C) matrix, BLOCK_C columns from start_c on: (BLOCK_C) fp32; 0 where i >= R."""
    offs_i = i + tl.zeros((1,), dtype=tl.int32)
    w = mix(Bank_ptr, Idx_ptr, W_ptr, offs_i, offs_i < R, start_c, C, VECTOR, TOPK, BLOCK_C, stride_i, stride_t)
    return tl.reshape(w, (BLOCK_C,))


@triton.jit
def _load_column(V_ptr, offs_m, mask_m, i, R, partials, stride_p):
    """Column i of an (M, R) matrix, added up over its partials: (len(offs_m), 1); 0 where i >= R."""
    return load_partials(V_ptr, offs_m * R + i, mask_m & (i < R), partials, stride_p)[:, None]


@triton.jit(do_not_specialize=["M", "blocks_each", "stride_sp"], do_not_specialize_on_alignment=["partials"])
def _expand_kernel(
    S_ptr,
    X_ptr,
    Base_ptr,
    Bias_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Seed_ptr,
    Y_ptr,
    STotal_ptr,
    DW_ptr,
    M,
    C,
    R,
    blocks_each,
    partials,
    stride_sp,
    stride_xm,
    stride_xc,
    stride_bm,
    stride_bc,
    stride_ym,
    stride_yc,
    stride_i,
    stride_t,
    drop_threshold,
    drop_scale,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    SPLITS: tl.constexpr,
    P_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = dropout'(s W) + bias + base and dW = s^T dropout(x), W (R, C) mixed from the bank; what is None is left out.

    Program (i, j) takes BLOCK_C columns and blocks_each blocks of BLOCK_M rows. It mixes the columns of W that they
    meet once, and streams s (partials, M, R) past them, whose partials it adds up: it reads each element of x and base
    (M, C) once, writes that of y (M, C) once, and writes its columns of partial j of dW (partials, R, C). Program (0,
    j) also writes the sum of the partials of s to STotal (M, R). ONE_BY_ONE, without dW, multiplies and adds up to 4
    ranks in fp32; else they go to the matrix unit (split.py).
    """
    start_c = tl.program_id(0) * BLOCK_C
    chunk = tl.program_id(1).to(tl.int64)
    offs_c = (start_c + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = offs_c < C
    if ONE_BY_ONE:
        w0 = _mix_row(Bank_ptr, Idx_ptr, W_ptr, 0, start_c, C, R, VECTOR, TOPK, BLOCK_C, stride_i, stride_t)
        w1 = _mix_row(Bank_ptr, Idx_ptr, W_ptr, 1, start_c, C, R, VECTOR, TOPK, BLOCK_C, stride_i, stride_t)
        w2 = _mix_row(Bank_ptr, Idx_ptr, W_ptr, 2, start_c, C, R, VECTOR, TOPK, BLOCK_C, stride_i, stride_t)
        w3 = _mix_row(Bank_ptr, Idx_ptr, W_ptr, 3, start_c, C, R, VECTOR, TOPK, BLOCK_C, stride_i, stride_t)
    else:
        offs_n = tl.arange(0, COPIES * R_PAD)
        mask_n = (offs_n % R_PAD < R) & (offs_n // R_PAD < SPLITS)
        offs_p = tl.arange(0, PAIRS * P_PAD)
        offs_i, pair = offs_p % P_PAD, offs_p // P_PAD
        w = mix(Bank_ptr, Idx_ptr, W_ptr, offs_i, offs_i < R, start_c, C, VECTOR, TOPK, BLOCK_C, stride_i, stride_t)
        w = term(w, right_term(pair)[:, None], SPLITS)  # (PAIRS * P_PAD, BLOCK_C)
        dw = tl.zeros((BLOCK_C, COPIES * R_PAD), dtype=tl.float32)
    if Bias_ptr is not None:
        bias = tl.load(Bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    first_m = chunk * blocks_each * BLOCK_M
    for start_m in range(first_m, tl.minimum(M, first_m + blocks_each * BLOCK_M), BLOCK_M):
        offs_m = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_c[None, :]
        if DW_ptr is not None:
            x = tl.load(X_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xc, mask=mask, other=0.0)
        if Base_ptr is not None:
            base = tl.load(Base_ptr + offs_m[:, None] * stride_bm + offs_c[None, :] * stride_bc, mask=mask, other=0.0)
        if Seed_ptr is not None:
            keep = keep_mask(Seed_ptr, offs_m, start_c, drop_threshold, BLOCK_C)
            if DW_ptr is not None:
                x = tl.where(keep, x, 0.0)
        if ONE_BY_ONE:
            s0 = _load_column(S_ptr, offs_m, mask_m, 0, R, partials, stride_sp)
            s1 = _load_column(S_ptr, offs_m, mask_m, 1, R, partials, stride_sp)
            s2 = _load_column(S_ptr, offs_m, mask_m, 2, R, partials, stride_sp)
            s3 = _load_column(S_ptr, offs_m, mask_m, 3, R, partials, stride_sp)
            y = s0 * w0[None, :] + s1 * w1[None, :] + s2 * w2[None, :] + s3 * w3[None, :]
            if STotal_ptr is not None:
                total_ptrs, mask_0 = STotal_ptr + (offs_m * R)[:, None], (mask_m & (start_c == 0))[:, None]
                tl.store(total_ptrs, s0, mask=mask_0)
                tl.store(total_ptrs + 1, s1, mask=mask_0 & (R > 1))
                tl.store(total_ptrs + 2, s2, mask=mask_0 & (R > 2))
                tl.store(total_ptrs + 3, s3, mask=mask_0 & (R > 3))
        else:
            s = load_rank_tile(S_ptr, offs_m, mask_m, offs_i, offs_i < R, R, partials, stride_sp)
            if STotal_ptr is not None:
                total_ptrs = STotal_ptr + offs_m[:, None] * R + offs_i[None, :]
                tl.store(total_ptrs, s, mask=mask_m[:, None] & (offs_p < tl.where(start_c == 0, R, 0))[None, :])
            if DW_ptr is not None:
                s_dw = load_rank_tile(S_ptr, offs_m, mask_m, offs_n % R_PAD, mask_n, R, partials, stride_sp)
                s_dw = term(s_dw, (offs_n // R_PAD)[None, :], SPLITS)  # (BLOCK_M, COPIES * R_PAD)
                dw = dot(tl.trans(x), s_dw, dw, INPUT_PRECISION)
            y = tl.dot(term(s, left_term(pair)[None, :], SPLITS), w, input_precision=INPUT_PRECISION)
        if Y_ptr is not None:
            if Seed_ptr is not None:
                y = tl.where(keep, y * drop_scale, 0.0)
            if Bias_ptr is not None:
                y += bias
            if Base_ptr is not None:
                y += base.to(tl.float32)
            y_ptrs = Y_ptr + offs_m[:, None] * stride_ym + offs_c[None, :] * stride_yc
            tl.store(y_ptrs, y.to(Y_ptr.dtype.element_ty), mask=mask)
    if DW_ptr is not None:
        offs_r = tl.arange(0, R_PAD)
        dw = sum_copies(dw, R_PAD, COPIES)
        if Seed_ptr is not None:
            dw *= drop_scale
        dw_ptrs = DW_ptr + (chunk * R + offs_r)[None, :] * C + offs_c[:, None]
        tl.store(dw_ptrs, dw, mask=mask_c[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "blocks_m"])
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
    blocks_m,
    blocks_n,
    stride_dym,
    stride_dyn,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MANY_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ds = dy B and dB = dy^T s; each where its pointer is given.

    Program (i, j) takes blocks_n blocks of BLOCK_C columns of dy (M, N), one after the other, and blocks_m of BLOCK_M
    rows. It mixes the rows of B (N, R) that a block meets once, and streams dy and s (M, R) past them: it reads each
    element of dy once, adds up its rows of partial i of ds (partials, M, R), and writes its columns of partial j of dB
    (partials, R, N).
    """
    partial = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    offs_c = tl.arange(0, COPIES * R_PAD)
    offs_i = offs_c % R_PAD
    copy = offs_c // R_PAD
    mask_i = (offs_i < R) & (copy < SPLITS)
    offs_r = tl.arange(0, R_PAD)
    first_m = chunk * blocks_m * BLOCK_M
    for block in range(0, blocks_n):
        start_n = (tl.program_id(0) * blocks_n + block) * BLOCK_C
        offs_n = (start_n + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask_n = offs_n < N
        if DS_ptr is not None:
            b = mix(
                Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_n, N, VECTOR, TOPK, BLOCK_C, stride_i=1, stride_t=R
            )  # (COPIES * R_PAD, BLOCK_C)
            b = tl.trans(term(b, copy[:, None], SPLITS))
        acc_db = tl.zeros((BLOCK_C, COPIES * R_PAD), dtype=tl.float32)
        for start_m in range(first_m, tl.minimum(M, first_m + blocks_m * BLOCK_M), BLOCK_M):
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
                s = load_rank_tile(S_ptr, offs_m, mask_m, offs_i, mask_i, R, partials=1, stride_p=0)
                s = term(s, copy[None, :], SPLITS)  # (BLOCK_M, COPIES * R_PAD)
                acc_db = dot(tl.trans(dy), s, acc_db, INPUT_PRECISION)
        if DB_ptr is not None:
            db_ptrs = DB_ptr + (chunk * R + offs_r)[None, :] * N + offs_n[:, None]
            tl.store(db_ptrs, sum_copies(acc_db, R_PAD, COPIES), mask=mask_n[:, None] & (offs_r < R)[None, :])
        if MANY_BLOCKS:
            # The next block's threads read what these wrote.
            tl.debug_barrier()


def launch_expand(
    s: Tensor,
    vector_bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    strides: tuple[int, int],
    *,
    x: Tensor | None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None,
    total: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """y = dropout'(s W) + bias + base and dW = s^T dropout(x), W (r, C).

    Args:
        s: (partials, M, r) fp32, contiguous.
        strides: those of the rows and of the tiles of W in the numbers of its mixtures.
        x: (M, C), any strides; None where dW is not needed.
        base, bias: (M, C), any strides, and (C), contiguous; or None.
        y: (M, C), written, may be `base` itself; None where not needed.
        total: (M, r) fp32, written: the sum of the partials of s.
    Returns:
        dW, (partials, r, C) fp32, to be added up in order; None without x.
    """
    activation = y if x is None else x
    assert activation is not None
    (partials, M, r), C = s.shape, activation.shape[1]
    dropout = dropout or Dropout(None, 0, 1.0)
    config = tuning.expand(M, C, activation.dtype, r, with_gradient=x is not None)
    chunks = config.pop("PARTIALS")
    dW = None if x is None else torch.empty((chunks, r, C), dtype=torch.float32, device=s.device)
    launch(
        _expand_kernel,
        (triton.cdiv(C, config["BLOCK_C"]), chunks),
        S_ptr=s,
        X_ptr=x,
        Base_ptr=base,
        Bias_ptr=bias,
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        Seed_ptr=dropout.seed,
        Y_ptr=y,
        STotal_ptr=total,
        DW_ptr=dW,
        M=M,
        C=C,
        R=r,
        partials=partials,
        stride_sp=s.stride(0),
        stride_xm=0 if x is None else x.stride(0),
        stride_xc=0 if x is None else x.stride(1),
        stride_bm=0 if base is None else base.stride(0),
        stride_bc=0 if base is None else base.stride(1),
        stride_ym=0 if y is None else y.stride(0),
        stride_yc=0 if y is None else y.stride(1),
        stride_i=strides[0],
        stride_t=strides[1],
        drop_threshold=dropout.threshold,
        drop_scale=dropout.scale,
        VECTOR=vector_bank.shape[1],
        TOPK=indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        **(tuning.copies(activation.dtype, r) | tuning.pairs(activation.dtype, r)),
        **config,
    )
    return dW


def launch_expand_fwd(
    s: Tensor,
    base: Tensor | None,
    vector_bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y = s B^T + bias + base.

    Args:
        s: (partials, M, r) fp32, contiguous, of `shrink.launch_shrink_fwd`.
        base, bias: (M, N), any strides, and (N), contiguous; or None.
        vector_bank: (num_vectors, vector_length), contiguous.
        indices, weights: (..., topk), int32 and fp32, contiguous: the selection of B's rows, N/vector_length * r of
            them.
        y: (M, N), written; may be `base` itself.
    Returns:
        The sum of the partials of s, (M, r) fp32.
    """
    r = s.shape[2]
    total = torch.empty(s.shape[1:], dtype=torch.float32, device=s.device) if s.shape[0] > 1 else None
    launch_expand(s, vector_bank, indices, weights, (1, r), x=None, base=base, bias=bias, y=y, total=total)
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
    config = tuning.expand_bwd(M, N, dy.dtype, r)
    chunks, blocks = config.pop("PARTIALS"), triton.cdiv(N, config["BLOCK_C"])
    blocks_n = tuning.blocks_each(blocks, r)
    partials = triton.cdiv(blocks, blocks_n)
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
        blocks_m=config.pop("blocks_each"),
        blocks_n=blocks_n,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        VECTOR=vector_bank.shape[1],
        TOPK=indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        MANY_BLOCKS=blocks_n > 1,
        **tuning.copies(dy.dtype, r),
        **config,
    )
    return ds, dB
