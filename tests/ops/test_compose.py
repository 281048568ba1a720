"""The operator of composition, as torch's own checks see it."""

import pytest
import torch

from tests.models import DEVICE
from vblora_triton import ops  # noqa: F401, which defines the operators


@pytest.mark.parametrize("requires_grad", [True, False])
def test_compose_operator_passes_opcheck(requires_grad):
    logits = torch.randn(2, 3, 5, device=DEVICE, requires_grad=requires_grad)
    bank = torch.randn(5, 8, device=DEVICE, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.vblora_triton.compose.default, (logits, bank, 2))


def test_compose_operator_passes_opcheck_with_a_bank_that_has_gaps():
    bank = torch.randn(8, 5, device=DEVICE).T.requires_grad_()
    torch.library.opcheck(torch.ops.vblora_triton.compose.default, (torch.randn(3, 5, device=DEVICE), bank, 2))


def test_a_compiler_is_told_the_strides_that_the_gradient_of_a_bank_with_gaps_has():
    bank = torch.randn(8, 5, device=DEVICE).T
    logits, d_out = torch.randn(3, 5, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    # opcheck of the forward operator does not look at the strides in its backward.
    _, *selection = torch.ops.vblora_triton.compose_fwd(logits, bank, 2)
    gradient = torch.ops.vblora_triton.compose_bwd.default
    arguments = (d_out, *selection, bank, [3, 5], torch.float32, [True, True])
    torch.library.opcheck(gradient, arguments, test_utils="test_faketensor")
