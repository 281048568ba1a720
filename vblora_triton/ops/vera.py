"""VeRA's public functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from vblora_triton.ops import checks, triton_vera
from vblora_triton.ops.dispatch import Choice, choose_linear, remembered, vera_sizes
from vblora_triton.ops.reference import FrozenLinear, frozen_product
from vblora_triton.ops.shared_input import HANDS_ON, hand_on, newest_alias


class ProjectedInput(NamedTuple):
    """M rows of a layer's input times A, x A^T, (M, r), for all layers that read that input.

    values: float32; beside 16-bit activations int16, in units of `scale` or, of few elements, bits of bfloat16 terms.
    scale: bfloat16, one for each row and block of columns.
    """

    values: Tensor
    scale: Tensor


def vera_project(
    x: Tensor, A: Tensor, base: Tensor | FrozenLinear | None = None, *, backend: str = "auto"
) -> ProjectedInput | None:
    """Project once what several calls of `vera_linear` read, without dropout: values * scale = x A[:, :in]^T.

    Not differentiable; no gradient goes missing, for `vera_linear` computes that of x from dy.

    Args:
        x: (*batch, in), floating.
        A: (r, at least in).
        base: of one of the calls; the dtype of its result says how exact the results can be.
        backend: "auto", "triton", "cpu" or "reference"; see `use_backend`.
    Returns:
        The projected input, or None where PyTorch computes, which has no use for it.
    Raises:
        ValueError, TypeError: as `vera_linear`.
    """
    if _settle_project(x, base, A, backend).backend != "triton":
        return None
    with torch.no_grad():
        return ProjectedInput(*triton_vera.project.on(x, A)(x, A, _all_fp32(x, base), 0.0, None))


@remembered
def _settle_project(x: Tensor, base: Tensor | FrozenLinear | None, A: Tensor, backend: str) -> Choice:
    checks.check_tensors(x=x, base=base, A=A)
    checks.check_projects(x, A)
    return choose_linear("vera_linear", backend, vera_sizes(A.shape[0]), 0.0, x, base, A)


def _all_fp32(x: Tensor, base: Tensor | FrozenLinear | None) -> bool:
    return triton_vera.is_all_fp32(x.dtype, base.dtype if isinstance(base, Tensor) else x.dtype)


def vera_linear(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    projected: ProjectedInput | None = None,
) -> Tensor:
    """Add the low-rank update of VeRA to the output of the base layer.

    out = base + lambda_b * ((lambda_d * (dropout(x) A[:, :in]^T)) B[:out]^T)      (VeRA, arXiv 2310.11454, eq. 2)

    Differentiable once in x, base, lambda_b and lambda_d; A and B are frozen. The kernels keep the projected input for
    backward, (M, r), and not x. Beside 16-bit activations 16 bits of A and B count where the gradients of lambda_b and
    lambda_d depend on them, 8 with `torch.set_float32_matmul_precision("medium")`.

    Args:
        x: (*batch, in), floating.
        base: (*batch, out), floating, or None for the update alone. It is not written to. Or a FrozenLinear; see
            `vblora_linear`.
        lambda_b: (out).
        lambda_d: (r).
        A: (r, at least in); its first columns are used, where they are.
        B: (at least out, r); its first rows are used, where they are.
        dropout_p: the probability that an element of x is dropped, in [0, 1], while `training`; the kernels round it
            to a multiple of 2^-15, and scale by what they rounded to.
        backend: "auto", "triton", "cpu" or "reference"; see `use_backend`.
        projected: of x, by `vera_project`, where there is one.
    Returns:
        (*batch, out), in the dtype of `base`, or of `x` where there is none or it is a FrozenLinear.
    Raises:
        ValueError: the sizes disagree, `dropout_p` is out of range, A or B requires a gradient, `projected` is not
            one of x or dropout is in force beside it, or the backend is unknown or cannot run.
        TypeError: an argument is no floating tensor, or has a dtype that the Triton backend was told to run and cannot.
    """
    chosen = _settle_linear(x, base, lambda_b, lambda_d, A, B, dropout_p, training, backend)
    if projected is not None:
        checks.check_projected_input(x, A, *projected, chosen.dropout_p)
    base = frozen_product(x, base) if chosen.calls_base else base  # type: ignore[arg-type]
    rest = chosen.dropout(x)
    if chosen.backend == "triton":
        # The kernels take the projected input, which has the dropout in it, and both again for backward.
        if projected is None:
            with torch.no_grad():
                projected = ProjectedInput(*triton_vera.project.on(x, A)(x, A, _all_fp32(x, base), *rest))
        rest = (*projected, *rest)
    alias = newest_alias(x) if chosen.may_hand_on else None
    if alias is None:
        return chosen.run(x, base, lambda_b, lambda_d, A, B, *rest)
    y, handed_on = chosen.run(alias, base, lambda_b, lambda_d, A, B, *rest, HANDS_ON)
    hand_on(handed_on)
    return y


@remembered
def _settle_linear(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    dropout_p: float,
    training: bool,
    backend: str,
) -> Choice:
    checks.check_tensors(x=x, base=base, lambda_b=lambda_b, lambda_d=lambda_d, A=A, B=B)
    checks.check_vera(x, base, lambda_b, lambda_d, A, B)
    p = checks.dropout_in_force(dropout_p, training)
    return choose_linear("vera_linear", backend, vera_sizes(lambda_d.shape[0]), p, x, base, lambda_b, lambda_d, A, B)
