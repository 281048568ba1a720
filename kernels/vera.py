"""VeRA: y = base + lambda_b ((lambda_d p) B^T), p = dropout(x) A^T, and the gradients of x and of both scales.

The large products are PyTorch's (matmul.py); the kernels here make their operands and add up what comes of them. Both
scales go into one matrix of each step, C = lambda_b B lambda_d, (N, r):

    y = base + p C^T            dp = dy C            dx = dropout'(dp A)
    D = dy^T p                  (N, r)
    dlambda_b[n] = sum_j lambda_d[j] B[n, j] D[n, j]
    dlambda_d[j] = sum_n lambda_b[n] B[n, j] D[n, j]

Beside 16-bit activations an fp32 matrix goes in as terms, high + low, of 8 bits each (bf16) or 11 (fp16), which stand
side by side in one product. 16 bits count where the scales' fp32 gradients hang on them: of A in p = x [high; low]^T,
which are added up as p is packed, and of p in D = dy^T [high, low]. A result in 16 bits needs no more than the high
terms of two matrices. dx comes of three: the low terms of A, or of half of its rows, keep its error within twice that
of rounding it. An fp32 result, or few rows, takes [high, high, low] against [high, low, high].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .dropout import Dropout
from .launch import launch
from .matmul import matmul, matmul_into
from .vera_operands import ProjectedInput, dropping, launch_pack, operand, preparing, terms_of, unpacked


@triton.jit
def _scale_grads_kernel(
    D_ptr,
    B_ptr,
    LambdaB_ptr,
    LambdaD_ptr,
    Unit_ptr,
    DLambdaB_ptr,
    PartialsD_ptr,
    N,
    R,
    stride_bn,
    stride_br,
    SUMMANDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dlambda_b[n] = sum_j lambda_d[j] (B D)[n, j], dlambda_d[j] = sum_n lambda_b[n] (B D)[n, j]; element by element.

    D / unit is the sum of SUMMANDS blocks of R columns of D (N, SUMMANDS * R). Program i takes BLOCK_N rows, and writes
    their dlambda_b and row i of PartialsD (programs, R).
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    lambda_b = tl.load(LambdaB_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start_r in range(0, R, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        mask = mask_n[:, None] & mask_r[None, :]
        d_ptrs = D_ptr + offs_n[:, None] * (SUMMANDS * R) + offs_r[None, :]
        d = tl.load(d_ptrs, mask=mask, other=0.0)
        if SUMMANDS == 2:
            d += tl.load(d_ptrs + R, mask=mask, other=0.0)
        b_ptrs = B_ptr + offs_n[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        d *= tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
        if Unit_ptr is not None:
            d *= tl.load(Unit_ptr)
        lambda_d = tl.load(LambdaD_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        acc += tl.sum(d * lambda_d[None, :], axis=1)
        partials_ptrs = PartialsD_ptr + tl.program_id(0).to(tl.int64) * R + offs_r
        tl.store(partials_ptrs, tl.sum(d * lambda_b[:, None], axis=0), mask=mask_r)
    tl.store(DLambdaB_ptr + offs_n, acc.to(DLambdaB_ptr.dtype.element_ty), mask=mask_n)


def launch_project(x: Tensor, A: Tensor, r: int, dropout: Dropout, *, all_fp32: bool) -> ProjectedInput:
    """p = dropout(x) A^T.

    Args:
        x: (M, K), any strides.
        A: (r, K), if x and y are both fp32; else [high; low; high], (3 r, K), in x's dtype or, of fp32, in bf16.
    """
    high, low = terms_of(x, dropout, all_fp32)
    if all_fp32:
        p = torch.empty((x.shape[0], r), dtype=torch.float32, device=x.device)
        return ProjectedInput(matmul_into(p, high, A.T, alpha=dropout.scale), p.new_empty(0, dtype=torch.bfloat16))
    sums = matmul(high, A[: tuning.terms() * r].T)
    if low is not None:
        sums[:, :r] += matmul(low, A[:r].T)
    return launch_pack(sums, dropout.scale, r)


def _unit(dtype: torch.dtype) -> float:
    """What C is multiplied by in `dtype`: fp16 has few bits of what is below 2^-14, as small scales are."""
    return 2.0**10 if dtype == torch.float16 else 1.0


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
        base: (M, N), any strides, or None. Rows that are one and the same (stride 0), as a bias's, are read once.
        lambda_b, lambda_d: (N) and (r), contiguous.
        B: (N, r), any strides.
        y: (M, N), contiguous, written.
    """
    (M, N), r = y.shape, B.shape[1]
    dtype, terms = (y.dtype, 1) if all_fp32 else (operand(y.dtype), tuning.rank_terms(M, y.dtype))
    c = torch.empty((N, terms * r), dtype=dtype, device=y.device)
    left = None if all_fp32 else torch.empty((M, terms * r), dtype=dtype, device=y.device)
    kernel, grid, prepared = preparing(r, projected, left, None, (B, lambda_b, lambda_d), c, _unit(dtype))
    launch(kernel, grid, **prepared)
    left = unpacked(projected, r)[0] if left is None else left
    base = base[0] if base is not None and base.stride(0) == 0 else base
    matmul_into(y, left, c.T, base=base, alpha=1 / _unit(dtype))


def launch_bwd(
    dy: Tensor,
    projected: ProjectedInput,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    dropout: Dropout,
    dx: Tensor | None,
    *,
    need_scales: bool,
    all_fp32: bool,
    add_to_dx: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """dx = dropout'((((dy lambda_b) B) lambda_d) A), and the gradients of lambda_b (N) and lambda_d (r).

    Args:
        dy: (M, N), any strides.
        lambda_b, lambda_d: contiguous.
        A: as of `launch_project`.
        B: (N, r), any strides.
        dx: (M, K), contiguous, written, or with `add_to_dx` added to; or None.
    Returns:
        The scales' gradients, in their dtypes, or None where they are not needed.
    """
    (M, N), r = dy.shape, B.shape[1]
    high, low = terms_of(dy, Dropout.of(0.0, None), all_fp32)
    c = left = unit = None
    if dx is not None:
        same = low is None and high.dtype == operand(dx.dtype)
        terms = 1 if all_fp32 else tuning.rank_terms(M, dx.dtype if same else torch.float32)
        c = torch.empty((N, terms * r), dtype=high.dtype, device=dy.device)
    if need_scales and not all_fp32:
        left = torch.empty((M, tuning.terms() * r), dtype=high.dtype, device=dy.device)
        if high.dtype == torch.float16:
            # The largest there is, so that nothing is lost below the least of fp16.
            values, scale = unpacked(projected, r)
            unit = (values if scale is None else scale.float()).abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
    if c is not None or left is not None:
        factor = _unit(high.dtype) * dropout.scale
        kernel, grid, prepared = preparing(r, projected, left, unit, (B, lambda_b, lambda_d), c, factor)
        launch(kernel, grid, **prepared)
    if dx is not None and c is not None:
        update = dx if dropout.seed is None or not add_to_dx else torch.empty_like(dx)
        dp = _input_grad(high, low, c, dx.dtype, r, all_fp32)
        base = dx if add_to_dx and update is dx else None
        matmul_into(update, dp, A[: dp.shape[1]], base=base)
        if dropout.seed is not None:
            kernel, grid, dropped = dropping(update, dropout, dx, None, dx if add_to_dx else None)
            launch(kernel, grid, **dropped)
    if not need_scales:
        return None
    left = unpacked(projected, r)[0] if left is None else left
    D = matmul(high.T, left)
    if low is not None:
        D[:, :r] += matmul(low.T, left[:, :r])
    return _launch_scale_grads(D, B, lambda_b, lambda_d, unit)


def _input_grad(high: Tensor, low: Tensor | None, c: Tensor, dtype: torch.dtype, r: int, all_fp32: bool) -> Tensor:
    """dp = dy C, as the left operand beside the first rows of A's terms, for dx in `dtype`."""
    M, terms, alpha = high.shape[0], c.shape[1] // r, 1 / _unit(c.dtype)
    if all_fp32:
        return matmul(high, c)
    if terms == 1 and low is None and high.dtype == dtype:
        low_rows = tuning.low_rows(r)
        dp = torch.empty((M, r + low_rows), dtype=dtype, device=high.device)
        matmul_into(dp[:, :r], high, c, alpha=alpha)
        dp[:, r:].copy_(dp[:, :low_rows])
        return dp
    sums = matmul(high, c[:, : min(terms, 2) * r])
    if low is not None:
        sums[:, :r] += matmul(low, c[:, :r])
    sums = sums if alpha == 1.0 else sums.mul_(alpha)
    dp = torch.empty((M, terms * r), dtype=operand(dtype), device=high.device)
    kernel, grid, prepared = preparing(r, ProjectedInput(sums, sums[:0]), dp, None, None, None, 1.0)
    launch(kernel, grid, **prepared)
    return dp


def _launch_scale_grads(
    D: Tensor, B: Tensor, lambda_b: Tensor, lambda_d: Tensor, unit: Tensor | None
) -> tuple[Tensor, Tensor]:
    N, r = B.shape
    config = tuning.scale_grads(r)
    d_lambda_b, programs = torch.empty_like(lambda_b), tuning.cdiv(N, config["BLOCK_N"])
    partials = torch.empty((programs, r), dtype=torch.float32, device=D.device)
    launch(
        _scale_grads_kernel,
        (programs,),
        D_ptr=D,
        B_ptr=B,
        LambdaB_ptr=lambda_b,
        LambdaD_ptr=lambda_d,
        Unit_ptr=unit,
        DLambdaB_ptr=d_lambda_b,
        PartialsD_ptr=partials,
        N=N,
        R=r,
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        SUMMANDS=D.shape[1] // r,
        **config,
    )
    return d_lambda_b, partials.sum(0).to(lambda_d.dtype)
