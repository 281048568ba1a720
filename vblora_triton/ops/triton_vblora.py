"""VB-LoRA's kernels as operators: the adapted linear, from logits or from a selection; selection; composition.

`ops` has checked the arguments; nothing here does again. Kernels are imported at the first call, so that importing the
package needs neither triton nor a GPU.

Forward, of rows x (M, K), with A (r, K) and B (N, r) put together from mixtures sum_k w_k bank[index_k]:

    s = dropout(x) A^T          (M, r)
    y = base + s B^T            (M, N)

Backward, from dy (M, N), in one pass over dy, one over x, and one launch for the parameters:

    ds = dy B                   dB = dy^T s
    dx = dropout'(ds A)         dA = ds^T dropout(x)
    g_k = d . bank[index_k]     for the gradient d, of dA or dB, of each mixture
    dlogits[index_k] = w_k (g_k - sum_j w_j g_j)      zero elsewhere
    dbank[index_k] += w_k d                           over all mixtures
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vblora_triton.ops.reference import Selection
from vblora_triton.ops.register import Differentiable, Operator, as_rows, on_device, rows_of


@cache
def launchers() -> SimpleNamespace:
    """The launchers, which are imported at the first call of an operator."""
    from vblora_triton.kernels import compose, dropout, expand, parameters, partials, select, shrink, tuning

    modules = (compose, dropout, expand, parameters, partials, select, shrink)
    found = {name: value for module in modules for name, value in vars(module).items() if name.startswith("launch_")}
    found |= {"new_terms": compose.new_terms, "new_ds": expand.new_ds, "new_dB": expand.new_dB}
    return SimpleNamespace(**found, Dropout=dropout.Dropout, FEW_ROWS=tuning.FEW_ROWS)


# The base's result, or what gives its product (`overlap`), and its bias.
Base = Tensor | tuple[Callable[[], Tensor], Tensor | None] | None

_SELECTION = "Tensor indices_A, Tensor weights_A, Tensor indices_B, Tensor weights_B"
_DROPOUT = "float dropout_p, Tensor? seed"


def _empty_selection(logits_A: Tensor, logits_B: Tensor, topk: int) -> Selection:
    shape_A, shape_B = (*logits_A.shape[:-1], topk), (*logits_B.shape[:-1], topk)
    return Selection(
        logits_A.new_empty(shape_A, dtype=torch.int32),
        logits_A.new_empty(shape_A, dtype=torch.float32),
        logits_A.new_empty(shape_B, dtype=torch.int32),
        logits_A.new_empty(shape_B, dtype=torch.float32),
    )


def _select(logits_A: Tensor, logits_B: Tensor, topk: int) -> Selection:
    found = _empty_selection(logits_A, logits_B, topk)
    with on_device(logits_A.device):
        launchers().launch_select(as_rows(logits_A), as_rows(logits_B), found)
    return found


select = Operator(
    "vblora_select", "Tensor logits_A, Tensor logits_B, int topk", f"({_SELECTION})", _select, _empty_selection
)


def _linear_bwd(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    needs: list[bool],
    others_dx: Tensor | None = None,
    product: Callable[[], Tensor] | None = None,
) -> list[Tensor]:
    """The gradients of x, logits_A, logits_B and vector_bank that `needs` asks for, in this order.

    Args:
        others_dx: what that of x is added to, in place.
        product: gives what that of x begins with, (M, K): the base's part, with `others_dx` in it (`overlap`).
    """
    kernels, selection = launchers(), Selection(indices_A, weights_A, indices_B, weights_B)
    need_x, need_logits_A, need_logits_B, need_bank = needs
    need_dA, need_dB = need_logits_A or need_bank, need_logits_B or need_bank
    if x.numel() == 0 or dy.numel() == 0:
        nothing = _linear_bwd_fake(dy, x, s, *selection, vector_bank, seed, dropout_p, dtype_A, dtype_B, needs)
        zeros = [grad.zero_() for grad in nothing]
        return zeros if others_dx is None else [others_dx, *zeros[1:]]
    x_rows, dy_rows, bank = rows_of(x), rows_of(dy), vector_bank.contiguous()
    sizes = (*dy_rows.shape, dy.dtype, s.shape[1])
    # Of x's shape from the start: a view of it autograd could not add to in place.
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x and others_dx is None else others_dx
    dA = None
    with on_device(x.device):
        ds = kernels.new_ds(*sizes, x.device) if need_x or need_dA else None
        dB = kernels.new_dB(*sizes, bank) if need_dB else None
        kernels.launch_expand_bwd(dy_rows, s, bank, indices_B, weights_B, ds, dB)
        if ds is not None:
            ds = kernels.launch_sum_partials(ds)
            dx_rows = None if dx is None else rows_of(dx)
            dA = kernels.launch_shrink_bwd(
                x_rows,
                ds,
                bank,
                indices_A,
                weights_A,
                kernels.Dropout.of(dropout_p, seed),
                dx_rows,
                product() if product else None if others_dx is None else dx_rows,
                need_dA=need_dA,
            )
        grads = kernels.launch_parameter_grads(
            dA,
            dB,
            bank,
            selection,
            (dtype_A, dtype_B),
            need_logits_A=need_logits_A,
            need_logits_B=need_logits_B,
            need_bank=need_bank,
        )
    shapes = *logits_shapes(selection, bank), bank.shape
    found = [dx, *(grad if grad is None else grad.view(shape) for grad, shape in zip(grads, shapes, strict=True))]
    return [grad for grad in found if grad is not None]


def logits_shapes(selection: Selection, bank: Tensor) -> tuple[torch.Size, torch.Size]:
    shape_A, shape_B = ((*t.shape[:2], bank.shape[0]) for t in (selection.indices_A, selection.indices_B))
    return torch.Size(shape_A), torch.Size(shape_B)


def _linear_bwd_fake(dy: Tensor, x: Tensor, s: Tensor, *rest: Any) -> list[Tensor]:
    *selection, bank, _, _, dtype_A, dtype_B, needs = rest
    shapes = (x.shape, *logits_shapes(Selection(*selection), bank), bank.shape)
    like = zip(shapes, (x.dtype, dtype_A, dtype_B, bank.dtype), needs, strict=True)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype, need in like if need]


_linear_grads = Operator(
    "vblora_linear_bwd",
    f"Tensor dy, Tensor x, Tensor s, {_SELECTION}, Tensor vector_bank, Tensor? seed, float dropout_p, "
    "ScalarType dtype_A, ScalarType dtype_B, bool[] needs",
    "Tensor[]",
    _linear_bwd,
    _linear_bwd_fake,
)


def _new_y(x: Tensor, base: Base, of_B: Tensor, vector_bank: Tensor) -> Tensor:
    return (base if isinstance(base, Tensor) else x).new_empty((*x.shape[:-1], of_B.shape[0] * vector_bank.shape[1]))


def _linear_fake(
    y: Tensor, x: Tensor, base: Tensor | None, logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int, *_: Any
) -> tuple[Tensor, ...]:
    s = x.new_empty((math.prod(x.shape[:-1]), logits_A.shape[0]), dtype=torch.float32)
    return s, *_empty_selection(logits_A, logits_B, topk)


def _linear_fwd(
    y: Tensor,
    x: Tensor,
    base: Base,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """Write y; return s and the selection."""
    if x.numel() == 0 or y.numel() == 0:
        # Nothing to multiply, and no launch: backward looks at none of these either.
        _write_base(y, base)
        return _linear_fake(y, x, None, logits_A, logits_B, vector_bank, topk)
    kernels, bank, r = launchers(), vector_bank.contiguous(), logits_A.shape[0]
    selection = _empty_selection(logits_A, logits_B, topk)
    with on_device(x.device):
        A = None
        if x.numel() > kernels.FEW_ROWS * x.shape[-1]:
            A = kernels.new_terms(r, x.shape[-1], bank.shape[1], x.dtype, x.device)
        kernels.launch_select(as_rows(logits_A), as_rows(logits_B), selection, bank, A)
        s = _products(y, x, base, A, selection, bank, r, dropout_p, seed)
    return s, *selection


def _products(
    y: Tensor,
    x: Tensor,
    base: Base,
    A: Tensor | None,
    selection: tuple[Tensor, Tensor, Tensor, Tensor],
    bank: Tensor,
    r: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Write y = base + dropout(x) A^T B^T; return s. A: its terms, or None where they are not kept."""
    kernels, (indices_A, weights_A, indices_B, weights_B) = launchers(), selection
    s = kernels.launch_shrink_fwd(rows_of(x), A, bank, indices_A, weights_A, r, kernels.Dropout.of(dropout_p, seed))
    found, bias = (base[0](), base[1]) if isinstance(base, tuple) else (base, None)
    base_rows = None if found is None else rows_of(found)
    return kernels.launch_expand_fwd(s, base_rows, bank, indices_B, weights_B, rows_of(y), bias)


def _write_base(y: Tensor, base: Any) -> None:
    if base is None:
        y.zero_()
    else:
        y.copy_(base)


def _linear_saved(kept: Any, x: Tensor, base: Any, logits_A: Tensor, logits_B: Tensor, *rest: Any) -> Any:
    vector_bank, _, dropout_p, seed = rest
    return (x, *kept, vector_bank, seed), (dropout_p, logits_A.dtype, logits_B.dtype)


linear = Differentiable(
    "vblora_linear",
    f"Tensor x, Tensor? base, Tensor logits_A, Tensor logits_B, Tensor vector_bank, int topk, {_DROPOUT}",
    f"Tensor s, {_SELECTION}",
    allocate=lambda x, base, logits_A, logits_B, vector_bank, *_: _new_y(x, base, logits_B, vector_bank),
    forward=_linear_fwd,
    fake=_linear_fake,
    saved=_linear_saved,
    backward=_linear_grads,
    gradients=(0, 2, 3, 4),
    has_base=True,
    overlaps=True,
)


def _selected_fake(y: Tensor, x: Tensor, base: Tensor | None, indices_A: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (x.new_empty((math.prod(x.shape[:-1]), indices_A.shape[0]), dtype=torch.float32),)


def _selected_fwd(
    y: Tensor,
    x: Tensor,
    base: Base,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """Write y; return s."""
    if x.numel() == 0 or y.numel() == 0:
        _write_base(y, base)
        return _selected_fake(y, x, None, indices_A)
    kernels, bank, r, topk = launchers(), vector_bank.contiguous(), indices_A.shape[0], indices_A.shape[-1]
    with on_device(x.device):
        A = None
        if x.numel() > kernels.FEW_ROWS * x.shape[-1]:
            A = kernels.new_terms(r, x.shape[-1], bank.shape[1], x.dtype, x.device)
            kernels.launch_compose_fwd(bank, indices_A.view(-1, topk), weights_A.view(-1, topk), A)
        return (_products(y, x, base, A, (indices_A, weights_A, indices_B, weights_B), bank, r, dropout_p, seed),)


def _selected_saved(kept: Any, x: Tensor, base: Any, *rest: Any) -> Any:
    *selection, vector_bank, dropout_p, seed = rest
    # No gradient of logits is asked for, and so their dtypes do not matter.
    return (x, *kept, *selection, vector_bank, seed), (dropout_p, torch.float32, torch.float32)


linear_selected = Differentiable(
    "vblora_linear_selected",
    f"Tensor x, Tensor? base, {_SELECTION}, Tensor vector_bank, {_DROPOUT}",
    "Tensor s",
    allocate=lambda x, base, indices_A, weights_A, indices_B, weights_B, vector_bank, *_: _new_y(
        x, base, indices_B, vector_bank
    ),
    forward=_selected_fwd,
    fake=_selected_fake,
    saved=_selected_saved,
    backward=_linear_grads,
    gradients=(0, None, None, 6),
    has_base=True,
    overlaps=True,
)


def _compose_fwd(out: Tensor, logits: Tensor, vector_bank: Tensor, topk: int) -> tuple[Tensor, ...]:
    """Write the mixtures; return the selection."""
    kernels, rows = launchers(), as_rows(logits)
    indices, weights = _compose_fake(out, logits, vector_bank, topk)
    with on_device(logits.device):
        kernels.launch_select(rows, rows[:0], (indices, weights, indices, weights))
        kernels.launch_compose_fwd(vector_bank.contiguous(), indices, weights, rows_of(out))
    return indices, weights


def _compose_fake(out: Tensor, logits: Tensor, vector_bank: Tensor, topk: int) -> tuple[Tensor, ...]:
    shape = (math.prod(logits.shape[:-1]), topk)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


def _compose_bwd(
    d_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    vector_bank: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of logits and vector_bank that `needs` asks for, in this order."""
    nothing = indices[:0], weights[:0]
    with on_device(d_out.device):
        d_logits, _, d_bank = launchers().launch_parameter_grads(
            d_out.reshape(1, -1).float().contiguous(),
            None,
            vector_bank.contiguous(),
            (indices, weights, *nothing),
            (dtype, dtype),
            need_logits_A=needs[0],
            need_logits_B=False,
            need_bank=needs[1],
        )
    return [grad for grad in (None if d_logits is None else d_logits.view(shape), d_bank) if grad is not None]


def _compose_bwd_fake(
    d_out: Tensor, indices: Tensor, weights: Tensor, bank: Tensor, shape: list[int], dtype: torch.dtype, needs: Any
) -> list[Tensor]:
    grads = (d_out.new_empty(tuple(shape), dtype=dtype), bank.new_empty(bank.shape))
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


compose = Differentiable(
    "compose",
    "Tensor logits, Tensor vector_bank, int topk",
    "Tensor indices, Tensor weights",
    allocate=lambda logits, vector_bank, topk: vector_bank.new_empty((*logits.shape[:-1], vector_bank.shape[1])),
    forward=_compose_fwd,
    fake=_compose_fake,
    saved=lambda kept, logits, vector_bank, topk: ((*kept, vector_bank), (logits.shape, logits.dtype)),
    backward=Operator(
        "compose_bwd",
        "Tensor d_out, Tensor indices, Tensor weights, Tensor vector_bank, SymInt[] shape, ScalarType dtype, "
        "bool[] needs",
        "Tensor[]",
        _compose_bwd,
        _compose_bwd_fake,
    ),
    gradients=(0, 1),
    has_base=False,
)
