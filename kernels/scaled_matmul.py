"""A matrix product with scales on its rows, its columns and its sum: every large product of VeRA is one of these.

C[m, n] = m_scale[m] n_scale[n] sum_k X[m, k] k_scale[k] W[k, n] + base[m, n]

X is an activation, or VeRA's p or dp (vera.py); W is a projection, or p. The matrix unit takes bf16 and adds in fp32: a
value of X goes in as X_SPLITS bf16 terms of 8 bits each, one of W as W_SPLITS (split.py). X_SPLITS 0 stands for fp32
activations, which meet fp32 values. p of 16-bit activations is kept in 16-bit integers and one fp32 scale for each row;
such an integer is two bf16 terms exactly.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .dropout import Dropout, drop, keep_mask
from .launch import launch
from .partials import load_partials


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
    partials,
    stride_xp,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    drop_threshold,
    X_SPLITS: tl.constexpr,
    W_SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum over k of start .. end of dropout(X)[m, k] k_scale[k] W[k, n]: (len(offs_m), len(offs_n)) fp32.

    X is added up from its partials. KScale_ptr and Seed_ptr are None where there is neither scale nor dropout.
    """
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), dtype=tl.float32)
    for start_k in range(start, end, BLOCK_K):
        offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        x_offs = offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = load_partials(X_ptr, x_offs, mask_m[:, None] & mask_k[None, :], partials, stride_xp)
        if Seed_ptr is not None:
            x = drop(x, keep_mask(Seed_ptr, offs_m, start_k, drop_threshold, BLOCK_K))
        w_ptrs = W_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0).to(tl.float32)  # (BLOCK_K, BLOCK_N)
        if KScale_ptr is not None:
            w *= tl.load(KScale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[:, None]
        if X_SPLITS == 0:
            acc = tl.dot(x.to(tl.float32), w, acc, input_precision=INPUT_PRECISION)
        else:
            # A bf16 activation goes to the matrix unit as it is, from shared memory.
            x_high = x if x.dtype == tl.bfloat16 else x.to(tl.float32).to(tl.bfloat16)
            w_high = w.to(tl.bfloat16)
            acc = tl.dot(x_high, w_high, acc)
            if W_SPLITS == 2:
                acc = tl.dot(x_high, (w - w_high.to(tl.float32)).to(tl.bfloat16), acc)
            if X_SPLITS == 2:
                acc = tl.dot((x.to(tl.float32) - x_high.to(tl.float32)).to(tl.bfloat16), w_high, acc)
    return acc


@triton.jit
def _scaled_matmul_kernel(
    X_ptr,
    W_ptr,
    Base_ptr,
    MScale_ptr,
    KScale_ptr,
    NScale_ptr,
    XSeed_ptr,
    CSeed_ptr,
    C_ptr,
    M,
    N,
    K,
    partials,
    stride_xp,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_bm,
    stride_bn,
    drop_threshold,
    drop_scale,
    X_SPLITS: tl.constexpr,
    W_SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C = m_scale n_scale (dropout(X) (k_scale W)) + base, or with dropout of the product; what is None is left out.

    Program (i, j) reads BLOCK_M rows and DEPTH columns of X (partials, M, K), adds up its partials, reads DEPTH rows
    and BLOCK_N columns of W (K, N), and writes BLOCK_M rows and BLOCK_N columns of partial j of C (partials, M, N).
    """
    # Blocks of columns first: programs that read the same rows of X run at the same time.
    blocks_n = tl.cdiv(N, BLOCK_N)
    start_n = (tl.program_id(0) % blocks_n) * BLOCK_N
    offs_m = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    partial = tl.program_id(1)
    acc = accumulate(
        X_ptr,
        W_ptr,
        KScale_ptr,
        XSeed_ptr,
        offs_m=offs_m,
        mask_m=mask_m,
        offs_n=offs_n,
        mask_n=mask_n,
        start=partial * DEPTH,
        end=tl.minimum(K, (partial + 1) * DEPTH),
        K=K,
        partials=partials,
        stride_xp=stride_xp,
        stride_xm=stride_xm,
        stride_xk=stride_xk,
        stride_wk=stride_wk,
        stride_wn=stride_wn,
        drop_threshold=drop_threshold,
        X_SPLITS=X_SPLITS,
        W_SPLITS=W_SPLITS,
        INPUT_PRECISION=INPUT_PRECISION,
        BLOCK_K=BLOCK_K,
    )
    if MScale_ptr is not None:
        acc *= tl.load(MScale_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    if NScale_ptr is not None:
        acc *= tl.load(NScale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if XSeed_ptr is not None:
        # Here and not on x: kept elements go into the product unrounded.
        acc *= drop_scale
    if CSeed_ptr is not None:
        acc = drop(acc * drop_scale, keep_mask(CSeed_ptr, offs_m, start_n, drop_threshold, BLOCK_N))
    mask_mn = mask_m[:, None] & mask_n[None, :]
    if Base_ptr is not None:
        base_ptrs = Base_ptr + offs_m[:, None] * stride_bm + offs_n[None, :] * stride_bn
        acc += tl.load(base_ptrs, mask=mask_mn, other=0.0).to(tl.float32)
    c_ptrs = C_ptr + (partial.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(C_ptr.dtype.element_ty), mask=mask_mn)


def launch_scaled_matmul(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    splits: dict[str, int],
    *,
    base: Tensor | None = None,
    m_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    n_scale: Tensor | None = None,
    drop_x: Dropout | None = None,
    drop_out: Dropout | None = None,
) -> Tensor:
    """out = m_scale n_scale (x (k_scale w)) + base.

    Args:
        x: (M, K), any strides, of any dtype that has kernels, or int16; or partials to be added up, (partials, M, K).
        w: (K, N), any strides.
        out: (M, N), contiguous, may be `base` itself; or, without `base`, partials to be added up in order, (partials,
            M, N), contiguous, fp32, one for each of as many equal parts of K.
        splits: `tuning.activation_splits` or `tuning.rank_splits`.
        base: (M, N), any strides.
        m_scale, k_scale, n_scale: (M), (K) and (N), contiguous.
        drop_x, drop_out: what to drop of x, or of the product before `base` is added.
    """
    M, N = out.shape[-2:]
    K = w.shape[0]
    shares = out.shape[0] if out.dim() == 3 else 1
    in_partials = x.dim() == 3
    dropout = drop_x or drop_out or Dropout(None, 0, 1.0)
    config = tuning.scaled_matmul(
        M, N, splits, in_partials=in_partials, drops=dropout.seed is not None, adds=base is not None
    )
    launch(
        _scaled_matmul_kernel,
        (tuning.cdiv(M, config["BLOCK_M"]) * tuning.cdiv(N, config["BLOCK_N"]), shares),
        X_ptr=x,
        W_ptr=w,
        Base_ptr=base,
        MScale_ptr=m_scale,
        KScale_ptr=k_scale,
        NScale_ptr=n_scale,
        XSeed_ptr=None if drop_x is None else drop_x.seed,
        CSeed_ptr=None if drop_out is None else drop_out.seed,
        C_ptr=out,
        M=M,
        N=N,
        K=K,
        partials=x.shape[0] if in_partials else 1,
        stride_xp=x.stride(0) if in_partials else 0,
        stride_xm=x.stride(-2),
        stride_xk=x.stride(-1),
        stride_wk=w.stride(0),
        stride_wn=w.stride(1),
        stride_bm=0 if base is None else base.stride(0),
        stride_bn=0 if base is None else base.stride(1),
        drop_threshold=dropout.threshold,
        drop_scale=dropout.scale,
        INPUT_PRECISION=tuning.input_precision(),
        DEPTH=tuning.cdiv(tuning.cdiv(K, shares), config["BLOCK_K"]) * config["BLOCK_K"],
        **splits,
        **config,
    )
    return out
