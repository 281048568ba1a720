"""Triton's interpreter, as the suite uses it where there is no GPU, computes with bfloat16 as PyTorch does."""

import pytest
import torch
import triton
import triton.language as tl

from vblora_triton.kernels.launch import is_interpreted

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="kernels run on a GPU here, not under the interpreter")


@triton.jit
def _round_trip_kernel(X_ptr, High_ptr, Back_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    high = tl.load(X_ptr + offs).to(tl.bfloat16)
    tl.store(High_ptr + offs, high)
    tl.store(Back_ptr + offs, high.to(tl.float32))


@triton.jit
def _dot_kernel(A_ptr, B_ptr, C_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(C_ptr + offs, tl.dot(tl.load(A_ptr + offs), tl.load(B_ptr + offs)))


def test_casts_round_to_nearest_even():
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = bits.view(torch.float32)
    # Ties, carries into the exponent, subnormals, overflow, and what is not finite.
    special = [0.0, -0.0, 1.00390625, 1.01171875, 1.9999999, 3.3961775e38, 3.4028235e38, 1e-40, 1e-45]
    special += [float("inf"), float("-inf"), float("nan")]
    x[: len(special)] = torch.tensor(special)
    high, back = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096)
    _round_trip_kernel[(1,)](x, high, back, N=4096)
    torch.testing.assert_close(high, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_products_are_those_of_the_values():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
