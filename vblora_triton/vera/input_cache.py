"""One projected input for all the layers that read it: q, k and v, or gate and up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from vblora_triton import ops
from vblora_triton.ops.dispatch import resolve
from vblora_triton.ops.modes import TensorState, is_plain


class _Entry(NamedTuple):
    """The last input that met an A, and what it was projected to."""

    A: Tensor
    x: TensorState
    base_dtype: torch.dtype
    projected: ops.ProjectedInput | None


# id(A) -> entry, of the forward pass of a model that is under way in this thread; None outside of one.
_entries: ContextVar[dict[int, _Entry] | None] = ContextVar("projected_inputs", default=None)


@contextmanager
def shared_inputs() -> Iterator[None]:
    """Let layers that read the very same tensor, inside the context, share what it is projected to.

    Only values are shared, and no part of autograd's graph: each layer keeps what its own gradients need, as if it were
    alone. So checkpointing may repeat any of them without the others. Nothing outlives the context.
    """
    token = _entries.set({})
    try:
        yield
    finally:
        _entries.reset(token)


def may_share(x: Tensor, base: Tensor | ops.FrozenLinear, backend: str) -> bool:
    """Say whether what x is projected to may be kept for other layers, and there is use for it.

    Args:
        x: the layer's input, without dropout.
        base: the base layer's result, or the layer, where the op computes it.
        backend: of the layer.
    """
    # A compiler finds equal products itself, and what a mode looks at may be replayed in another order. On a CPU
    # PyTorch computes, which has no use for it, unless it was told to run the kernels.
    return (
        is_plain(x, base if isinstance(base, Tensor) else None)
        and _entries.get() is not None
        and not x.is_inference()
        and not (x.is_cpu and resolve(backend) != "triton")
    )


def find(x: Tensor, A: Tensor, base: Tensor | ops.FrozenLinear) -> ops.ProjectedInput | None:
    """Return what another layer projected this very x to by A, if one did, for results in base's dtype."""
    entry = (_entries.get() or {}).get(id(A))
    return entry.projected if entry and entry.base_dtype == _dtype(x, base) and entry.x.holds(x) else None


def keep(x: Tensor, A: Tensor, base: Tensor | ops.FrozenLinear, projected: ops.ProjectedInput | None) -> None:
    """Keep what x is projected to by A, one that the model keeps: it is held until the context ends."""
    entries = _entries.get()
    if entries is not None:
        entries[id(A)] = _Entry(A, TensorState.of(x), _dtype(x, base), projected)


def _dtype(x: Tensor, base: Tensor | ops.FrozenLinear) -> torch.dtype:
    return base.dtype if isinstance(base, Tensor) else x.dtype
