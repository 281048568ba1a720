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
from torch import Tensor

from . import tuning
from .dropout import Dropout
from .launch import launch
from .matmul import matmul, matmul_terms
from .vera_operands import ProjectedInput, Rows, Scaled, launch_drop, launch_pack, operand, scaling, terms_of


def launch_project(x: Tensor, A: Tensor, r: int, dropout: Dropout, *, all_fp32: bool) -> ProjectedInput:
    """p = dropout(x) A^T.

    Args:
        x: (M, K), any strides.
        A: (r, K), if x and y are both fp32; else [high; low; high], (3 r, K), in x's dtype or, of fp32, in bf16.
    """
    high, low = launch_drop(x, dropout, A.dtype)
    if all_fp32:
        return ProjectedInput(matmul(high, A.T, alpha=dropout.scale), x.new_empty(0, dtype=torch.bfloat16))
    M = x.shape[0]
    values = x.new_empty((M, tuning.packed_columns(M, r)), dtype=torch.int16)
    projected = ProjectedInput(values, x.new_empty(M * tuning.cdiv(r, tuning.PACK_GROUP), dtype=torch.bfloat16))
    sums = matmul_terms(high, low, A[: tuning.terms() * r].T, r)
    launch_pack((sums, None), (projected.unpacked(r)[0], projected.scale), r, factor=dropout.scale)
    return projected


def _unit(dtype: torch.dtype) -> float:
    """What C is multiplied by in `dtype`: fp16 has few bits of what is below 2^-14, as small scales are."""
    return 2.0**10 if dtype == torch.float16 else 1.0


def launch_update(projected: ProjectedInput, base: Tensor | None, scaled: Scaled, y: Tensor, *, all_fp32: bool) -> None:
    """y = base + lambda_b ((lambda_d p) B^T).

    Args:
        base: (M, N), any strides, or None. Rows that are one and the same (stride 0), as a bias's, are read once.
        y: (M, N), contiguous, written.
    """
    r, unit = scaled.B.shape[1], _unit(y.dtype)
    dtype, terms = (y.dtype, 1) if all_fp32 else (operand(y.dtype), tuning.rank_terms(y.shape[0], y.dtype))
    made = scaling(scaled, dtype, terms, unit)
    launch(**made)
    base = base[0] if base is not None and base.stride(0) == 0 else base
    matmul(terms_of(projected.unpacked(r), r, terms, dtype), made["C_ptr"].T, y, base=base, alpha=1 / unit)


def launch_bwd(
    dy: Tensor,
    projected: ProjectedInput,
    scaled: Scaled,
    A: Tensor,
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
        A: as of `launch_project`.
        dx: (M, K), contiguous, written, or with `add_to_dx` added to; or None.
    Returns:
        The scales' gradients, in their dtypes, or None where they are not needed.
    """
    r, dtype = scaled.B.shape[1], dy.dtype if all_fp32 else operand(dy.dtype)
    high, low = launch_drop(dy, Dropout.of(0.0, None), dtype)
    D, unit = _dy_p(high, low, projected.unpacked(r), r, all_fp32) if need_scales else (None, None)
    columns = r
    if dx is not None and not all_fp32:
        is_alike = low is None and dtype == A.dtype
        is_exact = tuning.rank_terms(dx.shape[0], dx.dtype if is_alike else torch.float32) == 3
        columns = 3 * r if is_exact else r + tuning.low_rows(r)
    c_terms = 0 if dx is None else 1 + (columns > 2 * r)
    made = scaling(scaled, dtype, c_terms, _unit(dtype) * dropout.scale, D, unit)
    launch(**made)
    d_lambda_d, rows, dp = torch.empty_like(scaled.lambda_d), None, dy
    if dx is not None:
        dp = matmul_terms(high, low, made["C_ptr"], r)
        if not all_fp32:
            rows, dp = (dp, None), dp.new_empty((dp.shape[0], tuning.cdiv(columns, r) * r), dtype=A.dtype)
    # Of two terms both are high, of three the last is low.
    launch_pack(rows, (dp, None), r, low=2, factor=1 / _unit(dtype), partials=made["Partials_ptr"], total=d_lambda_d)
    if dx is not None:
        _launch_input_grad(dp[:, :columns], A[:columns], dropout, dx, add_to_dx)
    return (made["DLambdaB_ptr"], d_lambda_d) if need_scales else None


def _dy_p(high: Tensor, low: Tensor | None, p: Rows, r: int, all_fp32: bool) -> tuple[Tensor, Tensor | None]:
    """dy^T p / unit, of which the blocks of r columns are to be added up, and unit, or None for 1."""
    unit = None
    if high.dtype == torch.float16:
        # The largest there is, so that nothing is lost below the least of fp16.
        largest = (p[0] if p[1] is None else p[1]).abs().amax().float()
        unit = largest.clamp_(min=torch.finfo(torch.float32).tiny)
    left = terms_of(p, r, 1 if all_fp32 else tuning.terms(), high.dtype, unit)
    return matmul_terms(high.T, None if low is None else low.T, left, r), unit


def _launch_input_grad(dp: Tensor, A: Tensor, dropout: Dropout, dx: Tensor, add_to_dx: bool) -> None:
    """dx = dropout'(dp A), or that added to dx."""
    if dropout.seed is None:
        matmul(dp, A, dx, base=dx if add_to_dx else None)
    else:
        update = matmul(dp, A, torch.empty_like(dx) if add_to_dx else dx)
        launch_drop(update, dropout, dx.dtype, dx, dx if add_to_dx else None)
