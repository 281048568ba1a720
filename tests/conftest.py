"""Set-up for every test: where there is no GPU, kernels run under Triton's interpreter."""

import os

import torch

from tests.pair import pair  # noqa: F401 - a fixture

if not torch.cuda.is_available():
    # Before triton is imported: @triton.jit reads it when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"
