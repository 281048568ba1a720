"""The public functions: they check their arguments, choose a backend, and call the kernels or the reference."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vblora_triton import reference
from vblora_triton.checks import (
    check_bank,
    check_linear,
    check_selected,
    check_tensors,
    check_topk,
    dropout_in_force,
    is_alias_of,
)
from vblora_triton.triton_ops import linear, support

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
    _check_backend(backend)
    previous, _default_backend = _default_backend, backend
    try:
        yield
    finally:
        _default_backend = previous


def compose(logits: Tensor, vector_bank: Tensor, topk: int, *, backend: str = "auto") -> Tensor:
    """Mix, for each row of logits, its top-k bank vectors.

    out = sum_k softmax(top_k(logits))_k * vector_bank[index_k]      (VB-LoRA, arXiv 2405.15179, eq. 2)

    Equal logits go to the lowest index. Differentiable in both tensors, once.

    Args:
        logits: (*rows, num_vectors), floating.
        vector_bank: (num_vectors, vector_length), floating, on the same device.
        topk: 1 <= topk <= num_vectors.
        backend: "auto", "triton" or "reference"; see `use_backend`.
    Returns:
        (*rows, vector_length), in the dtype of `vector_bank`.
    Raises:
        ValueError: the sizes disagree, `topk` is out of range, or the backend is unknown or cannot run here.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    check_tensors(logits=logits, vector_bank=vector_bank)
    check_bank(vector_bank)
    check_topk(topk, vector_bank.shape[0])
    if logits.dim() == 0 or logits.shape[-1] != vector_bank.shape[0]:
        raise ValueError(
            f"`logits` has shape {tuple(logits.shape)}; its last dimension must be the {vector_bank.shape[0]} vectors "
            f"of `vector_bank` {tuple(vector_bank.shape)}."
        )
    if _choose(backend, 1, topk, vector_bank.shape, logits, vector_bank) == "reference":
        return reference.compose(logits, vector_bank, topk)
    return torch.ops.vblora_triton.compose(logits, vector_bank, topk)


def vblora_linear(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Add the low-rank update of VB-LoRA to the output of the base layer.

    out = base_out + dropout(x) A^T B^T      (VB-LoRA, arXiv 2405.15179, section 3)
    A[i, t*b:(t+1)*b] = compose(logits_A)[i, t]      B[t*b:(t+1)*b, i] = compose(logits_B)[t, i]

    Differentiable once in x, base_out, logits_A, logits_B and vector_bank; the gradient of the logits is zero off their
    top-k entries. Parameters may be wider than the activations and lose nothing by it.

    Args:
        x: (*batch, in), floating.
        base_out: (*batch, out), floating, or None for the update alone. It is not written to.
        logits_A: (r, in/b, num_vectors).
        logits_B: (out/b, r, num_vectors).
        vector_bank: (num_vectors, b).
        topk: 1 <= topk <= num_vectors.
        dropout_p: the probability that an element of x is dropped, in [0, 1], while `training`; the kernels round it
            to a multiple of 2^-16, and scale by what they rounded to.
        backend: "auto", "triton" or "reference"; see `use_backend`.
    Returns:
        (*batch, out), in the dtype of `base_out`, or of `x` where there is none.
    Raises:
        ValueError: the sizes disagree, `topk` or `dropout_p` is out of range, or the backend is unknown or cannot run.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    check_tensors(x=x, base_out=base_out, logits_A=logits_A, logits_B=logits_B, vector_bank=vector_bank)
    check_linear(x, base_out, vector_bank, logits_A, logits_B, vector_bank.shape[0], "logits")
    check_topk(topk, vector_bank.shape[0])
    p = dropout_in_force(dropout_p, training)
    if (
        _choose(backend, logits_A.shape[0], topk, vector_bank.shape, x, logits_A, logits_B, vector_bank, base_out)
        == "reference"
    ):
        with _no_autocast(x.device.type):
            return reference.vblora_linear(
                x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p=p, training=training
            )
    return torch.ops.vblora_triton.vblora_linear(x, base_out, logits_A, logits_B, vector_bank, topk, p, _seed(p, x))


def vblora_linear_(
    x: Tensor,
    base_out: Tensor,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`vblora_linear`, written into `base_out`, which is returned: no second tensor of the size of the output.

    For a `base_out` that nobody else needs: a plain linear's backward does not, an activation's does. Under
    torch.compile it is `vblora_linear`, and the compiler sees to the memory.

    Raises:
        ValueError: as `vblora_linear`; or `base_out` is not contiguous, or shares memory with x.
    """
    check_tensors(x=x, base_out=base_out, logits_A=logits_A, logits_B=logits_B, vector_bank=vector_bank)
    check_linear(x, base_out, vector_bank, logits_A, logits_B, vector_bank.shape[0], "logits")
    check_topk(topk, vector_bank.shape[0])
    p = dropout_in_force(dropout_p, training)
    if x is base_out or (not torch.compiler.is_compiling() and is_alias_of(x, base_out)):
        raise ValueError("`x` and `base_out` share memory, and x is needed as it is; call vblora_linear.")
    if not base_out.is_contiguous():
        raise ValueError(
            f"`base_out` has strides {base_out.stride()}, but only a contiguous tensor can be written in place; "
            "call vblora_linear."
        )
    if torch.compiler.is_compiling():
        return vblora_linear(
            x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p=p, training=training, backend=backend
        )
    if (
        _choose(backend, logits_A.shape[0], topk, vector_bank.shape, x, logits_A, logits_B, vector_bank, base_out)
        == "reference"
    ):
        with _no_autocast(x.device.type):
            # In the wide dtype, so that there is one rounding: that of the sum.
            x = x.to(torch.promote_types(x.dtype, vector_bank.dtype))
            update = reference.vblora_linear(
                x, None, logits_A, logits_B, vector_bank, topk, dropout_p=p, training=training
            )
        return base_out.add_(update)
    return linear.linear_(x, base_out, logits_A, logits_B, vector_bank, topk, p, _seed(p, x))


class Selection(NamedTuple):
    """What the logits of a layer select: their top-k indices, largest logit first, and softmax weights.

    indices_A, weights_A: (r, in/b, topk), int32 and float32.
    indices_B, weights_B: (out/b, r, topk), likewise.
    """

    indices_A: Tensor
    weights_A: Tensor
    indices_B: Tensor
    weights_B: Tensor


def select(logits_A: Tensor, logits_B: Tensor, topk: int, *, backend: str = "auto") -> Selection:
    """Select once what `vblora_linear_selected` then takes as often as the logits stay as they are.

    indices, weights = top_k(logits), softmax(top_k(logits))      (VB-LoRA, arXiv 2405.15179, eq. 2)

    Not differentiable. Equal logits go to the lowest index.

    Args:
        logits_A: (r, in/b, num_vectors), floating.
        logits_B: (out/b, r, num_vectors), floating, on the same device.
        topk: 1 <= topk <= num_vectors.
        backend: "auto", "triton" or "reference"; see `use_backend`.
    Raises:
        ValueError: the sizes disagree, `topk` is out of range, or the backend is unknown or cannot run here.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    check_tensors(logits_A=logits_A, logits_B=logits_B)
    shape_A, shape_B = logits_A.shape, logits_B.shape
    if len(shape_A) != 3 or len(shape_B) != 3 or shape_A[0] != shape_B[1] or shape_A[2] != shape_B[2]:
        raise ValueError(
            f"`logits_A` has shape {tuple(shape_A)} and `logits_B` {tuple(shape_B)}; they must be "
            "(r, in/b, num_vectors) and (out/b, r, num_vectors)."
        )
    check_topk(topk, shape_A[2])
    with torch.no_grad():
        if _choose(backend, shape_A[0], topk, (shape_A[2], 1), logits_A, logits_B) == "triton":
            return Selection(*torch.ops.vblora_triton.vblora_select(logits_A, logits_B, topk))
        (indices_A, weights_A), (indices_B, weights_B) = (reference.select(t, topk) for t in (logits_A, logits_B))
        return Selection(indices_A.int(), weights_A.float(), indices_B.int(), weights_B.float())


def vblora_linear_selected(
    x: Tensor,
    base_out: Tensor | None,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`vblora_linear` from a selection made before, without the logits.

    Differentiable once in x, base_out and vector_bank.

    Args:
        indices_A, weights_A: (r, in/b, topk), int32 and float32; every index below num_vectors, which is not checked.
        indices_B, weights_B: (out/b, r, topk).
        x, base_out, vector_bank, dropout_p, training, backend: see `vblora_linear`.
    Returns:
        (*batch, out), in the dtype of `base_out`, or of `x` where there is none.
    Raises:
        ValueError, TypeError: as `vblora_linear`; or a weight requires a gradient.
    """
    check_tensors(x=x, base_out=base_out, weights_A=weights_A, weights_B=weights_B, vector_bank=vector_bank)
    check_selected(x, indices_A, weights_A, "A")
    check_selected(x, indices_B, weights_B, "B")
    check_linear(x, base_out, vector_bank, indices_A, indices_B, indices_A.shape[-1], "indices")
    r, topk = indices_A.shape[0], indices_A.shape[2]
    check_topk(topk, vector_bank.shape[0])
    p = dropout_in_force(dropout_p, training)
    selection = (indices_A, weights_A, indices_B, weights_B)
    if _choose(backend, r, topk, vector_bank.shape, x, vector_bank, base_out) == "reference":
        with _no_autocast(x.device.type):
            return reference.vblora_linear_selected(
                x, base_out, *selection, vector_bank, dropout_p=p, training=training
            )
    return torch.ops.vblora_triton.vblora_linear_selected(x, base_out, *selection, vector_bank, p, _seed(p, x))


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The matmuls of the definition keep their own dtypes: autocast is for the base model."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _seed(p: float, x: Tensor) -> Tensor | None:
    """A tensor, and from torch's generator: torch.manual_seed, checkpointing and graph capture reproduce it."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 else None


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"`backend` is {backend!r}; the backends are {', '.join(map(repr, BACKENDS))}.")


def _choose(backend: str, r: int, topk: int, bank_shape: tuple[int, ...], *tensors: Tensor | None) -> str:
    """The backend that runs, "triton" or "reference"; told to run Triton, raise where it cannot."""
    _check_backend(backend)
    if backend == "auto":
        backend = _default_backend
    given = [tensor for tensor in tensors if tensor is not None]
    if backend == "reference" or (backend == "auto" and given[0].device.type != "cuda"):
        return "reference"
    unfit = support.unfit(r, topk, *bank_shape, *given)  # type: ignore[arg-type]
    if unfit is None:
        return "triton"
    if backend == "auto":
        return "reference"
    error, reason = unfit
    raise error(f"backend 'triton' cannot run here: {reason}. Use backend='reference', or 'auto' to have it chosen.")
