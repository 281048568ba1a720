"""VeRA's public functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from vblora_triton.ops import cpu, reference, triton_vera
from vblora_triton.ops.checks import (
    check_projected,
    check_projection,
    check_tensors,
    check_vera,
    dropout_in_force,
)
from vblora_triton.ops.dispatch import choose, seed_for, writes_in_place
from vblora_triton.ops.support import no_autocast, vera_sizes


class Projection(NamedTuple):
    """What M rows of a layer's input are projected to, x A^T, (M, r), for all layers that read that input.

    values: float32; or, with many rows and 16-bit activations, int16 in units of the row's `scale`.
    scale: (M) float32; or empty.
    """

    values: Tensor
    scale: Tensor


def vera_project(x: Tensor, A: Tensor, base_out: Tensor | None = None, *, backend: str = "auto") -> Projection | None:
    """Project once what several calls of `vera_linear` read, without dropout: values * scale = x A[:, :in]^T.

    Not differentiable; no gradient goes missing, for `vera_linear` computes that of x from dy.

    Args:
        x: (*batch, in), floating.
        A: (r, at least in).
        base_out: of one of the calls; its dtype says how exact the results can be.
        backend: "auto", "triton" or "reference"; see `use_backend`.
    Returns:
        The projection, or None where PyTorch computes, which has no use for it.
    Raises:
        ValueError, TypeError: as `vera_linear`.
    """
    check_tensors(x=x, base_out=base_out, A=A)
    check_projected(x, A)
    if choose(backend, vera_sizes(A.shape[0]), x, A, base_out) != "triton":
        return None
    return _project(x, A, base_out, 0.0, None)


def _project(x: Tensor, A: Tensor, base_out: Tensor | None, p: float, seed: Tensor | None) -> Projection:
    wide = x.dtype == torch.float32 and (base_out is None or base_out.dtype == torch.float32)
    with torch.no_grad():
        return Projection(*torch.ops.vblora_triton.vera_project(x, A, wide, p, seed))


def vera_linear(
    x: Tensor,
    base_out: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    projection: Projection | None = None,
) -> Tensor:
    """Add the low-rank update of VeRA to the output of the base layer.

    out = base_out + lambda_b * ((lambda_d * (dropout(x) A[:, :in]^T)) B[:out]^T)      (VeRA, arXiv 2310.11454, eq. 2)

    Differentiable once in x, base_out, lambda_b and lambda_d; A and B are frozen. The kernels keep the projection for
    backward, (M, r), and not x. Beside 16-bit activations 16 bits of A and B count where the gradients of lambda_b and
    lambda_d depend on them, 8 with `torch.set_float32_matmul_precision("medium")`.

    Args:
        x: (*batch, in), floating.
        base_out: (*batch, out), floating, or None for the update alone. It is not written to.
        lambda_b: (out).
        lambda_d: (r).
        A: (r, at least in); its first columns are used, where they are.
        B: (at least out, r); its first rows are used, where they are.
        dropout_p: the probability that an element of x is dropped, in [0, 1], while `training`; the kernels round it
            to a multiple of 2^-16, and scale by what they rounded to.
        backend: "auto", "triton" or "reference"; see `use_backend`.
        projection: of x, by `vera_project`, where there is one.
    Returns:
        (*batch, out), in the dtype of `base_out`, or of `x` where there is none.
    Raises:
        ValueError: the sizes disagree, `dropout_p` is out of range, A or B requires a gradient, `projection` is not
            one of x or dropout is in force beside it, or the backend is unknown or cannot run.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    p = dropout_in_force(dropout_p, training)
    chosen = _vera_backend(x, base_out, lambda_b, lambda_d, A, B, backend, projection, p)
    if chosen != "triton":
        with no_autocast(x.device.type):
            if chosen == "eager" and p == 0 and x.shape[-1]:
                return cpu.vera_linear(x, base_out, lambda_b, lambda_d, A, B)
            return reference.vera_linear(x, base_out, lambda_b, lambda_d, A, B, dropout_p=p, training=training)
    given = _projected(x, A, base_out, p, projection)
    return torch.ops.vblora_triton.vera_linear(x, base_out, lambda_b, lambda_d, A, B, *given)


def vera_linear_(
    x: Tensor,
    base_out: Tensor,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    projection: Projection | None = None,
) -> Tensor:
    """`vera_linear`, written into `base_out`, which is returned: no second tensor of the size of the output.

    For a `base_out` that nobody else needs; see `vblora_linear_`.

    Raises:
        ValueError: as `vblora_linear_`.
    """
    p = dropout_in_force(dropout_p, training)
    chosen = _vera_backend(x, base_out, lambda_b, lambda_d, A, B, backend, projection, p)
    if not writes_in_place(x, base_out, "vera_linear"):
        options: dict = {"dropout_p": dropout_p, "training": training, "backend": backend, "projection": projection}
        return vera_linear(x, base_out, lambda_b, lambda_d, A, B, **options)
    if chosen != "triton":
        with no_autocast(x.device.type):
            if chosen == "eager" and p == 0 and x.shape[-1]:
                return cpu.vera_linear(x, base_out, lambda_b, lambda_d, A, B, in_place=True)
            # In the wide dtype, so that there is one rounding: that of the sum.
            x = x.to(cpu.widest(x, A, lambda_d, lambda_b))
            update = reference.vera_linear(x, None, lambda_b, lambda_d, A, B, dropout_p=p, training=training)
        return base_out.add_(update)
    given = _projected(x, A, base_out, p, projection)
    return triton_vera.linear_(x, base_out, lambda_b, lambda_d, A, B, *given)


def _vera_backend(
    x: Tensor,
    base_out: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    backend: str,
    projection: Projection | None,
    p: float,
) -> str:
    check_tensors(x=x, base_out=base_out, lambda_b=lambda_b, lambda_d=lambda_d, A=A, B=B)
    check_vera(x, base_out, lambda_b, lambda_d, A, B)
    if projection is not None:
        check_projection(x, A, *projection, p)
    return choose(backend, vera_sizes(lambda_d.shape[0]), x, lambda_b, lambda_d, A, B, base_out)


def _projected(
    x: Tensor, A: Tensor, base_out: Tensor | None, p: float, projection: Projection | None
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """The projection, given or made, and the dropout that is in it."""
    if projection is None:
        seed = seed_for(p, x)
        return *_project(x, A, base_out, p, seed), p, seed
    return *projection, 0.0, None
