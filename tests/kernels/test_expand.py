"""y = s B^T + bias + base, from several partials of s, at ranks on both sides of where the matrix unit takes over."""

import pytest
import torch

from tests.models import DEVICE
from vblora_triton.kernels.expand import launch_expand_fwd


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("partials", [1, 3])
@pytest.mark.parametrize("r", [1, 3, 4, 5])
def test_expand_adds_up_the_partials_the_bias_and_the_base(r, partials, with_bias, with_base):
    torch.manual_seed(0)
    M, tiles, H, vector_length = 37, 7, 11, 48
    N = tiles * vector_length
    s = torch.randn(partials, M, r, device=DEVICE)
    bank = torch.randn(H, vector_length, device=DEVICE)
    indices = torch.randint(H, (tiles, r, 2), device=DEVICE, dtype=torch.int32)
    weights = torch.rand(tiles, r, 2, device=DEVICE)
    bias = torch.randn(N, device=DEVICE) if with_bias else None
    base = torch.randn(M, N, device=DEVICE) if with_base else None
    y = torch.full((M, N), float("nan"), device=DEVICE)
    total = launch_expand_fwd(s, base, bank, indices, weights, y, bias)
    B = (weights[..., None].double() * bank.double()[indices.long()]).sum(2)  # (tiles, r, vector_length)
    expected = s.double().sum(0) @ B.permute(1, 0, 2).reshape(r, N)
    for addend in (bias, base):
        expected = expected if addend is None else expected + addend
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total.double(), s.double().sum(0), rtol=1e-6, atol=1e-6)
