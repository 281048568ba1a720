"""Large products, by PyTorch's own library (cuBLAS on NVIDIA): operands of 8 or 11 bits, sums in fp32.

cuBLAS gives the same bits from run to run on one stream; on several it needs a workspace of fixed size, for which
`torch.use_deterministic_algorithms` asks by CUBLAS_WORKSPACE_CONFIG. fp32 operands follow
`torch.get_float32_matmul_precision()` by themselves.
"""

import torch
from torch import Tensor


def matmul(
    left: Tensor, right: Tensor, out: Tensor | None = None, *, base: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """out = base + alpha left right, rounded once.

    Args:
        left, right: (M, K) and (K, N), any strides, in one dtype.
        out: (M, N), written; in the dtype of the operands, or in fp32, which takes no alpha from 16 bits. Without it
            the result is made in fp32.
        base: (M, N) or (N), in the dtype of `out` or of the operands, or None; may be `out` itself.
    """
    if out is None:
        out = torch.empty((left.shape[0], right.shape[1]), dtype=torch.float32, device=left.device)
    if left.is_cpu and left.dtype != torch.float32:
        # There PyTorch has no fp32 result of 16-bit operands. Their products are exact in fp32.
        product = (left.float() @ right.float()).mul_(alpha)
        return out.copy_(product if base is None else product.add_(base))
    if left.dtype == torch.float16 != out.dtype and torch.backends.cuda.matmul.allow_fp16_accumulation:
        # Sums in fp16 are allowed, and fp32 results are refused.
        left, right, base = left.float(), right.float(), None if base is None else base.float()
    if out.dtype == left.dtype:
        return torch.addmm(out if base is None else base, left, right, beta=int(base is not None), alpha=alpha, out=out)
    if base is None:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.add(base, torch.mm(left, right, out_dtype=out.dtype), out=out)


def matmul_terms(high: Tensor, low: Tensor | None, right: Tensor, r: int) -> Tensor:
    """(high + low) right, in fp32, its terms side by side; low, if there is one, meets the high ones: r columns."""
    sums = matmul(high, right)
    if low is not None:
        sums[:, :r] += matmul(low, right[:, :r])
    return sums
