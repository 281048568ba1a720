"""The one comparison of tests and benchmark: a result may be twice as wrong as PyTorch's own, plus a floor."""

import torch
from torch import Tensor

# Below the rounding of the operands themselves, by the dtype of the activations. fp32: a few units in the last place,
# for sums in another order. 16 bits: the matrix unit sees two bf16 halves of every fp32 value, that is 16 bits of it.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-15, torch.float16: 2**-15}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||; where the truth is zero, ||value||. NaN where either holds one."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, not {tuple(truth.shape)}"
    scale = truth.norm()
    return ((value - truth).norm() / (scale if scale > 0 else 1)).item()


def allowed_error(eager_error: float, dtype: torch.dtype) -> float:
    """2 eager_error + FLOOR[dtype]: what a relative error may be where plain PyTorch's is `eager_error`."""
    return 2 * eager_error + FLOOR[dtype]


def assert_as_exact_as_eager(value: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, what: str) -> None:
    """err(value) <= 2 err(eager) + FLOOR[dtype], both against `truth` in float64.

    Args:
        value: the result under test.
        eager: plain PyTorch's result from the same inputs in the same dtypes.
        truth: the result in float64 from the same rounded inputs.
        dtype: of the activations.
        what: names the tensor in the failure.
    """
    error, allowed = relative_error(value, truth), allowed_error(relative_error(eager, truth), dtype)
    assert value.dtype == eager.dtype, f"{what}: {value.dtype}, not {eager.dtype}"
    # Not `error > allowed`: NaN must fail.
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"
