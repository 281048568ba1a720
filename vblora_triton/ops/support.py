"""What the kernels can run on, and where they say that they cannot."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Limits of the kernels; beyond them the arithmetic is the reference's.
MAX_RANK = 64
MAX_TOPK = 1024
MAX_VECTORS = 65536
MAX_VECTOR_LENGTH = 2048
MAX_VERA_RANK = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (name, size, limit) of each size of a call that has a limit.
Sizes = tuple[tuple[str, int, int], ...]


def vblora_sizes(r: int, topk: int, num_vectors: int, vector_length: int) -> Sizes:
    """The sizes of a VB-LoRA op."""
    return (
        ("r", r, MAX_RANK),
        ("topk", topk, MAX_TOPK),
        ("num_vectors", num_vectors, MAX_VECTORS),
        ("vector_length", vector_length, MAX_VECTOR_LENGTH),
    )


def vera_sizes(r: int) -> Sizes:
    """The sizes of a VeRA op."""
    return (("r", r, MAX_VERA_RANK),)


def unfit(sizes: Sizes, *tensors: Tensor) -> tuple[type[Exception], str] | None:
    """Why the kernels cannot run on these arguments: the error to raise and the reason, or None where they can."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return TypeError, f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
    for name, size, limit in sizes:
        if size > limit:
            return ValueError, f"`{name}` is {size}, and its limit is {limit}"
    # Nothing that asks a device can be traced; a graph is compiled for one that runs it.
    reason = None if torch.compiler.is_compiling() else _unfit_device(tensors[0].device)
    return None if reason is None else (ValueError, reason)


@lru_cache
def _unfit_device(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None
    if device.type == "cpu":
        from vblora_triton.kernels.launch import is_interpreted

        if is_interpreted():
            return None
        return "the tensors are on the CPU, and TRITON_INTERPRET=1 was not set before triton was imported"
    return f"the tensors are on {device.type}"


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The matmuls of the definition keep their own dtypes: autocast is for the base model."""
    # The meta device has no autocast to ask about; torch 2.11 cannot compile torch.amp.is_autocast_available.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def as_rows(logits: Tensor) -> Tensor:
    """(*rows, num_vectors) as a matrix whose last dimension is contiguous."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
