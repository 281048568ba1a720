"""Matrix products on a CPU: by oneDNN, where torch brings it, instead of the BLAS that torch.mm calls.

MKL, the BLAS of torch's own builds, is slow on processors of other makers, and for products in full float32 torch
itself does not take oneDNN. Both follow `torch.set_float32_matmul_precision`.
"""

import torch
from torch import Tensor

# What torch.compile makes of a frozen linear; absent from builds without oneDNN.
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Below so many operations, or columns of the result, torch.mm is done sooner.
LEAST_OPERATIONS = 2**22
LEAST_COLUMNS = 16
# From so many rows on, a right operand with gaps is worth copying; as it is, oneDNN would take a thousand times longer.
ROWS_TO_COPY = 128


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, without gradients.

    Args:
        left: (M, K).
        right: (N, K), in the dtype of left.
    Returns:
        (M, N), contiguous.
    """
    if not _serves(left, right):
        return left @ right.T
    if not _is_dense(right):
        right = right.contiguous()
    return _linear(left, right, None, "none", [], "")  # type: ignore[misc]


def _serves(left: Tensor, right: Tensor) -> bool:
    (M, K), N = left.shape, right.shape[0]
    return (
        _linear is not None
        and 2 * M * N * K >= LEAST_OPERATIONS
        and N >= LEAST_COLUMNS
        and left.dtype == right.dtype == torch.float32
        and left.is_cpu
        and type(left) is type(right) is Tensor
        and _is_dense(left)
        and (M >= ROWS_TO_COPY or _is_dense(right))
        # Who counts operations, or keeps some of them, is to see products that he knows.
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_mkldnn_enabled()
    )


def _is_dense(matrix: Tensor) -> bool:
    """Whether it, or its transpose, is contiguous."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()
