"""Both methods on a CPU: plain PyTorch as in `reference`, with gradients written out so that less is made and kept.

VB-LoRA keeps x, s, its selection, A and B, and gathers the vectors again in backward; VeRA keeps the projected input p
alone, and multiplies dy by it. `reference` says what is computed, and takes over where these cannot go (`why_not`).

Large products go through oneDNN where torch.mm calls MKL on a processor that is not Intel's: there MKL takes 1.5 to 2.5
times longer, and for products in full float32 torch itself does not take oneDNN. Both follow
`torch.set_float32_matmul_precision`. The products with a rank of a few are left to torch.mm: one step, in place of the
base's product where they are added to it.
"""

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vblora_triton.ops import modes, reference
from vblora_triton.ops.reference import FrozenLinear
from vblora_triton.ops.register import first_derivative_only
from vblora_triton.ops.shared_input import HANDS_ON, writable

_unsafe_view = torch.ops.aten._unsafe_view.default


@cache
def onednn() -> Callable[..., Tensor] | None:
    """What torch.compile makes of a frozen linear, where it is faster than torch.mm; None elsewhere.

    It is where torch.mm calls MKL, on a processor of another maker than MKL's.
    """
    try:
        with open("/proc/cpuinfo") as lines:
            makers = {line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")}
    except OSError:
        makers = {platform.processor()}
    foreign = bool(makers) and not any("Intel" in maker for maker in makers)
    return (
        getattr(torch.ops.mkldnn, "_linear_pointwise", None) if foreign and torch.backends.mkl.is_available() else None
    )


# Below so many operations, rows, or columns of the result, torch.mm is done sooner.
LEAST_OPERATIONS = 2**22
LEAST_ROWS = 32
LEAST_COLUMNS = 16
# From so many rows on, a right operand with gaps is worth copying; as it is, oneDNN would take a thousand times longer.
ROWS_TO_COPY = 128


def why_not(op: str, dropout_p: float, tensors: list[Tensor]) -> str | None:
    """Say why a call is left to the reference, or None where it is not.

    Args:
        op: as in `dispatch.BACKENDS`.
        tensors: the first one is x, or logits.
    """
    x = tensors[0]
    if not x.is_cpu:
        return f"the tensors are on {x.device.type}"
    if modes.is_observed():
        return "a compiler, a mode or a transform looks on, or operators are traced"
    if dropout_p > 0:
        return "it has no dropout"
    if x.shape[-1] == 0:
        return "there are no input features"
    if op.startswith("vblora_linear_selected") and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no gradients of calls from a selection"
    return None


def select(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """`reference.select` without sorting, but where a tie or a NaN among the first topk + 1 needs it."""
    values, indices = logits.topk(min(topk + 1, logits.shape[-1]), dim=-1)
    if not (values[..., 1:] < values[..., :-1]).all():
        indices, weights = reference.select(logits, topk)
        return indices.contiguous(), weights
    return indices[..., :topk].contiguous(), values[..., :topk].softmax(-1)


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that all of these are promoted to."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _add(x: Tensor, base: Tensor | FrozenLinear | None, update: Tensor) -> Tensor:
    """base + update, (M, out), rounded once to the dtype of base, in x's shape; or the update, in that of x."""
    shape = (*x.shape[:-1], update.shape[1])
    if isinstance(base, FrozenLinear):
        y = product(x.reshape(-1, x.shape[-1]), *base)
        return _shaped(y.add_(update), shape, y.dtype)
    if base is None:
        return _shaped(update, shape, x.dtype)
    return (base + update.view(shape)).to(base.dtype)


def _add_product(x: Tensor, base: Tensor | FrozenLinear | None, s: Tensor, B_t: Tensor) -> Tensor:
    """`_add` of s B^T, from s (M, r) and B^T (r, out) in one dtype; into the base's product, where that is ours."""
    if not isinstance(base, FrozenLinear) or s.dtype != x.dtype:
        return _add(x, base, s @ B_t)
    y = product(x.reshape(-1, x.shape[-1]), *base).addmm_(s, B_t)
    return _shaped(y, (*x.shape[:-1], y.shape[1]), y.dtype)


def _handed_on(ctx: Any, y: Tensor, x: Tensor, hands_on: object) -> Any:
    if hands_on is not HANDS_ON:
        return y
    ctx.set_materialize_grads(False)
    return y, x.detach()


def _weight(base: Tensor | FrozenLinear | None) -> Tensor | None:
    return base.weight if isinstance(base, FrozenLinear) else None


def _base_input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """dx, (M, in), of the base layer, whose product is ours."""
    return product(dy.reshape(-1, dy.shape[-1]), weight.T)


def _with_others(dx: Tensor, x_shape: torch.Size, x_dtype: torch.dtype, others: Tensor | None) -> Tensor:
    """dx, (M, in), in x's shape and dtype; added in place to that of layers that read the same x (`shared_input`)."""
    return _shaped(dx, x_shape, x_dtype) if others is None else writable(others).add_(dx.view(x_shape))


def vblora_linear(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float = 0.0,
    hands_on: object = None,
) -> Any:
    """`reference.vblora_linear` without dropout; with HANDS_ON also an alias of x."""
    if torch.is_grad_enabled():
        return _VBLoRALinear.apply(x, base, logits_A, logits_B, vector_bank, topk, hands_on)
    vectors = _mixed(*select(_as_rows(logits_A, logits_B), topk), vector_bank)
    return _updated(x, base, vectors, logits_A.shape)[0]


@torch.no_grad()
def vblora_linear_selected(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dropout_p: float = 0.0,
) -> Tensor:
    """`reference.vblora_linear_selected` without dropout and gradients."""
    vectors = _mixed(_as_rows(indices_A, indices_B), _as_rows(weights_A, weights_B), vector_bank)
    return _updated(x, base, vectors, indices_A.shape)[0]


def _as_rows(of_A: Tensor, of_B: Tensor) -> Tensor:
    """(r, in/b, n) and (out/b, r, n) as one matrix of n columns."""
    n = of_A.shape[-1]
    return torch.cat([of_A.reshape(-1, n), of_B.reshape(-1, n)])


def _split(vectors: Tensor, shape_A: torch.Size) -> tuple[Tensor, Tensor]:
    """A, (r, in), and B^T, (r, out), from the bank's vectors mixed for `_as_rows`."""
    r, b = shape_A[0], vectors.shape[1]
    A, B = vectors.split([r * shape_A[1], len(vectors) - r * shape_A[1]])
    return A.view(r, -1), B.view(-1, r, b).transpose(0, 1).reshape(r, -1)


def _mixed(indices: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """`reference.compose_selected` for the rows of matrices, (rows, k)."""
    dtype = torch.promote_types(weights.dtype, bank.dtype)
    vectors = F.embedding(indices, bank).to(dtype)
    return torch.bmm(weights.to(dtype).unsqueeze(1), vectors).squeeze(1).to(bank.dtype)


def _updated(
    x: Tensor, base: Tensor | FrozenLinear | None, vectors: Tensor, shape_A: torch.Size
) -> tuple[Tensor, Tensor]:
    """base + s B^T, and s = x A^T, (M, r), in the wider dtype."""
    A, B_t = _split(vectors, shape_A)
    dtype = torch.promote_types(x.dtype, A.dtype)
    s = x.reshape(-1, x.shape[-1]).to(dtype) @ A.T.to(dtype)
    return _add_product(x, base, s, B_t.to(dtype)), s


class _VBLoRALinear(torch.autograd.Function):
    linear_in = 2
    # What is done to rows of A is done to those of B^T at once: on a CPU it is the number of small steps that costs.

    @staticmethod
    def forward(ctx, x, base, logits_A, logits_B, vector_bank, topk, hands_on):
        indices, weights = select(_as_rows(logits_A, logits_B), topk)
        vectors = _mixed(indices, weights, vector_bank)
        y, s = _updated(x, base, vectors, logits_A.shape)
        ctx.save_for_backward(x, s, indices, weights, vectors, vector_bank, _weight(base))
        ctx.like = (logits_A.shape, logits_A.dtype), (logits_B.shape, logits_B.dtype)
        return _handed_on(ctx, y, x, hands_on)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy, others=None):
        if dy is None:
            return others, *[None] * 6
        x, s, indices, weights, vectors, bank, weight = ctx.saved_tensors
        need_x, need_base, need_A, need_B, need_bank = ctx.needs_input_grad[:5]
        (shape_A, dtype_A), (shape_B, dtype_B) = ctx.like
        A, B_t = _split(vectors, shape_A)
        dy_rows = dy.reshape(len(s), B_t.shape[1]).to(s.dtype)
        ds = dy_rows @ B_t.T.to(s.dtype)
        dx = d_logits_A = d_logits_B = d_bank = None
        if need_x:
            wide_A = A.to(s.dtype)
            if weight is not None and dy.dtype == s.dtype:
                dx = _base_input_grad(dy, weight).addmm_(ds, wide_A)
            else:
                dx = ds @ wide_A
                dx = dx if weight is None else _base_input_grad(dy, weight).add_(dx)
            dx = _with_others(dx, x.shape, x.dtype, others)
        if need_A or need_B or need_bank:
            dA = ds.T @ x.reshape(-1, x.shape[-1]).to(s.dtype)
            dB = (s.T @ dy_rows).view(shape_A[0], -1, bank.shape[1]).transpose(0, 1)
            d_vectors = torch.cat([d.reshape(-1, bank.shape[1]) for d in (dA, dB)]).to(bank.dtype)
            d_selected, d_bank = _mixing_grads(d_vectors, indices, weights, bank)
            rows = [shape_A[0] * shape_A[1], shape_B[0] * shape_B[1]]
            (indices_A, indices_B), (of_A, of_B) = indices.split(rows), d_selected.split(rows)
            d_logits_A = _scattered(indices_A, of_A.to(dtype_A), shape_A) if need_A else None
            d_logits_B = _scattered(indices_B, of_B.to(dtype_B), shape_B) if need_B else None
        return dx, dy if need_base else None, d_logits_A, d_logits_B, d_bank, None, None


def _scattered(indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Values, (rows, k), at their indices among zeros, in this shape of logits."""
    zeros = values.new_zeros(shape)
    zeros.view(-1, shape[-1]).scatter_(-1, indices, values)
    return zeros


def _mixing_grads(d_vectors: Tensor, indices: Tensor, weights: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the selected logits, (rows, k), and of the bank.

    dlogits[index_k] = w_k (g_k - sum_j w_j g_j), g_k = d_vectors . bank[index_k];  dbank[index_k] += w_k d_vectors

    Args:
        d_vectors: (rows, b).
        indices, weights: (rows, k).
    """
    d_mixed = d_vectors.unsqueeze(1).to(torch.promote_types(weights.dtype, bank.dtype))
    d_weights = (d_mixed * F.embedding(indices, bank)).sum(-1).to(weights.dtype)
    d_bank = (d_mixed * weights.unsqueeze(-1)).to(bank.dtype).reshape(-1, bank.shape[1])
    return (
        torch._softmax_backward_data(d_weights, weights, -1, weights.dtype),
        d_bank.new_zeros(bank.shape).index_add_(0, indices.view(-1), d_bank),
    )


def _shaped(rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows in this shape and dtype; no view, so that others can write to it."""
    return (rows if rows.shape == shape else _unsafe_view(rows, shape)).to(dtype)


def vera_linear(
    x: Tensor,
    base: Tensor | FrozenLinear | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    dropout_p: float = 0.0,
    hands_on: object = None,
) -> Any:
    """`reference.vera_linear` without dropout; with HANDS_ON also an alias of x."""
    if torch.is_grad_enabled():
        return _VeraLinear.apply(x, base, lambda_b, lambda_d, A, B, hands_on)
    return _scaled(x, base, lambda_b, lambda_d, A, B)[0]


def _scaled(
    x: Tensor, base: Tensor | FrozenLinear | None, lambda_b: Tensor, lambda_d: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """base + lambda_b * (lambda_d * p) B^T, and p = x A^T, (M, r), in the widest dtype."""
    dtype = widest(x, A, lambda_d)
    wide_A, wide_B = A[:, : x.shape[-1]].to(dtype), B[: lambda_b.shape[0]].to(dtype)
    p = product(x.reshape(-1, x.shape[-1]).to(dtype), wide_A)
    q = product(p * lambda_d, wide_B)
    return _add(x, base, q.mul_(lambda_b) if q.dtype == widest(q, lambda_b) else lambda_b * q), p


class _VeraLinear(torch.autograd.Function):
    linear_in = 2

    @staticmethod
    def forward(ctx, x, base, lambda_b, lambda_d, A, B, hands_on):
        y, p = _scaled(x, base, lambda_b, lambda_d, A, B)
        ctx.save_for_backward(p, lambda_b, lambda_d, A, B, _weight(base))
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return _handed_on(ctx, y, x, hands_on)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy, others=None):
        if dy is None:
            return others, *[None] * 6
        p, lambda_b, lambda_d, A, B, weight = ctx.saved_tensors
        need_x, need_base, need_b, need_d = ctx.needs_input_grad[:4]
        A, B = A[:, : ctx.x_shape[-1]].to(p.dtype), B[: lambda_b.shape[0]].to(p.dtype)
        dy_rows = dy.reshape(-1, dy.shape[-1]).to(p.dtype)
        dx = d_lambda_b = d_lambda_d = None
        if need_b or need_d:
            # (out, r): of both scales' gradients, without anything of the size of dy.
            common = product(dy_rows.T, p.T).mul_(B)
            d_lambda_b = (common @ lambda_d.to(p.dtype)).to(lambda_b.dtype) if need_b else None
            d_lambda_d = (lambda_b.to(p.dtype) @ common).to(lambda_d.dtype) if need_d else None
        if need_x:
            du = product(dy_rows, (lambda_b.to(p.dtype)[:, None] * B).T)
            dx = product(du.mul_(lambda_d), A.T)
            dx = dx if weight is None else _base_input_grad(dy, weight).add_(dx)
            dx = _with_others(dx, ctx.x_shape, ctx.x_dtype, others)
        return dx, dy if need_base else None, d_lambda_b, d_lambda_d, None, None, None


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right^T + bias, without gradients.

    Args:
        left: (M, K).
        right: (N, K), in the dtype of left.
        bias: (N), or None.
    Returns:
        (M, N), contiguous.
    """
    if not _suits_onednn(left, right):
        return F.linear(left, right, bias)
    if not _is_dense(right):
        right = right.contiguous()
    return onednn()(left, right, bias, "none", [], "")  # type: ignore[misc]


def _suits_onednn(left: Tensor, right: Tensor) -> bool:
    (M, K), N = left.shape, right.shape[0]
    return (
        2 * M * N * K >= LEAST_OPERATIONS
        and M >= LEAST_ROWS
        and N >= LEAST_COLUMNS
        and left.dtype == right.dtype == torch.float32
        and left.is_cpu
        and _is_dense(left)
        and (M >= ROWS_TO_COPY or _is_dense(right))
        # FlopCounterMode and selective checkpointing see only operators that they know.
        and modes.is_plain(left, right)
        and torch._C._get_mkldnn_enabled()
        and onednn() is not None
    )


def _is_dense(matrix: Tensor) -> bool:
    """Whether it, or its transpose, is contiguous."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()
