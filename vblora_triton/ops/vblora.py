"""VB-LoRA's public functions."""

import torch
from torch import Tensor

from vblora_triton.ops import checks
from vblora_triton.ops.dispatch import Choice, choose, choose_linear, remembered, vblora_sizes
from vblora_triton.ops.reference import FrozenLinear, Selection, frozen_product
from vblora_triton.ops.shared_input import HANDS_ON, hand_on, newest_alias
from vblora_triton.ops.triton_together import linear_together


def compose(logits: Tensor, vector_bank: Tensor, topk: int, *, backend: str = "auto") -> Tensor:
    """Mix, for each row of logits, its top-k bank vectors.

    out = sum_k softmax(top_k(logits))_k * vector_bank[index_k]      (VB-LoRA, arXiv 2405.15179, eq. 2)

    Equal logits go to the lowest index. Differentiable in both tensors, once.

    Args:
        logits: (*rows, num_vectors), floating.
        vector_bank: (num_vectors, vector_length), floating, on the same device.
        topk: 1 <= topk <= num_vectors.
        backend: "auto", "triton", "cpu" or "reference"; see `use_backend`.
    Returns:
        (*rows, vector_length), in the dtype of `vector_bank`.
    Raises:
        ValueError: the sizes disagree, `topk` is out of range, or the backend is unknown or cannot run here.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    return _settle_compose(logits, vector_bank, topk, backend).run(logits, vector_bank, topk)


@remembered
def _settle_compose(logits: Tensor, vector_bank: Tensor, topk: int, backend: str) -> Choice:
    checks.check_tensors(logits=logits, vector_bank=vector_bank)
    checks.check_bank(vector_bank)
    checks.check_topk(topk, vector_bank.shape[0])
    if logits.dim() == 0 or logits.shape[-1] != vector_bank.shape[0]:
        raise ValueError(
            f"`logits` has shape {tuple(logits.shape)}; its last dimension must be the {vector_bank.shape[0]} vectors "
            f"of `vector_bank` {tuple(vector_bank.shape)}."
        )
    return choose("compose", backend, vblora_sizes(1, topk, *vector_bank.shape), 0.0, logits, vector_bank)


def vblora_linear(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    together: bool = True,
) -> Tensor:
    """Add the low-rank update of VB-LoRA to the output of the base layer.

    out = base + dropout(x) A^T B^T      (VB-LoRA, arXiv 2405.15179, section 3)
    A[i, t*b:(t+1)*b] = compose(logits_A)[i, t]      B[t*b:(t+1)*b, i] = compose(logits_B)[t, i]

    Differentiable once in x, base, logits_A, logits_B and vector_bank; the gradient of the logits is zero off their
    top-k entries. Parameters may be wider than the activations and lose nothing by it.

    Args:
        x: (*batch, in), floating.
        base: (*batch, out), floating, or None for the update alone. It is not written to. Or a FrozenLinear, whose
            product with x is then the base: where it can, the op computes it itself, in place of the result and of dx.
        logits_A: (r, in/b, num_vectors).
        logits_B: (out/b, r, num_vectors).
        vector_bank: (num_vectors, b).
        topk: 1 <= topk <= num_vectors.
        dropout_p: the probability that an element of x is dropped, in [0, 1], while `training`; the kernels round it
            to a multiple of 2^-15, and scale by what they rounded to.
        backend: "auto", "triton", "cpu" or "reference"; see `use_backend`.
        together: inside a model's forward the call may be computed with others that read x, before or after their time
            (`triton_together`): False where values change between them without a trace, as hooks may do by `.data`.
    Returns:
        (*batch, out), in the dtype of `base`, or of `x` where there is none or it is a FrozenLinear.
    Raises:
        ValueError: the sizes disagree, `topk` or `dropout_p` is out of range, or the backend is unknown or cannot run.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    arguments = (base, logits_A, logits_B, vector_bank, topk, dropout_p, training, backend)
    chosen = _settle_linear(x, *arguments)
    if together and chosen.may_hand_on and chosen.backend == "triton":
        y = linear_together(_settle_linear, chosen, x, *arguments)
        if y is not None:
            return y
    base = frozen_product(x, base) if chosen.calls_base else base  # type: ignore[arg-type]
    alias = newest_alias(x) if chosen.may_hand_on else None
    if alias is None:
        return chosen.run(x, base, logits_A, logits_B, vector_bank, topk, *chosen.dropout(x))
    y, handed_on = chosen.run(alias, base, logits_A, logits_B, vector_bank, topk, *chosen.dropout(x), HANDS_ON)
    hand_on(handed_on)
    return y


@remembered
def _settle_linear(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    training: bool,
    backend: str,
) -> Choice:
    checks.check_tensors(x=x, base=base, logits_A=logits_A, logits_B=logits_B, vector_bank=vector_bank)
    checks.check_linear(x, base, vector_bank, logits_A, logits_B, vector_bank.shape[0], "logits")
    checks.check_topk(topk, vector_bank.shape[0])
    p = checks.dropout_in_force(dropout_p, training)
    sizes = vblora_sizes(logits_A.shape[0], topk, *vector_bank.shape)
    return choose_linear("vblora_linear", backend, sizes, p, x, base, logits_A, logits_B, vector_bank)


def select(logits_A: Tensor, logits_B: Tensor, topk: int, *, backend: str = "auto") -> Selection:
    """Select once what `vblora_linear_selected` then takes as often as the logits stay as they are.

    indices, weights = top_k(logits), softmax(top_k(logits))      (VB-LoRA, arXiv 2405.15179, eq. 2)

    Not differentiable. Equal logits go to the lowest index.

    Args:
        logits_A: (r, in/b, num_vectors), floating.
        logits_B: (out/b, r, num_vectors), floating, on the same device.
        topk: 1 <= topk <= num_vectors.
        backend: "auto", "triton", "cpu" or "reference"; see `use_backend`.
    Raises:
        ValueError: the sizes disagree, `topk` is out of range, or the backend is unknown or cannot run here.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    checks.check_tensors(logits_A=logits_A, logits_B=logits_B)
    shape_A, shape_B = logits_A.shape, logits_B.shape
    if len(shape_A) != 3 or len(shape_B) != 3 or shape_A[0] != shape_B[1] or shape_A[2] != shape_B[2]:
        raise ValueError(
            f"`logits_A` has shape {tuple(shape_A)} and `logits_B` {tuple(shape_B)}; they must be "
            "(r, in/b, num_vectors) and (out/b, r, num_vectors)."
        )
    checks.check_topk(topk, shape_A[2])
    sizes = vblora_sizes(shape_A[0], topk, shape_A[2], 1)
    with torch.no_grad():
        return Selection(*choose("select", backend, sizes, 0.0, logits_A, logits_B).run(logits_A, logits_B, topk))


def selected_entries(logits: Tensor, topk: int) -> Tensor:
    """Return where the gradient of logits may differ from zero: their top-k entries, as `vblora_linear` selects them.

    Args:
        logits: (*rows, num_vectors), floating.
        topk: 1 <= topk <= num_vectors.
    Returns:
        (rows, topk), int64.
    Raises:
        ValueError, TypeError: as `select`.
    """
    rows = logits.flatten(0, -2)
    return select(rows[None], rows.new_empty(0, 1, rows.shape[-1]), topk).indices_A[0].long()


def vblora_linear_selected(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
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

    Differentiable once in x, base and vector_bank.

    Args:
        indices_A, weights_A: (r, in/b, topk), int32 and float32; every index below num_vectors, which is not checked.
        indices_B, weights_B: (out/b, r, topk).
        x, base, vector_bank, dropout_p, training, backend: see `vblora_linear`.
    Returns:
        (*batch, out), in the dtype of `base`, or of `x` where there is none or it is a FrozenLinear.
    Raises:
        ValueError, TypeError: as `vblora_linear`; or a weight requires a gradient.
    """
    selection = (indices_A, weights_A, indices_B, weights_B)
    chosen = _settle_selected(x, base, *selection, vector_bank, dropout_p, training, backend)
    base = frozen_product(x, base) if chosen.calls_base else base  # type: ignore[arg-type]
    # Backends read the selection as rows without gaps.
    return chosen.run(x, base, *[t.contiguous() for t in selection], vector_bank, *chosen.dropout(x))


@remembered
def _settle_selected(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dropout_p: float,
    training: bool,
    backend: str,
) -> Choice:
    checks.check_tensors(x=x, base=base, weights_A=weights_A, weights_B=weights_B, vector_bank=vector_bank)
    checks.check_selected(x, indices_A, weights_A, "A")
    checks.check_selected(x, indices_B, weights_B, "B")
    checks.check_linear(x, base, vector_bank, indices_A, indices_B, indices_A.shape[-1], "indices")
    # To torch.jit.trace sizes are tensors.
    r, topk = int(indices_A.shape[0]), int(indices_A.shape[2])
    checks.check_topk(topk, vector_bank.shape[0])
    p = checks.dropout_in_force(dropout_p, training)
    sizes = vblora_sizes(r, topk, *vector_bank.shape)
    return choose_linear("vblora_linear_selected", backend, sizes, p, x, base, vector_bank)
