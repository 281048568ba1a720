"""The public functions: they check their arguments, choose a backend, and call the kernels or the reference."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from vblora_triton import reference, triton_ops

BACKENDS = ("auto", "triton", "reference")

# What `backend="auto"` means at present: `use_backend` changes it for the whole process.
_default_backend = "auto"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Let every op that is called with `backend="auto"` inside the context use `backend`.

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
    _check_tensors(logits=logits, vector_bank=vector_bank)
    _check_bank(vector_bank, topk)
    if logits.dim() == 0 or logits.shape[-1] != vector_bank.shape[0]:
        raise ValueError(
            f"`logits` has shape {tuple(logits.shape)}; its last dimension must be the {vector_bank.shape[0]} vectors "
            f"of `vector_bank` {tuple(vector_bank.shape)}."
        )
    if _choose(backend, topk, 1, vector_bank.shape[0], logits, vector_bank) == "reference":
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
    _check_tensors(x=x, logits_A=logits_A, logits_B=logits_B, vector_bank=vector_bank)
    if base_out is not None:
        _check_tensors(x=x, base_out=base_out)
    _check_bank(vector_bank, topk)
    _check_linear(x, base_out, logits_A, logits_B, vector_bank)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"`dropout_p` is {dropout_p}; it is a probability, from 0 to 1.")
    p = float(dropout_p) if training else 0.0
    tensors = (
        (x, logits_A, logits_B, vector_bank) if base_out is None else (x, logits_A, logits_B, vector_bank, base_out)
    )
    if _choose(backend, topk, logits_A.shape[0], vector_bank.shape[0], *tensors) == "reference":
        # The matmuls of the definition keep their own dtypes: autocast is for the base model.
        with _no_autocast(x.device.type):
            return reference.vblora_linear(
                x, base_out, logits_A, logits_B, vector_bank, topk, dropout_p=p, training=training
            )
    # A tensor, and from torch's generator: torch.manual_seed, checkpointing and graph capture reproduce it.
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 else None
    return torch.ops.vblora_triton.vblora_linear(x, base_out, logits_A, logits_B, vector_bank, topk, p, seed)


def _no_autocast(device_type: str):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"`backend` is {backend!r}; the backends are {', '.join(map(repr, BACKENDS))}.")


def _check_tensors(**tensors: Tensor) -> None:
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"`{name}` must be a floating tensor, not {what}.")
        if tensor.device != tensors[first].device:
            raise ValueError(
                f"`{name}` is on {tensor.device} and `{first}` on {tensors[first].device}; move them to one device."
            )


def _check_bank(vector_bank: Tensor, topk: int) -> None:
    if vector_bank.dim() != 2 or 0 in vector_bank.shape:
        raise ValueError(
            f"`vector_bank` has shape {tuple(vector_bank.shape)}; it must be (num_vectors, vector_length), neither 0."
        )
    if isinstance(topk, bool) or not isinstance(topk, int):
        raise TypeError(f"`topk` must be an int, not {type(topk).__name__}.")
    if not 1 <= topk <= vector_bank.shape[0]:
        raise ValueError(f"`topk` is {topk}; it must be from 1 to the {vector_bank.shape[0]} vectors of the bank.")


def _check_linear(x: Tensor, base_out: Tensor | None, logits_A: Tensor, logits_B: Tensor, vector_bank: Tensor) -> None:
    h, b = vector_bank.shape
    if x.dim() == 0:
        raise ValueError("`x` is a scalar; it must be (*batch, in).")
    if logits_A.dim() != 3 or logits_A.shape[0] < 1 or logits_A.shape[1] * b != x.shape[-1] or logits_A.shape[2] != h:
        raise ValueError(
            f"`logits_A` has shape {tuple(logits_A.shape)}; with x {tuple(x.shape)} and a bank of {h} vectors of "
            f"length {b} it must be (r, {x.shape[-1] / b:g}, {h}): `vector_length` must divide the input features."
        )
    r = logits_A.shape[0]
    if logits_B.dim() != 3 or logits_B.shape[1:] != (r, h):
        raise ValueError(
            f"`logits_B` has shape {tuple(logits_B.shape)}; with logits_A {tuple(logits_A.shape)} it must be "
            f"(out / {b}, {r}, {h})."
        )
    if base_out is not None and base_out.shape != (*x.shape[:-1], logits_B.shape[0] * b):
        raise ValueError(
            f"`base_out` has shape {tuple(base_out.shape)}; with x {tuple(x.shape)} and logits_B "
            f"{tuple(logits_B.shape)} it must be {(*x.shape[:-1], logits_B.shape[0] * b)}."
        )


def _choose(backend: str, topk: int, r: int, num_vectors: int, *tensors: Tensor) -> str:
    """The backend that runs, "triton" or "reference"; told to run Triton, raise where it cannot."""
    _check_backend(backend)
    if backend == "auto":
        backend = _default_backend
    if backend == "reference" or (backend == "auto" and tensors[0].device.type != "cuda"):
        return "reference"
    unfit = triton_ops.unfit(topk, r, num_vectors, *tensors)
    if unfit is None:
        return "triton"
    if backend == "auto":
        return "reference"
    error, reason = unfit
    raise error(f"backend 'triton' cannot run here: {reason}. Use backend='reference', or 'auto' to have it chosen.")
