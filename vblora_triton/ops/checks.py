"""The checks of `ops`: what an argument is, what it must be, and how to get there."""

import math

import torch
from torch import Tensor

from vblora_triton.ops.reference import FrozenLinear


def check_tensors(**tensors: Tensor | FrozenLinear | None) -> None:
    """Check that all are floating tensors on one device; None is allowed to be absent.

    Raises:
        TypeError: one is no floating tensor.
        ValueError: they are on different devices.
    """
    first, device = "", None
    for name, tensor in tensors.items():
        if name == "base" and (tensor is None or isinstance(tensor, FrozenLinear)):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"`{name}` must be a floating tensor, not {what}.")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"`{name}` is on {tensor.device} and `{first}` on {device}; move them to one device.")


def check_topk(topk: int, num_vectors: int) -> None:
    """Check that topk is an int from 1 to num_vectors."""
    if isinstance(topk, bool) or not isinstance(topk, int):
        raise TypeError(f"`topk` must be an int, not {type(topk).__name__}; give int(topk).")
    if not 1 <= topk <= num_vectors:
        raise ValueError(f"`topk` is {topk}; it must be from 1 to the {num_vectors} vectors of the bank.")


def check_bank(vector_bank: Tensor) -> None:
    """Check that the bank is a matrix and not empty."""
    if vector_bank.dim() != 2 or 0 in vector_bank.shape:
        raise ValueError(
            f"`vector_bank` has shape {tuple(vector_bank.shape)}; it must be (num_vectors, vector_length), neither 0."
        )


def check_linear(
    x: Tensor, base: Tensor | FrozenLinear | None, vector_bank: Tensor, A: Tensor, B: Tensor, last: int, what: str
) -> None:
    """Check the sizes of a linear's arguments against each other.

    Args:
        A, B: (r, in/b, last) and (out/b, r, last).
        what: "logits", with `last` the num_vectors, or "indices", with the topk.
    """
    check_bank(vector_bank)
    b = vector_bank.shape[1]
    if x.dim() == 0:
        raise ValueError("`x` is a scalar; it must be (*batch, in).")
    if A.dim() != 3 or A.shape[0] < 1 or A.shape[1] * b != x.shape[-1] or A.shape[2] != last:
        raise ValueError(
            f"`{what}_A` has shape {tuple(A.shape)}; with x {tuple(x.shape)} and a bank {tuple(vector_bank.shape)} "
            + (
                f"it must be (r, {x.shape[-1] // b}, {last})."
                if x.shape[-1] % b == 0
                else f"there is none that fits: `vector_length`, {b}, must divide the {x.shape[-1]} input features."
            )
        )
    if B.dim() != 3 or B.shape[1:] != (A.shape[0], last):
        raise ValueError(
            f"`{what}_B` has shape {tuple(B.shape)}; with {what}_A {tuple(A.shape)} it must be "
            f"(out / {b}, {A.shape[0]}, {last})."
        )
    _check_base(x, base, B.shape[0] * b, f"{what}_B {tuple(B.shape)}")


def _check_base(x: Tensor, base: Tensor | FrozenLinear | None, N: int, beside: str) -> None:
    if isinstance(base, FrozenLinear):
        weight, bias = base
        check_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
        if weight.shape != (N, x.shape[-1]) or (bias is not None and bias.shape != (N,)):
            raise ValueError(
                f"`base` has a weight of {tuple(weight.shape)} and a bias of "
                f"{None if bias is None else tuple(bias.shape)}; with x {tuple(x.shape)} and {beside} they must be "
                f"{(N, x.shape[-1])} and ({N},), or None."
            )
    elif base is not None and base.shape != (*x.shape[:-1], N):
        raise ValueError(
            f"`base` has shape {tuple(base.shape)}; with x {tuple(x.shape)} and {beside} it must be "
            f"{(*x.shape[:-1], N)}."
        )


def check_vera(
    x: Tensor, base: Tensor | FrozenLinear | None, lambda_b: Tensor, lambda_d: Tensor, A: Tensor, B: Tensor
) -> None:
    """Check the sizes of a VeRA linear's arguments against each other, and that A and B are frozen."""
    if x.dim() == 0:
        raise ValueError("`x` is a scalar; it must be (*batch, in).")
    for name, scale, size in (("lambda_b", lambda_b, "out"), ("lambda_d", lambda_d, "r")):
        if scale.dim() != 1 or scale.shape[0] < 1:
            raise ValueError(f"`{name}` has shape {tuple(scale.shape)}; it must be ({size}), not empty.")
    N, r = lambda_b.shape[0], lambda_d.shape[0]
    if A.dim() != 2 or A.shape[0] != r or A.shape[1] < x.shape[-1]:
        raise ValueError(
            f"`A` has shape {tuple(A.shape)}; with x {tuple(x.shape)} and lambda_d {tuple(lambda_d.shape)} it must be "
            f"({r}, at least {x.shape[-1]})."
        )
    if B.dim() != 2 or B.shape[1] != r or B.shape[0] < N:
        raise ValueError(
            f"`B` has shape {tuple(B.shape)}; with lambda_b {tuple(lambda_b.shape)} and lambda_d "
            f"{tuple(lambda_d.shape)} it must be (at least {N}, {r})."
        )
    _check_base(x, base, N, f"lambda_b {tuple(lambda_b.shape)}")
    for name, projection in (("A", A), ("B", B)):
        if projection.requires_grad:
            raise ValueError(
                f"`{name}` requires a gradient, but VeRA's projections are frozen; give {name}.detach() and train "
                "lambda_b and lambda_d."
            )


def check_projects(x: Tensor, A: Tensor) -> None:
    """Check that A can project x."""
    if x.dim() == 0 or A.dim() != 2 or A.shape[1] < x.shape[-1]:
        raise ValueError(
            f"`A` has shape {tuple(A.shape)}; with x {tuple(x.shape)} it must be (r, at least the last size of x)."
        )


def check_projected_input(x: Tensor, A: Tensor, values: Tensor, scale: Tensor, dropout: float) -> None:
    """Check that a projection can be one of x by A, and that no dropout is in force beside it."""
    if dropout > 0:
        raise ValueError(f"`projected` was made without dropout, but `dropout_p` is {dropout}; leave `projected` out.")
    M, r = math.prod(x.shape[:-1]), A.shape[0]
    if values.dtype not in (torch.int16, torch.float32):
        raise TypeError(f"`projected` has values of {values.dtype}; make it with vera_project(x, A).")
    if not (values.is_contiguous() and scale.is_contiguous()):
        raise ValueError("`projected` is not contiguous; make it with vera_project(x, A).")
    # Packed, or the bits of terms, or float32.
    columns = (r, 2 * r) if values.dtype == torch.int16 else (r,)
    if values.dim() != 2 or values.shape[0] != M or values.shape[1] not in columns or values.device != x.device:
        raise ValueError(
            f"`projected` has values of shape {tuple(values.shape)} on {values.device}; with x {tuple(x.shape)} on "
            f"{x.device} and A {tuple(A.shape)} they must be {(M, r)}. Make it with vera_project(x, A)."
        )


def check_selected(x: Tensor, indices: Tensor, weights: Tensor, which: str) -> None:
    """Check the dtypes, shapes and device of one matrix's selection."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"`indices_{which}` must be an int32 tensor, not {type(indices).__name__}.")
    if indices.dtype != torch.int32 or weights.dtype != torch.float32:
        raise TypeError(
            f"`indices_{which}` and `weights_{which}` are {indices.dtype} and {weights.dtype}; "
            "they must be int32 and float32."
        )
    if indices.shape != weights.shape or indices.device != x.device:
        raise ValueError(
            f"`indices_{which}` has shape {tuple(indices.shape)} on {indices.device} and `weights_{which}` "
            f"{tuple(weights.shape)}; the shapes must agree, and the device must be that of x, {x.device}."
        )
    if weights.requires_grad:
        raise ValueError(f"`weights_{which}` requires a gradient, but a selection is frozen; train the logits.")


def dropout_in_force(dropout_p: float, training: bool) -> float:
    """Check the probability, and return it, or 0 where not training."""
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"`dropout_p` must be a number, not {type(dropout_p).__name__}.")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"`dropout_p` is {dropout_p}; it is a probability, from 0 to 1.")
    return float(dropout_p) if training else 0.0
