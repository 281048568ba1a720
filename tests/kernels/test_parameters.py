"""Gradients of the bank: whichever rows picked a vector, and however many, against a sum over all rows in float64."""

import pytest
import torch

from tests.models import DEVICE
from vblora_triton.kernels.parameters import launch_parameter_grads

R, TILES_A, TILES_B, H, VECTOR, PARTIALS = 3, 50, 7, 5, 24, 11


def selection_of(rows: int, picks: str, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    if picks == "one vector":
        indices = torch.arange(topk).expand(rows, topk).clone()
    elif picks == "the last":
        indices = (H - 1 - torch.arange(topk)).expand(rows, topk).clone()
    else:
        indices = torch.stack([torch.randperm(H)[:topk] for _ in range(rows)])
    return indices.to(DEVICE, torch.int32), torch.rand(rows, topk, device=DEVICE)


@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("picks", ["one vector", "the last", "any"])
def test_gradient_of_the_bank_is_the_sum_over_the_rows_that_picked_it(picks, topk):
    torch.manual_seed(0)
    # More entries than one program looks at in one go, and of them more matches than it adds in one.
    indices_A, weights_A = selection_of(R * TILES_A, picks, topk)
    indices_B, weights_B = selection_of(TILES_B * R, picks, topk)
    dA = torch.randn(PARTIALS, R, TILES_A * VECTOR, device=DEVICE)
    dB = torch.randn(1, TILES_B * R, VECTOR, device=DEVICE)
    arguments = {
        "vector_bank": torch.randn(H, VECTOR, device=DEVICE),
        "selection": (indices_A, weights_A, indices_B, weights_B),
        "logits_dtypes": (torch.float32, torch.float32),
        "need_logits_A": False,
        "need_logits_B": False,
        "need_bank": True,
    }
    *_, dbank = launch_parameter_grads(dA, dB, **arguments)
    rows_A = dA.double().sum(0).view(R * TILES_A, VECTOR)
    rows_B = dB.double().sum(0)
    expected = torch.zeros(H, VECTOR, dtype=torch.float64, device=DEVICE)
    for rows, indices, weights in ((rows_A, indices_A, weights_A), (rows_B, indices_B, weights_B)):
        for j in range(topk):
            expected.index_add_(0, indices[:, j], weights[:, j, None].double() * rows)
    torch.testing.assert_close(dbank.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(dbank, launch_parameter_grads(dA, dB, **arguments)[2])
