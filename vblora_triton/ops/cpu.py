"""Both methods on a CPU: plain PyTorch as in `reference`, with gradients written out so that less is made and kept.

Of few rows it is the number of steps that costs, so there are few. VB-LoRA keeps x, s, its selection, A and B, and
gathers the vectors again in backward; VeRA keeps the projected input p and, of narrow layers, what B makes of it.
`reference` says what is computed, and takes over where these cannot go (`why_not`).

Large products go through oneDNN where torch.mm calls MKL on a processor with AVX-512 that is not Intel's: there MKL
does without it, and takes twice as long; for products in full float32 torch itself does not take oneDNN. Both follow
`torch.set_float32_matmul_precision`. The products with a rank of a few are left to torch.mm: one step, in place of the
base's product where they are added to it.
"""

import platform
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vblora_triton.ops import modes, reference
from vblora_triton.ops.reference import FrozenLinear
from vblora_triton.ops.register import first_derivative_only
from vblora_triton.ops.shared_input import HANDS_ON, writable

_unsafe_view = torch.ops.aten._unsafe_view.default
_embedding_backward = torch.ops.aten.embedding_dense_backward.default


@cache
def onednn() -> Callable[..., Tensor] | None:
    """What torch.compile makes of a frozen linear, where it is faster than torch.mm; None elsewhere.

    It is where torch.mm calls MKL, on a processor with AVX-512 of another maker than MKL's. Without AVX-512 the two
    are about as fast.
    """
    try:
        with open("/proc/cpuinfo") as lines:
            makers = {line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")}
    except OSError:
        makers = {platform.processor()}
    foreign = bool(makers) and not any("Intel" in maker for maker in makers)
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return found if foreign and wide and torch.backends.mkl.is_available() else None


# Below so many operations, rows, or columns of the result, torch.mm is done sooner. oneDNN fills the caches with copies
# of its own, which costs what comes next: less where that is another of its products, as VeRA's are.
LEAST_OPERATIONS = 4_800_000
LEAST_OF_SEVERAL = 3_000_000
LEAST_ROWS = 8
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
    steps = values.diff()
    if steps.numel() and not steps.max().item() < 0:
        indices, weights = reference.select(logits, topk)
        return indices.contiguous(), weights
    return indices.narrow(-1, 0, topk).contiguous(), values.narrow(-1, 0, topk).softmax(-1)


def _widest(dtype: torch.dtype, *others: torch.dtype) -> torch.dtype:
    for other in others:
        dtype = dtype if other == dtype else torch.promote_types(dtype, other)
    return dtype


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    # Sooner than t.to(dtype), of a parameter by a microsecond.
    return t if t.dtype == dtype else t.to(dtype)


def _rows(t: Tensor) -> Tensor:
    """(*batch, size) as a matrix, (M, size)."""
    # Not by flatten, which knows no batches of gradients.
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _shaped(rows: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Rows, (M, size), as (*shape[:-1], size) in this dtype; no view, so that others can write to it."""
    return _as(rows if len(shape) == 2 else _unsafe_view(rows, (*shape[:-1], rows.shape[1])), dtype)


def _add(x: Tensor, base: Tensor | FrozenLinear | None, update: Tensor) -> Tensor:
    """base + update, (M, out), rounded once to the dtype of base, in x's shape; or the update, in that of x."""
    if isinstance(base, FrozenLinear):
        return _shaped(product(_rows(x), *base).add_(update), x.shape, x.dtype)
    if base is None:
        return _shaped(update, x.shape, x.dtype)
    return _as(base + update.view(base.shape), base.dtype)


def _handed_on(ctx: Any, y: Tensor, x: Tensor, hands_on: object) -> Any:
    if hands_on is not HANDS_ON:
        return y
    ctx.set_materialize_grads(False)
    return y, x.detach()


def _kept_weight(ctx: Any, base: Tensor | FrozenLinear | None) -> Tensor | None:
    """What is saved of the base's weight, whose product is ours: nothing where it is made again."""
    ctx.again = base.again if isinstance(base, FrozenLinear) else None
    return base.weight if isinstance(base, FrozenLinear) and ctx.again is None else None


def _weight(ctx: Any, kept: Tensor | None) -> Tensor | None:
    return kept if ctx.again is None else ctx.again()


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
    AB = _mixed(*select(_side_by_side(logits_A, logits_B), topk), vector_bank)
    return _updated(x, base, AB)[0]


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
    AB = _mixed(_side_by_side(indices_A, indices_B), _side_by_side(weights_A, weights_B), vector_bank)
    return _updated(x, base, AB)[0]


def _side_by_side(of_A: Tensor, of_B: Tensor) -> Tensor:
    """(r, in/b, n) and (out/b, r, n) as (r, in/b + out/b, n): what is mixed of it is A and B^T in one matrix."""
    return torch.cat([of_A, of_B.transpose(0, 1)], 1)


@lru_cache
def _starts(bags: int, k: int, dtype: torch.dtype) -> Tensor:
    """Where the k vectors of each row begin, for torch.embedding_bag; it is only read."""
    return torch.arange(0, bags * k, k, dtype=dtype, device="cpu")


def _mixed(indices: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """`reference.compose_selected` for (r, tiles, k), put together: (r, tiles * b)."""
    r, tiles, k = indices.shape
    dtype = _widest(weights.dtype, bank.dtype)
    starts, weights = _starts(r * tiles, k, indices.dtype), _as(weights, dtype).view(-1)
    # Mode 0, a sum, is the one that takes weights.
    mixed = torch.embedding_bag(_as(bank, dtype), indices.view(-1), starts, False, 0, False, weights)[0]
    return _as(mixed.view(r, tiles * bank.shape[1]), bank.dtype)


def _updated(x: Tensor, base: Tensor | FrozenLinear | None, AB: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base + s B^T; and s = x A^T, (M, r), A, (r, in), and B^T, (r, out), in the wider dtype."""
    K, dtype = x.shape[-1], _widest(x.dtype, AB.dtype)
    AB = _as(AB, dtype)
    A, B_t = AB.narrow(1, 0, K), AB.narrow(1, K, AB.shape[1] - K)
    rows = _rows(x)
    s = F.linear(_as(rows, dtype), A)
    if isinstance(base, FrozenLinear) and dtype == x.dtype:
        return _shaped(product(rows, *base).addmm_(s, B_t), x.shape, dtype), s, A, B_t
    return _add(x, base, s @ B_t), s, A, B_t


class _VBLoRALinear(torch.autograd.Function):
    linear_in = 2
    # What is done to rows of A is done to those of B^T at once: on a CPU it is the number of small steps that costs.

    @staticmethod
    def forward(ctx, x, base, logits_A, logits_B, vector_bank, topk, hands_on):
        indices, weights = select(_side_by_side(logits_A, logits_B), topk)
        y, s, A, B_t = _updated(x, base, _mixed(indices, weights, vector_bank))
        ctx.save_for_backward(x, s, indices, weights, A, B_t, vector_bank, _kept_weight(ctx, base))
        ctx.like = (logits_A.shape, logits_A.dtype), (logits_B.shape, logits_B.dtype)
        return _handed_on(ctx, y, x, hands_on)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy, others=None):
        if dy is None:
            return others, *[None] * 6
        x, s, indices, weights, A, B_t, bank, kept = ctx.saved_tensors
        need_x, need_base, need_A, need_B, need_bank, *_ = ctx.needs_input_grad
        dy_rows = _as(_rows(dy), s.dtype)
        ds = F.linear(dy_rows, B_t)
        dx = d_logits_A = d_logits_B = d_bank = None
        if need_x:
            weight = _weight(ctx, kept)
            if weight is not None and dy.dtype == s.dtype:
                dx = times(_rows(dy), weight).addmm_(ds, A)
            else:
                dx = ds @ A
                dx = dx if weight is None else times(_rows(dy), weight).add_(dx)
            dx = _with_others(dx, x.shape, x.dtype, others)
        if need_A or need_B or need_bank:
            d_AB = _as(torch.cat([ds.T @ _as(_rows(x), s.dtype), s.T @ dy_rows], 1), bank.dtype)
            d_selected, d_bank = _mixing_grads(d_AB.view(*indices.shape[:2], -1), indices, weights, bank)
            (shape_A, dtype_A), (shape_B, dtype_B) = ctx.like
            (indices_A, indices_B), (of_A, of_B) = (t.split([shape_A[1], shape_B[0]], 1) for t in (indices, d_selected))
            if need_A:
                d_logits_A = of_A.new_zeros(shape_A, dtype=dtype_A)
                d_logits_A.scatter_(2, indices_A, _as(of_A, dtype_A))
            if need_B:
                d_logits_B = of_B.new_zeros(shape_B, dtype=dtype_B)
                d_logits_B.transpose(0, 1).scatter_(2, indices_B, _as(of_B, dtype_B))
        return dx, dy if need_base else None, d_logits_A, d_logits_B, d_bank, None, None


def _mixing_grads(d_vectors: Tensor, indices: Tensor, weights: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the selected logits, (r, tiles, k), and of the bank.

    dlogits[index_k] = w_k (g_k - sum_j w_j g_j), g_k = d_vectors . bank[index_k];  dbank[index_k] += w_k d_vectors

    Args:
        d_vectors: (r, tiles, b).
        indices, weights: (r, tiles, k).
    """
    d_mixed = _as(d_vectors, _widest(weights.dtype, bank.dtype)).unsqueeze(2)
    d_weights = _as((d_mixed * F.embedding(indices, bank)).sum(-1), weights.dtype)
    d_rows = _as(d_mixed * weights.unsqueeze(3), bank.dtype).view(-1, bank.shape[1])
    return (
        torch._softmax_backward_data(d_weights, weights, -1, weights.dtype),
        # As index_add_, which wakes other threads up for each few rows.
        _embedding_backward(d_rows, indices.view(-1), bank.shape[0], -1, False),
    )


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
        # The projections have no gradient, and are looked at sooner where autograd does not see them.
        return _VeraLinear.apply(x, base, lambda_b, lambda_d, (A, B), hands_on)
    return _scaled(x, base, lambda_b, lambda_d, A, B)[0]


def _scaled(
    x: Tensor, base: Tensor | FrozenLinear | None, lambda_b: Tensor, lambda_d: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """base + lambda_b * q, p = x A^T, (M, r), and q = (lambda_d * p) B^T, (M, out), in the widest dtype."""
    dtype = _widest(x.dtype, A.dtype, lambda_d.dtype)
    rows = _rows(x)
    p = product(_as(rows, dtype), _as(_first(A, 1, x.shape[-1]), dtype), least=LEAST_OF_SEVERAL)
    q = product(p * lambda_d, _as(_first(B, 0, lambda_b.shape[0]), dtype), least=LEAST_OF_SEVERAL)
    if not isinstance(base, FrozenLinear) or not x.dtype == dtype == lambda_b.dtype:
        return _add(x, base, lambda_b * q), p, q
    y = product(rows, *base, least=LEAST_OF_SEVERAL).addcmul_(q, lambda_b)
    return _shaped(y, x.shape, dtype), p, q


def _first(matrix: Tensor, dim: int, size: int) -> Tensor:
    return matrix if matrix.shape[dim] == size else matrix.narrow(dim, 0, size)


# Up to so many times the size of p, q is kept as well; of wider layers it is computed again, at a lesser share of all:
# a fifth of backward at 4 (1024 wide, r 256, 384 tokens, torch.mm).
MOST_KEPT = 4


class _VeraLinear(torch.autograd.Function):
    linear_in = 2

    @staticmethod
    def forward(ctx, x, base, lambda_b, lambda_d, projections, hands_on):
        A, B = projections
        y, p, q = _scaled(x, base, lambda_b, lambda_d, A, B)
        keeps = ctx.needs_input_grad[2] and lambda_b.shape[0] <= MOST_KEPT * lambda_d.shape[0]
        ctx.save_for_backward(p, q if keeps else None, lambda_b, lambda_d, A, B, _kept_weight(ctx, base))
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return _handed_on(ctx, y, x, hands_on)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy, others=None):
        if dy is None:
            return others, *[None] * 5
        p, q, lambda_b, lambda_d, A, B, kept = ctx.saved_tensors
        need_x, need_base, need_b, need_d, *_ = ctx.needs_input_grad
        B = _as(_first(B, 0, lambda_b.shape[0]), p.dtype)
        dy_rows = _as(_rows(dy), p.dtype)
        dx = d_lambda_b = d_lambda_d = None
        if need_b:
            q = product(p * _as(lambda_d, p.dtype), B, least=LEAST_OF_SEVERAL) if q is None else q
            d_lambda_b = _as((dy_rows * q).sum(0), lambda_b.dtype)
        if need_d or need_x:
            du = times(dy_rows * _as(lambda_b, p.dtype), B, LEAST_OF_SEVERAL)
            d_lambda_d = _as((du * p).sum(0), lambda_d.dtype) if need_d else None
        if need_x:
            dx = times(du.mul_(lambda_d), _as(_first(A, 1, ctx.x_shape[-1]), p.dtype), LEAST_OF_SEVERAL)
            weight = _weight(ctx, kept)
            dx = dx if weight is None else times(_rows(dy), weight, LEAST_OF_SEVERAL).add_(dx)
            dx = _with_others(dx, ctx.x_shape, ctx.x_dtype, others)
        return dx, dy if need_base else None, d_lambda_b, d_lambda_d, None, None


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, least: int = LEAST_OPERATIONS) -> Tensor:
    """left right^T + bias, without gradients.

    Args:
        left: (M, K).
        right: (N, K), in the dtype of left.
        bias: (N), or None.
        least: how many operations are worth oneDNN's while.
    Returns:
        (M, N), contiguous.
    """
    if not _suits_onednn(left, right, right.shape[0], least):
        return F.linear(left, right, bias)
    return _by_onednn(left, right, bias)


def times(left: Tensor, right: Tensor, least: int = LEAST_OPERATIONS) -> Tensor:
    """left right, (M, N), of (M, K) and (K, N); else as `product`."""
    if not _suits_onednn(left, right, right.shape[1], least):
        return torch.mm(left, right)
    return _by_onednn(left, right.T, None)


def _by_onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    right = right if _is_dense(right) else right.contiguous()
    return onednn()(left, right, bias, "none", [], "")  # type: ignore[misc]


def _suits_onednn(left: Tensor, right: Tensor, N: int, least: int) -> bool:
    return (
        2 * left.numel() * N >= least
        and left.shape[0] >= LEAST_ROWS
        and N >= LEAST_COLUMNS
        and onednn() is not None
        and left.dtype == right.dtype == torch.float32
        and left.is_cpu
        and _is_dense(left)
        and (left.shape[0] >= ROWS_TO_COPY or _is_dense(right))
        # FlopCounterMode and selective checkpointing see only operators that they know.
        and modes.is_plain(left, right)
        and torch._C._get_mkldnn_enabled()
    )


def _is_dense(matrix: Tensor) -> bool:
    """Whether it, or its transpose, is contiguous."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()
