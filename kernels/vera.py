"""VeRA's products: y = base + lambda_b ((lambda_d p) B^T), and the gradients of x and of both scales.

p = dropout(x) A^T, (M, r), is the projected input, A and B are the projections. dx = dp A, dp = ((dy lambda_b) B)
lambda_d. Both gradients of the scales come from D = dy^T p, (N, r):

    dlambda_b[n] = sum_j lambda_d[j] B[n, j] D[n, j]
    dlambda_d[j] = sum_n lambda_b[n] B[n, j] D[n, j]

D is made tile by tile and never stored; nor is (lambda_d p) B^T, (M, N).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .dropout import Dropout
from .launch import launch
from .partials import launch_sum_partials, load_partials
from .scaled_matmul import accumulate, launch_scaled_matmul


@triton.jit
def _scale_grads_kernel(
    DY_ptr,
    P_ptr,
    PScale_ptr,
    B_ptr,
    LambdaB_ptr,
    LambdaD_ptr,
    PartialsB_ptr,
    PartialsD_ptr,
    M,
    N,
    R,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    X_SPLITS: tl.constexpr,
    W_SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dlambda_b[n] = sum_j lambda_d[j] (B D)[n, j], dlambda_d[j] = sum_n lambda_b[n] (B D)[n, j], D = dy^T p.

    B D is the product element by element. Program (i, j) makes one tile of D, BLOCK_M of its N rows and BLOCK_N of its
    R columns, from DEPTH of the M rows of dy (M, N) and p (M, R), and stores what the tile adds to either gradient: in
    PartialsB (chunks of rows * blocks of R, N) and in PartialsD (chunks of rows * blocks of N, R).
    """
    blocks_r = tl.cdiv(R, BLOCK_N)
    block_n, block_r = tl.program_id(0) // blocks_r, tl.program_id(0) % blocks_r
    chunk = tl.program_id(1).to(tl.int64)
    offs_n = block_n.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = (block_r * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n, mask_r = offs_n < N, offs_r < R
    acc = accumulate(
        DY_ptr,
        P_ptr,
        PScale_ptr,
        None,
        offs_m=offs_n,
        mask_m=mask_n,
        offs_n=offs_r,
        mask_n=mask_r,
        start=chunk * DEPTH,
        end=tl.minimum(M, (chunk + 1) * DEPTH),
        K=M,
        partials=1,
        stride_xp=0,
        stride_xm=stride_dyn,
        stride_xk=stride_dym,
        stride_wk=R,
        stride_wn=1,
        drop_threshold=0,
        X_SPLITS=X_SPLITS,
        W_SPLITS=W_SPLITS,
        INPUT_PRECISION=INPUT_PRECISION,
        BLOCK_K=BLOCK_K,
    )
    b_ptrs = B_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
    acc *= tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
    lambda_b = tl.load(LambdaB_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    lambda_d = tl.load(LambdaD_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    partials_b = tl.sum(acc * lambda_d[None, :], axis=1)
    tl.store(PartialsB_ptr + (chunk * blocks_r + block_r) * N + offs_n, partials_b, mask=mask_n)
    partials_d = tl.sum(acc * lambda_b[:, None], axis=0)
    tl.store(PartialsD_ptr + (chunk * tl.cdiv(N, BLOCK_M) + block_n) * R + offs_r, partials_d, mask=mask_r)


@triton.jit
def _pack_rows_kernel(
    V_ptr, Packed_ptr, Scale_ptr, M, R, partials, stride_vp, R_PAD: tl.constexpr, BLOCK_M: tl.constexpr
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, R_PAD)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_r < R)[None, :]
    offs = offs_m[:, None] * R + offs_r[None, :]
    v = load_partials(V_ptr, offs, mask, partials, stride_vp)
    # 0 * v is NaN where v is not finite: such a row has the scale NaN, and comes back as NaN.
    scale = tl.max(tl.abs(v), axis=1) / 32767.0 + tl.sum(v * 0.0, axis=1)
    tl.store(Scale_ptr + offs_m, scale, mask=mask_m)
    # NaN is not > 0 either, and no integer.
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    whole = tl.floor(tl.where(scale[:, None] > 0.0, v, 0.0) * inverse[:, None] + 0.5)
    # A scale below the smallest normal number has few bits.
    whole = tl.minimum(tl.maximum(whole, -32767.0), 32767.0)
    tl.store(Packed_ptr + offs, whole.to(tl.int16), mask=mask)


@triton.jit
def _sum_scale_grads_kernel(
    PartialsB_ptr,
    PartialsD_ptr,
    DB_ptr,
    DD_ptr,
    N,
    R,
    partials_b,
    partials_d,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_b = tl.cdiv(N, BLOCK_C)
    if tl.program_id(0) < blocks_b:
        _sum_columns(PartialsB_ptr, DB_ptr, tl.program_id(0) * BLOCK_C, N, partials_b, BLOCK_P, BLOCK_C)
    else:
        _sum_columns(PartialsD_ptr, DD_ptr, (tl.program_id(0) - blocks_b) * BLOCK_C, R, partials_d, BLOCK_P, BLOCK_C)


@triton.jit
def _sum_columns(Partials_ptr, Out_ptr, start, C, partials, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
    acc = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start_p in range(0, partials, BLOCK_P):
        offs_p = start_p + tl.arange(0, BLOCK_P)
        partials_ptrs = Partials_ptr + offs_p[:, None] * C + offs_c[None, :]
        tile = tl.load(partials_ptrs, mask=(offs_p < partials)[:, None] & (offs_c < C)[None, :], other=0.0)
        acc += tl.sum(tile, axis=0)
    tl.store(Out_ptr + offs_c, acc.to(Out_ptr.dtype.element_ty), mask=offs_c < C)


class ProjectedInput(NamedTuple):
    """p = dropout(x) A^T, (M, r): `values`, fp32, and `scale` empty; or, packed, values int16 times scale (M) fp32.

    Packed it takes the memory of a 16-bit activation, and is rounded to 2^-16 of the largest element of its row, not to
    the 8 bits of bf16: A is random, so that the elements of a row are alike.
    """

    values: Tensor
    scale: Tensor


def launch_project(x: Tensor, A: Tensor, dropout: Dropout, *, all_fp32: bool) -> ProjectedInput:
    """p = dropout(x) A^T.

    Args:
        x: (M, K), any strides.
        A: (r, K), any strides.
        all_fp32: x and y are both fp32. Else p is packed where it has many rows.
    """
    (M, K), r = x.shape, A.shape[0]
    splits = tuning.activation_splits(x.dtype, all_fp32)
    partials = torch.empty((tuning.matmul_partials(M, r, K, splits), M, r), dtype=torch.float32, device=x.device)
    launch_scaled_matmul(x, A.T, partials, splits, drop_x=dropout)
    if not tuning.packs(M, all_fp32):
        return ProjectedInput(launch_sum_partials(partials), partials.new_empty(0))
    projected = ProjectedInput(torch.empty((M, r), dtype=torch.int16, device=x.device), partials.new_empty(M))
    config = tuning.pack_rows(r)
    launch(
        _pack_rows_kernel,
        (tuning.cdiv(M, config["BLOCK_M"]),),
        V_ptr=partials,
        Packed_ptr=projected.values,
        Scale_ptr=projected.scale,
        M=M,
        R=r,
        partials=partials.shape[0],
        stride_vp=partials.stride(0),
        **config,
    )
    return projected


def _row_scale(projected: ProjectedInput) -> Tensor | None:
    return projected.scale if projected.values.dtype == torch.int16 else None


def launch_update(
    projected: ProjectedInput,
    base: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    B: Tensor,
    y: Tensor,
    *,
    all_fp32: bool,
) -> None:
    """y = base + lambda_b ((lambda_d p) B^T).

    Args:
        base: (M, N), any strides, or None.
        lambda_b, lambda_d: (N) and (r), contiguous.
        B: (N, r), any strides.
        y: (M, N), contiguous, written; may be `base` itself.
    """
    splits = tuning.rank_splits(y.shape[0], y.dtype, all_fp32)
    launch_scaled_matmul(
        projected.values,
        B.T,
        y,
        splits,
        base=base,
        m_scale=_row_scale(projected),
        k_scale=lambda_d,
        n_scale=lambda_b,
    )


def launch_input_grad(
    dy: Tensor,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    dropout: Dropout,
    dx: Tensor,
    *,
    all_fp32: bool,
    add_to_dx: bool = False,
) -> None:
    """dx = dropout'((((dy lambda_b) B) lambda_d) A), or dx += that.

    Args:
        dy: (M, N), any strides.
        A, B: (r, K) and (N, r), any strides.
        dx: (M, K), contiguous, written, or with `add_to_dx` added to.
    """
    (M, N), r = dy.shape, A.shape[0]
    splits = tuning.activation_splits(dy.dtype, all_fp32)
    partials = torch.empty((tuning.matmul_partials(M, r, N, splits), M, r), dtype=torch.float32, device=dy.device)
    launch_scaled_matmul(dy, B, partials, splits, k_scale=lambda_b, n_scale=lambda_d)
    dp = partials if partials.shape[0] > 1 else partials[0]
    splits = tuning.rank_splits(M, dx.dtype, all_fp32)
    launch_scaled_matmul(dp, A, dx, splits, base=dx if add_to_dx else None, drop_out=dropout)


def launch_scale_grads(
    dy: Tensor, projected: ProjectedInput, lambda_b: Tensor, lambda_d: Tensor, B: Tensor, *, all_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of lambda_b (N) and lambda_d (r), in their dtypes.

    Args:
        dy: (M, N), any strides.
        lambda_b, lambda_d: contiguous.
        B: (N, r), any strides.
    """
    (M, N), r = dy.shape, B.shape[1]
    splits = tuning.activation_splits(dy.dtype, all_fp32)
    config = tuning.scaled_matmul(N, r, splits)
    blocks_n, blocks_r = tuning.cdiv(N, config["BLOCK_M"]), tuning.cdiv(r, config["BLOCK_N"])
    chunks = tuning.matmul_partials(N, r, M, splits)
    partials_b = torch.empty((chunks * blocks_r, N), dtype=torch.float32, device=dy.device)
    partials_d = torch.empty((chunks * blocks_n, r), dtype=torch.float32, device=dy.device)
    launch(
        _scale_grads_kernel,
        (blocks_n * blocks_r, chunks),
        DY_ptr=dy,
        P_ptr=projected.values,
        PScale_ptr=_row_scale(projected),
        B_ptr=B,
        LambdaB_ptr=lambda_b,
        LambdaD_ptr=lambda_d,
        PartialsB_ptr=partials_b,
        PartialsD_ptr=partials_d,
        M=M,
        N=N,
        R=r,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        INPUT_PRECISION=tuning.input_precision(),
        DEPTH=tuning.cdiv(tuning.cdiv(M, chunks), config["BLOCK_K"]) * config["BLOCK_K"],
        **splits,
        **config,
    )
    d_lambda_b, d_lambda_d = torch.empty_like(lambda_b), torch.empty_like(lambda_d)
    config = tuning.sum_scale_grads()
    launch(
        _sum_scale_grads_kernel,
        (tuning.cdiv(N, config["BLOCK_C"]) + tuning.cdiv(r, config["BLOCK_C"]),),
        PartialsB_ptr=partials_b,
        PartialsD_ptr=partials_d,
        DB_ptr=d_lambda_b,
        DD_ptr=d_lambda_d,
        N=N,
        R=r,
        partials_b=partials_b.shape[0],
        partials_d=partials_d.shape[0],
        **config,
    )
    return d_lambda_b, d_lambda_d
