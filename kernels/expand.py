"""Products over the output: y = base + s B^T forward; ds = dy B and dB = dy^T s in one pass over dy backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .compose import mix
from .launch import launch
from .partials import load_rank_tile
from .split import dot, dot_terms, right_terms, sum_copies, term


@triton.jit(do_not_specialize=["M", "blocks_each", "stride_sp"], do_not_specialize_on_alignment=["partials"])
def _expand_fwd_kernel(
    S_ptr,
    Base_ptr,
    Bias_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Y_ptr,
    STotal_ptr,
    M,
    N,
    R,
    blocks_each,
    partials,
    stride_sp,
    stride_sm,
    stride_bm,
    stride_bn,
    stride_ym,
    stride_yn,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    R_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = base + bias + s B^T, where base and bias are given.

    Program (i, j) takes BLOCK_N columns of y (M, N) and blocks_each blocks of BLOCK_M rows. It mixes the rows of B
    (N, R) that the columns meet once, and streams s (partials, M, R), whose partials it adds up, and base (M, N) past
    them. Program (0, j) also writes the sum of the partials to STotal (M, R), where it is given.
    """
    start_n = tl.program_id(0) * BLOCK_N
    offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    offs_c = tl.arange(0, COPIES * R_PAD)
    offs_i, copy = offs_c % R_PAD, offs_c // R_PAD
    mask_i = (offs_i < R) & (copy < SPLITS)
    b = mix(
        Bank_ptr, Idx_ptr, W_ptr, offs_i, mask_i, start_n, N, VECTOR, TOPK, BLOCK_N, stride_i=1, stride_t=R
    )  # (COPIES * R_PAD, BLOCK_N); l2: bytes / COPIES
    b_high, b_middle, b_low = right_terms(b, SPLITS)
    if Bias_ptr is not None:
        bias = tl.load(Bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    first_m = tl.program_id(1).to(tl.int64) * blocks_each * BLOCK_M
    for start_m in range(first_m, tl.minimum(M, first_m + blocks_each * BLOCK_M), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_mn = mask_m[:, None] & mask_n[None, :]
        s = load_rank_tile(
            S_ptr, offs_m, mask_m, offs_i, mask_i, stride_sm, partials, stride_sp, AHEAD
        )  # l2: bytes / COPIES
        if STotal_ptr is not None:
            # From the first copy.
            total_ptrs = STotal_ptr + offs_m[:, None] * R + offs_i[None, :]
            tl.store(total_ptrs, s, mask=mask_m[:, None] & (offs_c < tl.where(start_n == 0, R, 0))[None, :])
        s = term(s, copy[None, :], SPLITS)  # (BLOCK_M, COPIES * R_PAD)
        y = dot_terms(s, b_high, b_middle, b_low, SPLITS, INPUT_PRECISION)
        if Bias_ptr is not None:
            y += bias
        if Base_ptr is not None:
            base_ptrs = Base_ptr + offs_m[:, None] * stride_bm + offs_n[None, :] * stride_bn
            y += tl.load(base_ptrs, mask=mask_mn, other=0.0).to(tl.float32)
        y_ptrs = Y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
        tl.store(y_ptrs, y.to(Y_ptr.dtype.element_ty), mask=mask_mn)


@triton.jit(do_not_specialize=["M", "blocks_m", "stride_dsm"])
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
    stride_sm,
    stride_dsm,
    stride_dbp,
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
    element of dy once, adds up its rows of partial i of ds (partials, M, R), and writes what its columns are in partial
    j of dB, whose rows are those of B's selection: (partials, N / VECTOR, R, VECTOR).
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
            )  # (COPIES * R_PAD, BLOCK_C); l2: bytes / COPIES
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
                ds_ptrs = DS_ptr + (partial * M + offs_m)[:, None] * stride_dsm + offs_r[None, :]
                mask_mr = mask_m[:, None] & (offs_r < R)[None, :]
                if MANY_BLOCKS:
                    # This program's own sum so far.
                    ds += tl.load(ds_ptrs, mask=mask_mr & (block > 0), other=0.0)
                tl.store(ds_ptrs, ds, mask=mask_mr)
            if DB_ptr is not None:
                s = load_rank_tile(
                    S_ptr, offs_m, mask_m, offs_i, mask_i, stride_sm, partials=1, stride_p=0, AHEAD=1
                )  # l2: bytes / COPIES
                s = term(s, copy[None, :], SPLITS)  # (BLOCK_M, COPIES * R_PAD)
                acc_db = dot(tl.trans(dy), s, acc_db, INPUT_PRECISION)
        if DB_ptr is not None:
            offs_db = offs_n // VECTOR * (R * VECTOR) + offs_n % VECTOR
            db_ptrs = DB_ptr + chunk * stride_dbp + offs_db[:, None] + (offs_r * VECTOR)[None, :]
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
    y: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y = base + bias + s B^T.

    Args:
        s: (partials, M, r) fp32, its columns contiguous, of `shrink.launch_shrink_fwd`.
        base: (M, N), any strides, or None. Rows that are one and the same (stride 0), as a bias's, are read once.
        vector_bank: (num_vectors, vector_length), contiguous.
        indices, weights: (..., topk), int32 and fp32, contiguous: the selection of B's rows, N/vector_length * r of
            them.
        y: (M, N), written; may be `base` itself.
        bias: (N), or None.
    Returns:
        The sum of the partials of s, (M, r) fp32, its columns contiguous.
    """
    (partials, M, r), N = s.shape, y.shape[1]
    total = torch.empty((M, r), dtype=torch.float32, device=s.device) if partials > 1 else None
    if bias is None and base is not None and base.stride() == (0, 1):
        bias, base = base[0], None
    config = tuning.expand_fwd(M, N, y.dtype, r, base is not None)
    launch(
        _expand_fwd_kernel,
        (tuning.cdiv(N, config["BLOCK_N"]), config.pop("PARTIALS")),
        S_ptr=s,
        Base_ptr=base,
        Bias_ptr=bias if bias is None else bias.contiguous(),
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        Y_ptr=y,
        STotal_ptr=total,
        M=M,
        N=N,
        R=r,
        blocks_each=config.pop("blocks_each"),
        partials=partials,
        stride_sp=s.stride(0),
        stride_sm=s.stride(1),
        stride_bm=0 if base is None else base.stride(0),
        stride_bn=0 if base is None else base.stride(1),
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        VECTOR=vector_bank.shape[1],
        TOPK=indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        **tuning.copies(y.dtype, r),
        **config,
    )
    return s[0] if total is None else total


def new_ds(M: int, N: int, dtype: torch.dtype, r: int, device: torch.device, layers: int = 1) -> Tensor:
    """(partials, M, layers * r) fp32: where `launch_expand_bwd` writes ds, of layers of one N and rank side by side.

    Args:
        dtype: of dy.
    """
    blocks = tuning.cdiv(N, tuning.two_products(M, N, dtype, r)["BLOCK_C"])
    partials = tuning.cdiv(blocks, tuning.blocks_each(blocks, r))
    return torch.empty((partials, M, layers * r), dtype=torch.float32, device=device)


def new_dB(M: int, N: int, dtype: torch.dtype, r: int, bank: Tensor, rows: int | None = None) -> Tensor:
    """(partials, rows, vector_length) fp32: where `launch_expand_bwd` writes dB, of several layers one after the other.

    Args:
        N: of the widest of them; dtype: of dy.
        rows: of the selections of B of them all; without it those of one layer.
    """
    partials = tuning.two_products(M, N, dtype, r)["PARTIALS"]
    rows = N // bank.shape[1] * r if rows is None else rows
    return torch.empty((partials, rows, bank.shape[1]), dtype=torch.float32, device=bank.device)


def launch_expand_bwd(
    dy: Tensor,
    s: Tensor,
    vector_bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    ds: Tensor | None,
    dB: Tensor | None,
) -> None:
    """ds = dy B and dB = dy^T s, in one pass over dy.

    Args:
        dy: (M, N), any strides.
        s: (M, r) fp32, its columns contiguous.
        vector_bank, indices, weights: as in `launch_expand_fwd`.
        ds: (partials, M, r) of `new_ds`, written, to be added up in order; None where not needed.
        dB: (partials, N / vector_length * r, vector_length) of `new_dB`, likewise.
    """
    M, N = dy.shape
    r = s.shape[1]
    config = tuning.two_products(M, N, dy.dtype, r)
    chunks, blocks_m, blocks = config.pop("PARTIALS"), config.pop("blocks_each"), tuning.cdiv(N, config["BLOCK_C"])
    if dB is not None and dB.shape[0] != chunks:
        # As many as wider layers beside this one have; those that find no rows left write zeros.
        chunks = dB.shape[0]
        blocks_m = tuning.cdiv(tuning.cdiv(M, chunks), config["BLOCK_M"])
    blocks_n = tuning.blocks_each(blocks, r)
    launch(
        _expand_bwd_kernel,
        (tuning.cdiv(blocks, blocks_n), chunks),
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
        blocks_m=blocks_m,
        blocks_n=blocks_n,
        stride_sm=s.stride(0),
        stride_dsm=0 if ds is None else ds.stride(1),
        stride_dbp=0 if dB is None else dB.stride(0),
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        VECTOR=vector_bank.shape[1],
        TOPK=indices.shape[-1],
        INPUT_PRECISION=tuning.input_precision(),
        MANY_BLOCKS=blocks_n > 1,
        **tuning.copies(dy.dtype, r),
        **config,
    )
