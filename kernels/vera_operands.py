"""The operands of VeRA's products: p packed and unpacked, fp32 matrices as terms, both scales on B, dropout on x."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .dropout import Dropout, drop, keep_mask
from .launch import launch


@triton.jit(do_not_specialize=["M"])
def _pack_rows_kernel(
    V_ptr, Values_ptr, Scale_ptr, M, R, factor, SUMMANDS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr
):
    """p = factor sum of the SUMMANDS blocks of R columns of V (M, SUMMANDS * R), in fp32 or int16, as Values is.

    Program (i, j) takes BLOCK_M rows and GROUP columns, whose scale is one bf16 for each row.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_r < R)[None, :]
    v_ptrs = V_ptr + offs_m[:, None] * (SUMMANDS * R) + offs_r[None, :]
    v = tl.load(v_ptrs, mask=mask, other=0.0)
    if SUMMANDS == 2:
        v += tl.load(v_ptrs + R, mask=mask, other=0.0)
    v *= factor
    # Half a unit of bf16 more, so that the largest fits. 0 * v is NaN where v is not finite: there the scale is NaN.
    scale = tl.max(tl.abs(v), axis=1) * ((1.0 + 2.0**-8) / 32767.0) + tl.sum(v * 0.0, axis=1)
    scale = scale.to(tl.bfloat16)
    tl.store(Scale_ptr + offs_m * tl.cdiv(R, GROUP) + tl.program_id(1), scale, mask=mask_m)
    if Values_ptr.dtype.element_ty == tl.int16:
        # NaN is not > 0 either, and no integer.
        is_scaled = scale > 0.0
        inverse = tl.where(is_scaled, 1.0 / tl.where(is_scaled, scale.to(tl.float32), 1.0), 0.0)
        v = tl.floor(tl.where(is_scaled[:, None], v, 0.0) * inverse[:, None] + 0.5)
        v = tl.minimum(tl.maximum(v, -32767.0), 32767.0)
    values_ptrs = Values_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(values_ptrs, v.to(Values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_terms(ptrs, v, R, mask, TERMS: tl.constexpr, LOW: tl.constexpr):
    """Store TERMS terms of v, R columns apart: number LOW is the low one, all others are high."""
    high = v.to(ptrs.dtype.element_ty)
    tl.store(ptrs, high, mask=mask)
    if TERMS > 1:
        low = (v - high.to(tl.float32)).to(ptrs.dtype.element_ty)
        for t in tl.static_range(1, TERMS):
            tl.store(ptrs + t * R, low if t == LOW else high, mask=mask)


@triton.jit(do_not_specialize=["M", "N"])
def _prepare_kernel(
    P_ptr,
    Scale_ptr,
    Unit_ptr,
    Left_ptr,
    B_ptr,
    LambdaB_ptr,
    LambdaD_ptr,
    C_ptr,
    M,
    N,
    R,
    factor,
    stride_bn,
    stride_br,
    SUMMANDS: tl.constexpr,
    LEFT_TERMS: tl.constexpr,
    C_TERMS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The operands of the products of rank R: terms of p / unit, (M, LEFT_TERMS * R), and of C, (N, C_TERMS * R).

    p is packed, or the sum of SUMMANDS blocks of R columns; C = factor lambda_b B lambda_d. What is None is left out.
    Program (i, j) makes BLOCK_M rows and BLOCK_R columns: of p as long as there are any, and then of C.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    if tl.program_id(0) < blocks_m:
        if P_ptr is not None:
            offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < M
            mask = mask_m[:, None] & mask_r[None, :]
            p_ptrs = P_ptr + offs_m[:, None] * (SUMMANDS * R) + offs_r[None, :]
            p = tl.load(p_ptrs, mask=mask, other=0).to(tl.float32)
            if SUMMANDS == 2:
                p += tl.load(p_ptrs + R, mask=mask, other=0.0)
            if Scale_ptr is not None:
                scale_ptrs = Scale_ptr + offs_m[:, None] * tl.cdiv(R, GROUP) + (offs_r // GROUP)[None, :]
                p *= tl.load(scale_ptrs, mask=mask, other=0.0).to(tl.float32)
            if Unit_ptr is not None:
                p /= tl.load(Unit_ptr)
            left_ptrs = Left_ptr + offs_m[:, None] * (LEFT_TERMS * R) + offs_r[None, :]
            _store_terms(left_ptrs, p, R, mask, LEFT_TERMS, LEFT_TERMS - 1)
    else:
        if C_ptr is not None:
            offs_n = (tl.program_id(0) - blocks_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_n = offs_n < N
            mask = mask_n[:, None] & mask_r[None, :]
            b_ptrs = B_ptr + offs_n[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
            c = tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
            c *= tl.load(LambdaB_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
            c *= tl.load(LambdaD_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
            c_ptrs = C_ptr + offs_n[:, None] * (C_TERMS * R) + offs_r[None, :]
            _store_terms(c_ptrs, c * factor, R, mask, C_TERMS, 1)


@triton.jit(do_not_specialize=["M"])
def _drop_kernel(
    X_ptr,
    Base_ptr,
    Seed_ptr,
    High_ptr,
    Low_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """high = base + dropout(X), and what is lost to its dtype as low; (M, K), each but X and High where it is given."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_k = tl.program_id(1) * BLOCK_K
    offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x = tl.load(X_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0.0)
    if Seed_ptr is not None:
        x = drop(x, keep_mask(Seed_ptr, offs_m, start_k, threshold, BLOCK_K))
    offs = offs_m[:, None] * K + offs_k[None, :]
    x = x.to(tl.float32)
    if Base_ptr is not None:
        x += tl.load(Base_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    high = x.to(High_ptr.dtype.element_ty)
    tl.store(High_ptr + offs, high, mask=mask)
    if Low_ptr is not None:
        tl.store(Low_ptr + offs, (x - high.to(tl.float32)).to(Low_ptr.dtype.element_ty), mask=mask)


class ProjectedInput(NamedTuple):
    """p = dropout(x) A^T, (M, r), fp32 of fp32 activations; else int16, in units of `scale`, or the bits of fp32.

    In units of its scale, one bf16 for each row and `tuning.PACK_GROUP` columns, it takes the memory of a 16-bit
    activation, and is rounded to 2^-16 of the largest element there, not to the 8 bits of bf16: A is random, so that
    the elements are alike. A small p is (M, 2 r): the bits of fp32, and its scale is of no use.
    """

    values: Tensor
    scale: Tensor


def operand(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of `dtype` go into products beside activations of 16 bits."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def unpacked(projected: ProjectedInput, r: int) -> tuple[Tensor, Tensor | None]:
    """The values, fp32 or packed, and the scale of packed ones."""
    values, scale = projected
    if values.dtype == torch.float32:
        return values, None
    return (values, scale) if values.shape[1] == r else (values.view(torch.float32), None)


def launch_pack(sums: Tensor, factor: float, r: int) -> ProjectedInput:
    """p = factor times the sum of the blocks of r columns of `sums`, (M, blocks r) fp32, in the form that is kept."""
    M, config = sums.shape[0], tuning.pack_rows()
    values = torch.empty((M, tuning.packed_columns(M, r)), dtype=torch.int16, device=sums.device)
    scale = torch.empty(M * tuning.cdiv(r, tuning.PACK_GROUP), dtype=torch.bfloat16, device=sums.device)
    launch(
        _pack_rows_kernel,
        (tuning.cdiv(M, config["BLOCK_M"]), tuning.cdiv(r, tuning.PACK_GROUP)),
        V_ptr=sums,
        Values_ptr=values if values.shape[1] == r else values.view(torch.float32),
        Scale_ptr=scale,
        M=M,
        R=r,
        factor=factor,
        SUMMANDS=sums.shape[1] // r,
        GROUP=tuning.PACK_GROUP,
        **config,
    )
    return ProjectedInput(values, scale)


# A kernel, its grid and its arguments: what `launch` takes. Not launched here: each function down to a launch is time.
Call = tuple[Any, tuple[int, ...], dict[str, Any]]


def dropping(x: Tensor, dropout: Dropout, high: Tensor, low: Tensor | None, base: Tensor | None) -> Call:
    """high + low = base + dropout(x), which is not scaled.

    Args:
        x: (M, K), any strides.
        high, low, base: (M, K), contiguous; high may be x or base, the others None.
    """
    (M, K), config = x.shape, tuning.drop()
    arguments = {
        "X_ptr": x,
        "Base_ptr": base,
        "Seed_ptr": dropout.seed,
        "High_ptr": high,
        "Low_ptr": low,
        "M": M,
        "K": K,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "threshold": dropout.threshold,
    }
    return _drop_kernel, (tuning.cdiv(M, config["BLOCK_M"]), tuning.cdiv(K, config["BLOCK_K"])), arguments | config


def terms_of(x: Tensor, dropout: Dropout, all_fp32: bool) -> tuple[Tensor, Tensor | None]:
    """dropout(x), not scaled, as one or two terms: x itself where it can be."""
    dtype = x.dtype if all_fp32 else operand(x.dtype)
    if dtype == x.dtype and dropout.seed is None:
        return x, None
    high = torch.empty(x.shape, dtype=dtype, device=x.device)
    low = None if dtype == x.dtype else torch.empty_like(high)
    kernel, grid, arguments = dropping(x, dropout, high, low, None)
    launch(kernel, grid, **arguments)
    return high, low


def preparing(
    r: int,
    projected: ProjectedInput | None,
    left: Tensor | None,
    unit: Tensor | None,
    frozen: tuple[Tensor, Tensor, Tensor] | None,
    c: Tensor | None,
    factor: float,
) -> Call:
    """Terms of p / unit, and of C = factor lambda_b B lambda_d.

    Args:
        projected: p; or the sum of blocks of r columns of fp32 values.
        left: (M, terms r), written: [high], [high, low] or [high, high, low]; or None.
        unit: one element, fp32, or None.
        frozen: B (N, r), any strides, lambda_b (N) and lambda_d (r), contiguous.
        c: (N, terms r), written: [high] or [high, low, high]; or None.
    """
    M, N = 0 if left is None else left.shape[0], 0 if c is None else c.shape[0]
    values, scale = (None, None) if projected is None or left is None else unpacked(projected, r)
    B, lambda_b, lambda_d = frozen if frozen is not None else (None, None, None)
    config = tuning.prepare(r)
    blocks = tuning.cdiv(M, config["BLOCK_M"]) + tuning.cdiv(N, config["BLOCK_M"])
    arguments = {
        "P_ptr": values,
        "Scale_ptr": scale,
        "Unit_ptr": unit,
        "Left_ptr": left,
        "B_ptr": B,
        "LambdaB_ptr": lambda_b,
        "LambdaD_ptr": lambda_d,
        "C_ptr": c,
        "M": M,
        "N": N,
        "R": r,
        "factor": factor,
        "stride_bn": 0 if B is None else B.stride(0),
        "stride_br": 0 if B is None else B.stride(1),
        "SUMMANDS": 1 if values is None else values.shape[1] // r,
        "LEFT_TERMS": 0 if left is None else left.shape[1] // r,
        "C_TERMS": 0 if c is None else c.shape[1] // r,
        "GROUP": tuning.PACK_GROUP,
    }
    return _prepare_kernel, (blocks, tuning.cdiv(r, config["BLOCK_R"])), arguments | config
