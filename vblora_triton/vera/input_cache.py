"""One projection of an input for all the layers that read it: q, k and v, or gate and up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from vblora_triton import ops
from vblora_triton.ops.dispatch import meant
from vblora_triton.tuner.linear import is_plain


class _Entry(NamedTuple):
    """The last input that met an A, and its projection."""

    A: Tensor
    x: weakref.ref[Tensor]
    version: int
    address: int
    base_dtype: torch.dtype
    projection: ops.Projection | None


# id(A) -> entry, of the forward pass of a model that is under way in this thread; None outside of one.
_entries: ContextVar[dict[int, _Entry] | None] = ContextVar("projections", default=None)


@contextmanager
def shared_projections() -> Iterator[None]:
    """Let layers that read the very same tensor, inside the context, share its projection.

    Only values are shared, and no part of autograd's graph: each layer keeps what its own gradients need, as if it were
    alone. So checkpointing may repeat any of them without the others. Nothing outlives the context.
    """
    token = _entries.set({})
    try:
        yield
    finally:
        _entries.reset(token)


def shared_projection(x: Tensor, A: Tensor, result: Tensor, backend: str) -> ops.Projection | None:
    """Return x's projection by A, made now or before for another layer; None for the op to make it.

    Args:
        x: the layer's input, without dropout.
        A: (r, at least in), one that the model keeps: it is held until the context ends.
        result: of the base layer.
        backend: of the layer.
    """
    # A compiler finds equal projections itself, and what a mode looks at may be replayed in another order.
    if not is_plain(x, result) or x.is_inference():
        return None
    entries = _entries.get()
    # On a CPU PyTorch computes, which has no use for one, unless it was told to run the kernels.
    if entries is None or (x.is_cpu and meant(backend) != "triton"):
        return None
    known = entries.get(id(A))
    state = (x._version, x.data_ptr(), result.dtype)
    if known is None or known.x() is not x or (known.version, known.address, known.base_dtype) != state:
        projection = ops.vera_project(x, A, result, backend=backend)
        known = _Entry(A, weakref.ref(x), *state, projection)
        entries[id(A)] = known
    return known.projection
