"""Which backend computes an op, and what all ops need around either."""

# Not "backends.py": torch.compile leaves every file alone whose path has "triton/backends" in it.

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vblora_triton.ops import cpu, support
from vblora_triton.ops.checks import check_given, check_in_place

BACKENDS = ("auto", "triton", "reference")

# What `backend="auto"` means at present: `use_backend` changes it for the whole process.
_default_backend = "auto"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Let every op that is called with `backend="auto"` inside the context use `backend`.

    It holds for the whole process: do not let contexts of several threads overlap.

    Args:
        backend: "auto" (Triton where the tensors are on a GPU that it supports, PyTorch elsewhere), "triton" or
            "reference" (PyTorch as plain as can be, differentiable any number of times).
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


def seed_for(p: float, x: Tensor) -> Tensor | None:
    """A tensor, and from torch's generator: torch.manual_seed, checkpointing and graph capture reproduce it."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 else None


def meant(backend: str) -> str:
    """What a backend's name means at present: "auto" may have been set to another one by `use_backend`.

    Raises:
        ValueError: the name is none of a backend.
    """
    check_backend(backend)
    return _default_backend if backend == "auto" else backend


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"`backend` is {backend!r}; the backends are {', '.join(map(repr, BACKENDS))}.")


def choose(backend: str, sizes: support.Sizes, *tensors: Tensor | None) -> str:
    """The backend that runs, "triton" or "reference", or "eager" where the choice is free and the reference would run.

    Told to run Triton, raise where it cannot.

    Args:
        sizes: those that the kernels set a limit to.
        tensors: those that they would run on, all on one device; the first one is not None.
    """
    backend = meant(backend)
    if backend == "reference":
        return "reference"
    if backend == "auto" and is_transformed():
        # Neither the kernels nor `eager` know torch.func's transforms or forward-mode derivatives.
        return "reference"
    first = tensors[0]
    if backend == "auto" and first is not None and not first.is_cuda:
        return "eager" if cpu.fits(first) else "reference"
    given = [tensor for tensor in tensors if tensor is not None]
    problem = support.unfit(sizes, *given)
    if problem is None:
        return "triton"
    if backend == "auto":
        return "reference"
    error, reason = problem
    raise error(f"backend 'triton' cannot run here: {reason}. Use backend='reference', or 'auto' to have it chosen.")


def is_transformed() -> bool:
    """Say whether a transform of torch.func, or a forward-mode derivative, is under way."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def writes_in_place(x: Tensor, base_out: Tensor, otherwise: str) -> bool:
    """Whether to write into base_out, which is checked; compilers and transforms are given a new tensor."""
    check_given(base_out, otherwise)
    if is_transformed():
        return False
    compiling = torch.compiler.is_compiling()
    check_in_place(x, base_out, otherwise, compiling)
    return not compiling
