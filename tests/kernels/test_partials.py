"""Sums of partials: in order, and with offsets past 2^31."""

import torch

from tests.models import DEVICE
from vblora_triton.kernels.partials import launch_sum_partials


def test_partials_are_added_in_order():
    # In fp32 this sum depends on its order: (1e8 + 1) - 1e8 is 0, (1e8 - 1e8) + 1 is 1.
    partials = torch.tensor([1e8, 1.0, -1e8], device=DEVICE).view(3, 1, 1).repeat(1, 5, 4)
    assert (launch_sum_partials(partials) == 0).all()
    assert (launch_sum_partials(partials[[0, 2, 1]]) == 1).all()


def test_partials_more_than_2_to_the_31_elements_apart_are_found():
    apart = 2**30
    # Only the pages that are written exist.
    memory = torch.empty(2 * apart + 16, device=DEVICE)
    partials = memory.as_strided((3, 4, 4), (apart, 4, 1))
    values = torch.arange(48.0, device=DEVICE).view(3, 4, 4)
    partials.copy_(values)
    assert torch.equal(launch_sum_partials(partials), values.sum(0))
