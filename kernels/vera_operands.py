"""The operands of VeRA's products: p packed and unpacked, fp32 matrices as terms, both scales on B, dropout on x."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .dropout import Dropout, drop, keep_mask
from .launch import launch


@triton.jit
def store_terms(ptrs, v, R, mask, TERMS: tl.constexpr, LOW: tl.constexpr):
    """Store TERMS terms of v, R columns apart: number LOW is the low one, all others are high."""
    high = v.to(ptrs.dtype.element_ty)
    tl.store(ptrs, high, mask=mask)
    if TERMS > 1:
        low = (v - high.to(tl.float32)).to(ptrs.dtype.element_ty)
        for t in tl.static_range(1, TERMS):
            tl.store(ptrs + t * R, low if t == LOW else high, mask=mask)


@triton.jit
def load_sum(V_ptr, offs_m, offs_r, R, mask, SUMMANDS: tl.constexpr):
    """The sum of the SUMMANDS blocks of R columns of V (M, SUMMANDS * R), in fp32."""
    v_ptrs = V_ptr + offs_m[:, None] * (SUMMANDS * R) + offs_r[None, :]
    v = tl.load(v_ptrs, mask=mask, other=0).to(tl.float32)
    if SUMMANDS == 2:
        v += tl.load(v_ptrs + R, mask=mask, other=0).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["M", "partials"])
def _pack_rows_kernel(
    V_ptr,
    Scale_ptr,
    Unit_ptr,
    Out_ptr,
    OutScale_ptr,
    Partials_ptr,
    Total_ptr,
    M,
    R,
    partials,
    factor,
    SUMMANDS: tl.constexpr,
    TERMS: tl.constexpr,
    LOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Out = V scale factor / unit in 16 bits, V the sum of SUMMANDS blocks of R columns; Total = sum of Partials.

    Out (M, R) is int16, beside a scale for each row and GROUP columns, or (M, TERMS * R) terms. Program (i, j) takes
    BLOCK_M rows and GROUP columns; those after the rows BLOCK_S columns of Partials (partials, R).
    """
    blocks_m, start_r = tl.cdiv(M, BLOCK_M), tl.program_id(1) * GROUP
    if tl.program_id(0) >= blocks_m:
        if Partials_ptr is not None:
            offs_s = start_r + (tl.program_id(0) - blocks_m) * BLOCK_S + tl.arange(0, BLOCK_S)
            acc = tl.zeros((BLOCK_P, BLOCK_S), dtype=tl.float32)
            for start_p in range(0, partials, BLOCK_P):
                offs_p = (start_p + tl.arange(0, BLOCK_P)).to(tl.int64)
                mask = (offs_p < partials)[:, None] & (offs_s < R)[None, :]
                acc += tl.load(Partials_ptr + offs_p[:, None] * R + offs_s[None, :], mask=mask, other=0.0)
            tl.store(Total_ptr + offs_s, tl.sum(acc, axis=0).to(Total_ptr.dtype.element_ty), mask=offs_s < R)
    else:
        if V_ptr is not None:
            offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_r = start_r + tl.arange(0, GROUP)
            offs_scale = offs_m * tl.cdiv(R, GROUP) + tl.program_id(1)
            mask_m = offs_m < M
            mask = mask_m[:, None] & (offs_r < R)[None, :]
            v = load_sum(V_ptr, offs_m, offs_r, R, mask, SUMMANDS) * factor
            if Scale_ptr is not None:
                v *= tl.load(Scale_ptr + offs_scale, mask=mask_m, other=0.0).to(tl.float32)[:, None]
            if Unit_ptr is not None:
                v /= tl.load(Unit_ptr)
            out_ptrs = Out_ptr + offs_m[:, None] * (TERMS * R) + offs_r[None, :]
            if Out_ptr.dtype.element_ty == tl.int16:
                # Half a unit of bf16 more, so that the largest fits. 0 * v is NaN where v is not finite; so is the
                # scale then, and NaN is not > 0, and no integer.
                scale = tl.max(tl.abs(v), axis=1) * ((1.0 + 2.0**-8) / 32767.0) + tl.sum(v * 0.0, axis=1)
                scale = scale.to(tl.bfloat16)
                tl.store(OutScale_ptr + offs_scale, scale, mask=mask_m)
                is_scaled = scale > 0.0
                inverse = tl.where(is_scaled, 1.0 / tl.where(is_scaled, scale.to(tl.float32), 1.0), 0.0)
                v = tl.floor(tl.where(is_scaled[:, None], v, 0.0) * inverse[:, None] + 0.5)
                tl.store(out_ptrs, tl.minimum(tl.maximum(v, -32767.0), 32767.0).to(tl.int16), mask=mask)
            else:
                store_terms(out_ptrs, v, R, mask, TERMS, LOW)
                if OutScale_ptr is not None:
                    # Nobody reads it, but results are the same from run to run.
                    tl.store(OutScale_ptr + offs_scale, tl.zeros((BLOCK_M,), dtype=tl.bfloat16), mask=mask_m)


@triton.jit
def _scale_kernel(
    B_ptr,
    LambdaB_ptr,
    LambdaD_ptr,
    C_ptr,
    D_ptr,
    Unit_ptr,
    DLambdaB_ptr,
    Partials_ptr,
    N,
    R,
    factor,
    stride_bn,
    stride_br,
    SUMMANDS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Both scales on B: C = factor lambda_b B lambda_d, as (N, TERMS * R) terms; and their gradients, from D.

    dlambda_b[n] = sum_j lambda_d[j] (B D)[n, j], dlambda_d[j] = sum_n lambda_b[n] (B D)[n, j]; element by element. Here
    D / unit is the sum of SUMMANDS blocks of R columns of D. What is None is left out. Program i takes BLOCK_N rows,
    and writes what they add to dlambda_d to row i of Partials (programs, R).
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    lambda_b = tl.load(LambdaB_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start_r in range(0, R, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        mask = mask_n[:, None] & mask_r[None, :]
        b_ptrs = B_ptr + offs_n[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
        lambda_d = tl.load(LambdaD_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        if D_ptr is not None:
            d = load_sum(D_ptr, offs_n, offs_r, R, mask, SUMMANDS) * b
            if Unit_ptr is not None:
                d *= tl.load(Unit_ptr)
            acc += tl.sum(d * lambda_d[None, :], axis=1)
            partials_ptrs = Partials_ptr + tl.program_id(0).to(tl.int64) * R + offs_r
            tl.store(partials_ptrs, tl.sum(d * lambda_b[:, None], axis=0), mask=mask_r)
        if C_ptr is not None:
            c_ptrs = C_ptr + offs_n[:, None] * (TERMS * R) + offs_r[None, :]
            store_terms(c_ptrs, b * lambda_b[:, None] * lambda_d[None, :] * factor, R, mask, TERMS, 1)
    if D_ptr is not None:
        tl.store(DLambdaB_ptr + offs_n, acc.to(DLambdaB_ptr.dtype.element_ty), mask=mask_n)


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


# The values of rows and their scale, or None where they are no packed ones.
Rows = tuple[Tensor, Tensor | None]


class ProjectedInput(NamedTuple):
    """p = dropout(x) A^T, (M, r), fp32 of fp32 activations; else int16, in units of `scale`, or the bits of bf16 terms.

    In units of its scale, one bf16 for each row and `tuning.PACK_GROUP` columns, it takes the memory of a 16-bit
    activation, and is rounded to 2^-16 of the largest element there, not to the 8 bits of bf16: A is random, so that
    the elements are alike. A small p is (M, 2 r): [high, low], each element to 16 bits of its own; its scale is of no
    use.
    """

    values: Tensor
    scale: Tensor

    def unpacked(self, r: int) -> Rows:
        """The values, fp32, packed or terms, and the scale of packed ones."""
        values, scale = self
        if values.dtype == torch.int16 and values.shape[1] == r:
            return values, scale
        return (values.view(torch.bfloat16) if values.dtype == torch.int16 else values), None


def operand(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of `dtype` go into products beside activations of 16 bits."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def launch_pack(
    rows: Rows | None,
    out: Rows,
    r: int,
    *,
    low: int = 1,
    unit: Tensor | None = None,
    factor: float = 1.0,
    partials: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """out = factor rows / unit, and total = sum of partials.

    Args:
        rows: (M, r) packed, or (M, blocks r) of which the blocks are added up; or None.
        out: (M, r) to be packed, or (M, terms r), written where there are rows: term number `low` is the low one, all
            others are high.
        unit: one element, fp32, or None.
        partials, total: (partials, r) fp32, and (r), written; or None.
    """
    (values, scale), config = rows or (None, None), tuning.pack_rows()
    out_values, out_scale = (None, None) if rows is None else out
    M = 0 if values is None else values.shape[0]
    programs = tuning.cdiv(M, config["BLOCK_M"]) + (0 if partials is None else tuning.PACK_GROUP // config["BLOCK_S"])
    launch(
        _pack_rows_kernel,
        (programs, tuning.cdiv(r, tuning.PACK_GROUP)),
        V_ptr=values,
        Scale_ptr=scale,
        Unit_ptr=unit,
        Out_ptr=out_values,
        OutScale_ptr=out_scale,
        Partials_ptr=partials,
        Total_ptr=total,
        M=M,
        R=r,
        partials=0 if partials is None else partials.shape[0],
        factor=factor,
        SUMMANDS=1 if values is None else values.shape[1] // r,
        TERMS=1 if out_values is None else out_values.shape[1] // r,
        LOW=low,
        GROUP=tuning.PACK_GROUP,
        **config,
    )


def terms_of(rows: Rows, r: int, terms: int, dtype: torch.dtype, unit: Tensor | None = None) -> Tensor:
    """rows / unit in `dtype`, (M, terms r), the last term the low one: what is kept itself, if it has these terms."""
    values = rows[0]
    if values.dtype == dtype and values.shape[1] >= terms * r:
        return values[:, : terms * r]
    made = values.new_empty((values.shape[0], terms * r), dtype=dtype)
    launch_pack(rows, (made, None), r, low=terms - 1, unit=unit)
    return made


class Scaled(NamedTuple):
    """B (N, r), any strides, and its scales lambda_b (N) and lambda_d (r), contiguous."""

    B: Tensor
    lambda_b: Tensor
    lambda_d: Tensor


def scaling(
    scaled: Scaled, dtype: torch.dtype, terms: int, factor: float, D: Tensor | None = None, unit: Tensor | None = None
) -> dict[str, Any]:
    """C_ptr = factor lambda_b B lambda_d, (N, terms r) in `dtype`, [high] or [high, low] or [high, low, high].

    Args:
        D: (N, r) or (N, 2 r), of which both halves are added up, fp32; or None. unit: one element, fp32, or None.
    Returns:
        What `launch` takes, whose results are in it: C_ptr; where there is D unit, DLambdaB_ptr, the gradient of
        lambda_b, and Partials_ptr, of that of lambda_d. Not launched here: each function down to a launch is time.
    """
    (N, r), config = scaled.B.shape, tuning.scale(scaled.B.shape[1])
    programs = tuning.cdiv(N, config["BLOCK_N"])
    return {
        "kernel": _scale_kernel,
        "grid": (programs,),
        "B_ptr": scaled.B,
        "LambdaB_ptr": scaled.lambda_b,
        "LambdaD_ptr": scaled.lambda_d,
        "C_ptr": scaled.B.new_empty((N, terms * r), dtype=dtype) if terms else None,
        "D_ptr": D,
        "Unit_ptr": unit,
        "DLambdaB_ptr": None if D is None else torch.empty_like(scaled.lambda_b),
        "Partials_ptr": None if D is None else D.new_empty((programs, r)),
        "N": N,
        "R": r,
        "factor": factor,
        "stride_bn": scaled.B.stride(0),
        "stride_br": scaled.B.stride(1),
        "SUMMANDS": 1 if D is None else D.shape[1] // r,
        "TERMS": terms,
        **config,
    }


def launch_drop(
    x: Tensor, dropout: Dropout, dtype: torch.dtype, out: Tensor | None = None, base: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """base + dropout(x), not scaled, in `dtype`, which is x itself where it can be; and what is lost to `dtype`.

    Args:
        x: (M, K), any strides.
        out, base: (M, K), contiguous, in `dtype`, or None; out is written, and may be x or base.
    """
    if out is None and dtype == x.dtype and dropout.seed is None:
        return x, None
    high = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    low = None if dtype == x.dtype else torch.empty_like(high)
    (M, K), config = x.shape, tuning.drop()
    launch(
        _drop_kernel,
        (tuning.cdiv(M, config["BLOCK_M"]), tuning.cdiv(K, config["BLOCK_K"])),
        X_ptr=x,
        Base_ptr=base,
        Seed_ptr=dropout.seed,
        High_ptr=high,
        Low_ptr=low,
        M=M,
        K=K,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        threshold=dropout.threshold,
        **config,
    )
    return high, low
