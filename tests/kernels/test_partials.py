"""Sums of partials: all of them, in order, and with offsets past 2^31."""

import numpy as np
import pytest
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


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 34, 63, 64, 65, 86, 264])
def test_every_partial_is_part_of_the_sum_and_in_its_turn(count):
    # As many as come from memory at once, one more and one less. Powers of 3 lose bits in fp32: the order shows.
    partials = 3.0 ** torch.randint(-12, 12, (count, 37, 5), generator=torch.Generator().manual_seed(count))
    expected = np.zeros((37, 5), dtype=np.float32)
    for partial in partials.numpy():
        expected += partial
    assert torch.equal(launch_sum_partials(partials.to(DEVICE)).cpu(), torch.from_numpy(expected))
    # Each one alone, the last among them.
    for i in {0, 1, count - 2, count - 1}:
        alone = torch.zeros(count, 3, 2, device=DEVICE)
        alone[i] = 7.0
        assert (launch_sum_partials(alone) == 7).all(), i
