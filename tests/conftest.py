"""Set-up for every test: where there is no GPU, kernels run under Triton's interpreter."""

import contextlib
import logging
import os

import torch

if not torch.cuda.is_available():
    # Before triton is imported: @triton.jit reads it when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

# What torchao says when it is imported, as transformers and peft do, would come after pytest's own last line.
logging.disable(logging.ERROR)
with contextlib.suppress(ImportError):
    import torchao  # noqa: F401
logging.disable(logging.NOTSET)

from tests.pair import pair  # noqa: E402, F401 - a fixture
