"""VB-LoRA's public functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from vblora_triton.ops import cpu, reference, triton_selected, triton_vblora
from vblora_triton.ops.checks import (
    check_bank,
    check_linear,
    check_selected,
    check_tensors,
    check_topk,
    dropout_in_force,
)
from vblora_triton.ops.dispatch import choose, seed_for, writes_in_place
from vblora_triton.ops.support import no_autocast, vblora_sizes


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
    if choose(backend, vblora_sizes(1, topk, *vector_bank.shape), logits, vector_bank) != "triton":
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
    sizes = vblora_sizes(logits_A.shape[0], topk, *vector_bank.shape)
    chosen = choose(backend, sizes, x, logits_A, logits_B, vector_bank, base_out)
    if chosen != "triton":
        with no_autocast(x.device.type):
            if chosen == "eager" and p == 0 and x.shape[-1]:
                return cpu.vblora_linear(x, base_out, logits_A, logits_B, vector_bank, topk)
            return reference.vblora_linear(
                x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p=p, training=training
            )
    return torch.ops.vblora_triton.vblora_linear(x, base_out, logits_A, logits_B, vector_bank, topk, p, seed_for(p, x))


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

    For a `base_out` that nobody else needs: a plain linear's backward does not, an activation's does. Under compilers
    and transforms it is `vblora_linear`.

    Raises:
        ValueError: as `vblora_linear`; or `base_out` is not contiguous, shares memory with x, is a view, or is a leaf
            that requires a gradient; nothing is written then.
    """
    check_tensors(x=x, base_out=base_out, logits_A=logits_A, logits_B=logits_B, vector_bank=vector_bank)
    check_linear(x, base_out, vector_bank, logits_A, logits_B, vector_bank.shape[0], "logits")
    check_topk(topk, vector_bank.shape[0])
    p = dropout_in_force(dropout_p, training)
    if not writes_in_place(x, base_out, "vblora_linear"):
        return vblora_linear(
            x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p=p, training=training, backend=backend
        )
    sizes = vblora_sizes(logits_A.shape[0], topk, *vector_bank.shape)
    chosen = choose(backend, sizes, x, logits_A, logits_B, vector_bank, base_out)
    if chosen != "triton":
        with no_autocast(x.device.type):
            if chosen == "eager" and p == 0 and x.shape[-1]:
                return cpu.vblora_linear(x, base_out, logits_A, logits_B, vector_bank, topk, in_place=True)
            # In the wide dtype, so that there is one rounding: that of the sum.
            x = x.to(torch.promote_types(x.dtype, vector_bank.dtype))
            update = reference.vblora_linear(
                x, None, logits_A, logits_B, vector_bank, topk, dropout_p=p, training=training
            )
        return base_out.add_(update)
    return triton_vblora.linear_(x, base_out, logits_A, logits_B, vector_bank, topk, p, seed_for(p, x))


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
        if choose(backend, vblora_sizes(shape_A[0], topk, shape_A[2], 1), logits_A, logits_B) == "triton":
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
    p = dropout_in_force(dropout_p, training)
    selection = Selection(indices_A, weights_A, indices_B, weights_B)
    chosen = _selected_backend(x, base_out, selection, vector_bank, backend)
    if chosen != "triton":
        with no_autocast(x.device.type):
            if _eagerly(chosen, p, x, base_out, vector_bank):
                return cpu.vblora_linear_selected(x, base_out, *selection, vector_bank)
            return reference.vblora_linear_selected(
                x, base_out, *selection, vector_bank, dropout_p=p, training=training
            )
    return torch.ops.vblora_triton.vblora_linear_selected(x, base_out, *selection, vector_bank, p, seed_for(p, x))


def vblora_linear_selected_(
    x: Tensor,
    base_out: Tensor,
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
    """`vblora_linear_selected`, written into `base_out`, which is returned; see `vblora_linear_`.

    Raises:
        ValueError, TypeError: as `vblora_linear_selected` and `vblora_linear_`; nothing is written then.
    """
    p = dropout_in_force(dropout_p, training)
    selection = Selection(indices_A, weights_A, indices_B, weights_B)
    chosen = _selected_backend(x, base_out, selection, vector_bank, backend)
    if not writes_in_place(x, base_out, "vblora_linear_selected"):
        return vblora_linear_selected(
            x, base_out, *selection, vector_bank, dropout_p=p, training=training, backend=backend
        )
    if chosen != "triton":
        with no_autocast(x.device.type):
            if _eagerly(chosen, p, x, base_out, vector_bank):
                return cpu.vblora_linear_selected(x, base_out, *selection, vector_bank, in_place=True)
            # In the wide dtype, so that there is one rounding: that of the sum.
            x = x.to(torch.promote_types(x.dtype, vector_bank.dtype))
            update = reference.vblora_linear_selected(x, None, *selection, vector_bank, dropout_p=p, training=training)
        return base_out.add_(update)
    return triton_selected.linear_selected_(x, base_out, *selection, vector_bank, p, seed_for(p, x))


def _selected_backend(
    x: Tensor, base_out: Tensor | None, selection: Selection, vector_bank: Tensor, backend: str
) -> str:
    indices_A, weights_A, indices_B, weights_B = selection
    check_tensors(x=x, base_out=base_out, weights_A=weights_A, weights_B=weights_B, vector_bank=vector_bank)
    check_selected(x, indices_A, weights_A, "A")
    check_selected(x, indices_B, weights_B, "B")
    check_linear(x, base_out, vector_bank, indices_A, indices_B, indices_A.shape[-1], "indices")
    # To torch.jit.trace sizes are tensors.
    r, topk = int(indices_A.shape[0]), int(indices_A.shape[2])
    check_topk(topk, vector_bank.shape[0])
    return choose(backend, vblora_sizes(r, topk, *vector_bank.shape), x, vector_bank, base_out)


def _eagerly(chosen: str, p: float, x: Tensor, *rest: Tensor | None) -> bool:
    """Whether `eager` serves a call from a selection: it has no gradients of that."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *rest))
    return chosen == "eager" and p == 0 and x.shape[-1] > 0 and not recorded
