"""A matrix product with scales on its rows, its columns and its sum: every large product of VeRA is one of these.

C[m, n] = m_scale[m] n_scale[n] sum_k X[m, k] k_scale[k] W[k, n] + base[m, n]

X is an activation, or p or dp of an activation (VeRA's (M, r) matrices); W is a projection, or p. The matrix unit takes
bf16 and adds in fp32: an fp32 value goes in as X_TERMS or W_TERMS bf16 terms (kernels/tiles.py), 8 bits each. X_TERMS 0
stands for fp32 activations, which meet fp32 values. p of 16-bit activations is kept in 16-bit integers and one fp32
scale for each row, which are two bf16 terms exactly.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .shrink import Dropout
from .tiles import keep_mask


@triton.jit
def load_planes(X_ptr, offs, mask, planes, stride_plane, PLANES: tl.constexpr):
    """The elements at `offs`; with PLANES, added up over `planes` planes, in order."""
    x = tl.load(X_ptr + offs, mask=mask, other=0)
    if PLANES:
        for plane in range(1, planes):
            # In 64 bits: many planes of a large M pass 2^31 elements.
            x += tl.load(X_ptr + tl.cast(plane, tl.int64) * stride_plane + offs, mask=mask, other=0)
    return x


@triton.jit
def accumulate(
    X_ptr,
    W_ptr,
    KScale_ptr,
    Seed_ptr,
    offs_m,
    mask_m,
    offs_n,
    mask_n,
    start,
    end,
    K,
    planes,
    stride_xp,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    drop_threshold,
    X_TERMS: tl.constexpr,
    W_TERMS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PLANES: tl.constexpr,
    K_SCALE: tl.constexpr,
    DROP_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum over k of start .. end of X[m, k] k_scale[k] W[k, n]: (BLOCK_M, BLOCK_N) fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(start, end, BLOCK_K):
        offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        x_offs = offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = load_planes(X_ptr, x_offs, mask_m[:, None] & mask_k[None, :], planes, stride_xp, PLANES)
        if DROP_X:
            x = tl.where(keep_mask(Seed_ptr, offs_m, start_k, drop_threshold, BLOCK_M, BLOCK_K), x, 0)
        w_ptrs = W_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0).to(tl.float32)  # (BLOCK_K, BLOCK_N)
        if K_SCALE:
            w *= tl.load(KScale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[:, None]
        if X_TERMS == 0:
            acc = tl.dot(x.to(tl.float32), w, acc, input_precision=INPUT_PRECISION)
        else:
            # A bf16 activation goes to the matrix unit as it is, from shared memory.
            x_high = x if x.dtype == tl.bfloat16 else x.to(tl.float32).to(tl.bfloat16)
            w_high = w.to(tl.bfloat16)
            acc = tl.dot(x_high, w_high, acc)
            if W_TERMS == 2:
                acc = tl.dot(x_high, (w - w_high.to(tl.float32)).to(tl.bfloat16), acc)
            if X_TERMS == 2:
                acc = tl.dot((x.to(tl.float32) - x_high.to(tl.float32)).to(tl.bfloat16), w_high, acc)
    return acc


@triton.jit
def _product_kernel(
    X_ptr,
    W_ptr,
    Base_ptr,
    MScale_ptr,
    KScale_ptr,
    NScale_ptr,
    Seed_ptr,
    C_ptr,
    M,
    N,
    K,
    planes,
    stride_xp,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_bm,
    stride_bn,
    drop_threshold,
    drop_scale,
    X_TERMS: tl.constexpr,
    W_TERMS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PLANES: tl.constexpr,
    M_SCALE: tl.constexpr,
    K_SCALE: tl.constexpr,
    N_SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_C: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks of columns first: programs that read the same rows of X run at the same time.
    blocks_n = tl.cdiv(N, BLOCK_N)
    start_n = (tl.program_id(0) % blocks_n) * BLOCK_N
    offs_m = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    plane = tl.program_id(1)
    acc = accumulate(
        X_ptr, W_ptr, KScale_ptr, Seed_ptr, offs_m, mask_m, offs_n, mask_n, plane * DEPTH,
        tl.minimum(K, (plane + 1) * DEPTH), K, planes, stride_xp, stride_xm, stride_xk, stride_wk, stride_wn,
        drop_threshold, X_TERMS, W_TERMS, INPUT_PRECISION, PLANES, K_SCALE, DROP_X, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if M_SCALE:
        acc *= tl.load(MScale_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    if N_SCALE:
        acc *= tl.load(NScale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if DROP_X:
        # Here and not on x: kept elements go into the product unrounded.
        acc *= drop_scale
    if DROP_C:
        keep = keep_mask(Seed_ptr, offs_m, start_n, drop_threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * drop_scale, 0.0)
    mask_mn = mask_m[:, None] & mask_n[None, :]
    if HAS_BASE:
        base_ptrs = Base_ptr + offs_m[:, None] * stride_bm + offs_n[None, :] * stride_bn
        acc += tl.load(base_ptrs, mask=mask_mn, other=0.0).to(tl.float32)
    c_ptrs = C_ptr + (plane.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(C_ptr.dtype.element_ty), mask=mask_mn)


def launch_product(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    terms: dict[str, int],
    *,
    base: Tensor | None = None,
    m_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    n_scale: Tensor | None = None,
    drop_x: Dropout | None = None,
    drop_out: Dropout | None = None,
) -> Tensor:
    """out = m_scale n_scale (x (k_scale w)) + base, in the first form; in planes to be added up, in the second.

    Args:
        x: (M, K), any strides, of any dtype that has kernels, or int16; or (planes, M, K), contiguous, to be added up.
        w: (K, N), any strides.
        out: (M, N), contiguous, may be `base` itself; or (splits, M, N), contiguous fp32, each the share of an equal
            part of K: then without `base`.
        terms: `tuning.activation_terms` or `tuning.rank_terms`.
        base: (M, N), any strides.
        m_scale, k_scale, n_scale: (M), (K) and (N), contiguous.
        drop_x, drop_out: what to drop of x, or of the product before `base` is added.
    """
    M, N = out.shape[-2:]
    K = w.shape[0]
    splits = out.shape[0] if out.dim() == 3 else 1
    dropout = drop_x or drop_out or Dropout(None, 0, 1.0)
    config = tuning.product(M, N, terms, planes=x.dim() == 3, drops=dropout.seed is not None)
    launch(
        _product_kernel,
        (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]), splits),
        X_ptr=x,
        W_ptr=w,
        Base_ptr=base,
        MScale_ptr=m_scale,
        KScale_ptr=k_scale,
        NScale_ptr=n_scale,
        Seed_ptr=dropout.seed,
        C_ptr=out,
        M=M,
        N=N,
        K=K,
        planes=x.shape[0] if x.dim() == 3 else 1,
        stride_xp=x.stride(0) if x.dim() == 3 else 0,
        stride_xm=x.stride(-2),
        stride_xk=x.stride(-1),
        stride_wk=w.stride(0),
        stride_wn=w.stride(1),
        stride_bm=0 if base is None else base.stride(0),
        stride_bn=0 if base is None else base.stride(1),
        drop_threshold=dropout.threshold,
        drop_scale=dropout.scale,
        INPUT_PRECISION=tuning.input_precision(),
        PLANES=x.dim() == 3,
        M_SCALE=m_scale is not None,
        K_SCALE=k_scale is not None,
        N_SCALE=n_scale is not None,
        HAS_BASE=base is not None,
        DROP_X=drop_x is not None and drop_x.seed is not None,
        DROP_C=drop_out is not None and drop_out.seed is not None,
        DEPTH=triton.cdiv(triton.cdiv(K, splits), config["BLOCK_K"]) * config["BLOCK_K"],
        **terms,
        **config,
    )
    return out
