"""Which backend computes an op, and what all ops need around either."""

# Not "backends.py": torch.compile leaves every file alone whose path has "triton/backends" in it.

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vblora_triton.triton_ops import support

BACKENDS = ("auto", "triton", "reference")

# What `backend="auto"` means at present: `use_backend` changes it for the whole process.
_default_backend = "auto"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Let every op that is called with `backend="auto"` inside the context use `backend`.

    It holds for the whole process: do not let contexts of several threads overlap.

    Args:
        backend: "auto" (Triton where the tensors are on a GPU that it supports, the reference elsewhere), "triton" or
            "reference".
    Raises:
        ValueError: the name is none of these.
    """
    global _default_backend
    check_backend(backend)
    previous, _default_backend = _default_backend, backend
    try:
        yield
    finally:
        _default_backend = previous


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The matmuls of the definition keep their own dtypes: autocast is for the base model."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def seed_for(p: float, x: Tensor) -> Tensor | None:
    """A tensor, and from torch's generator: torch.manual_seed, checkpointing and graph capture reproduce it."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 else None


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"`backend` is {backend!r}; the backends are {', '.join(map(repr, BACKENDS))}.")


def choose(backend: str, sizes: support.Sizes, *tensors: Tensor | None) -> str:
    """The backend that runs, "triton" or "reference"; told to run Triton, raise where it cannot.

    Args:
        sizes: those that the kernels set a limit to.
        tensors: those that they would run on, None left out; the first one says where.
    """
    check_backend(backend)
    if backend == "auto":
        backend = _default_backend
    given = [tensor for tensor in tensors if tensor is not None]
    if backend == "reference" or (backend == "auto" and given[0].device.type != "cuda"):
        return "reference"
    problem = support.unfit(sizes, *given)
    if problem is None:
        return "triton"
    if backend == "auto":
        return "reference"
    error, reason = problem
    raise error(f"backend 'triton' cannot run here: {reason}. Use backend='reference', or 'auto' to have it chosen.")
