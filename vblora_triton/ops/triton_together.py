"""VB-LoRA's layers that read one x, as q, k and v do, or gate and up, in one node: x is read once in each direction.

Beside the products with the frozen bases W_i, of rows x (M, K), with A the layers' own below one another, (R, K), and
s and ds likewise side by side, (M, R):

    s = x A^T           y_i = bias_i + s_i B_i^T        y_i = y_i + x W_i^T
    ds_i = dy_i B_i     dx = ds A       dA = ds^T x     dx = dx + sum_i dy_i W_i

What else there is, and the kernels, are those of one layer: `triton_vblora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora_triton.ops import modes, shared_input
from vblora_triton.ops.dispatch import Choice
from vblora_triton.ops.reference import FrozenLinear, Selection
from vblora_triton.ops.register import as_rows, first_derivative_only, on_device, refuse_batches, rows_of
from vblora_triton.ops.triton_vblora import launchers, linear, logits_shapes

# The ranks of all layers together that one product with x has room for at no cost: those of one matrix instruction.
MAX_RANKS = 16


# (x, base, logits_A, logits_B, vector_bank, topk, dropout_p, training, backend), as `vblora_linear` takes them.
Settle = Callable[..., Choice]


def linear_together(settle: Settle, chosen: Choice, x: Tensor, *arguments: Any) -> Tensor | None:
    """Return y of a call that is, or was, computed together with others that read x; None where it goes alone.

    Args:
        settle: checks the arguments of a call and chooses what computes it.
        chosen: what it chose for this one.
        arguments: base, logits_A, logits_B, vector_bank, topk, dropout_p, training, backend.
    """
    if not _may_be_together(chosen, x, *arguments):
        return None
    base, *others = arguments
    # A FrozenLinear is made anew for each call.
    own = (*base, *others)
    y = shared_input.take_result(x, own)
    if y is not None:
        return y
    followers, ranks = [], others[0].shape[0]
    for call in shared_input.followers_of(x, own):
        weight, bias, *rest = call
        if any(isinstance(t, Tensor) and t.data_ptr() == 0 for t in call) or not (
            rest[2] is others[2] and rest[3] == others[3]
        ):
            break
        again = (FrozenLinear(weight, bias), *rest)
        ranks += rest[0].shape[0]
        try:
            follows = ranks <= MAX_RANKS and _may_be_together(settle(x, *again), x, *again)
        except (TypeError, ValueError):
            # If it is called again, that will say so.
            break
        if not follows:
            break
        followers.append(call)
    if not followers:
        return None
    alias = shared_input.newest_alias(x)
    _, _, vector_bank, topk, *_ = others
    layers = [part for call in (own, *followers) for part in call[:4]]
    y, *ahead, alias = Together.apply(alias, vector_bank, topk, *layers)
    shared_input.hand_on(alias)
    shared_input.keep_results(own, followers, ahead)
    return y


def _may_be_together(chosen: Choice, x: Tensor, base: Any, logits_A: Tensor, *_: Any) -> bool:
    """Say whether a call may be computed with others: its base's product is its own, and it drops nothing.

    Its tensors are a model's parameters, which stay from step to step; views of them, and copies on other devices, do
    not. Of few rows A is mixed inside the product.
    """
    return (
        chosen.backend == "triton"
        and chosen.may_hand_on
        and not chosen.calls_base
        and chosen.dropout_p == 0
        and x.grad_fn is not None
        and isinstance(base, FrozenLinear)
        and type(base.weight) is type(logits_A) is nn.Parameter
        and x.numel() > launchers().FEW_ROWS * x.shape[-1]
        and not modes.has_saved_tensor_hooks()
    )


class Layer(NamedTuple):
    """What the node is given of one layer; a weight and a bias that are frozen."""

    weight: Tensor
    bias: Tensor | None
    logits_A: Tensor
    logits_B: Tensor


class Kept(NamedTuple):
    """What the node saves of one layer."""

    weight: Tensor
    s: Tensor
    indices_B: Tensor
    weights_B: Tensor


def _grouped(values: Iterable[Any], kind: Any) -> list[Any]:
    return [kind(*group) for group in zip(*[iter(values)] * len(kind._fields), strict=True)]


def _own_rows(ranks: Iterable[int]) -> list[slice]:
    """Which rows of A are each layer's."""
    ends = list(accumulate(ranks))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class Together(torch.autograd.Function):
    """(x, vector_bank, topk, weight, bias, logits_A, logits_B of each layer) -> (y of each layer, an alias of x).

    x (*batch, K) is of the weights' dtype, and nobody observes.
    """

    linear_in = 1

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector_bank: Tensor, topk: int, *given: Any) -> tuple[Tensor, ...]:
        layers: list[Layer] = _grouped(given, Layer)
        kernels, x_rows, tiles = launchers(), rows_of(x), layers[0].logits_A.shape[1]
        rows = _own_rows(layer.logits_A.shape[0] for layer in layers)
        R = rows[-1].stop
        ys, kept, selections_B = [], [], []
        with modes.below_autograd(), on_device(x.device):
            indices = torch.empty((R, tiles, topk), dtype=torch.int32, device=x.device)
            weights = torch.empty((R, tiles, topk), dtype=torch.float32, device=x.device)
            bank = vector_bank.contiguous()
            A = kernels.new_terms(R, x.shape[-1], bank.shape[1], x.dtype, x.device)
            for own, layer in zip(rows, layers, strict=True):
                shape_B = (*layer.logits_B.shape[:2], topk)
                selection_B = indices.new_empty(shape_B), weights.new_empty(shape_B)
                selections_B.append(selection_B)
                own_A = A[:, own.start * tiles : own.stop * tiles]
                logits = as_rows(layer.logits_A), as_rows(layer.logits_B)
                kernels.launch_select(*logits, (indices[own], weights[own], *selection_B), bank, own_A)
            s = kernels.launch_shrink_fwd(x_rows, A, bank, indices, weights, R, kernels.Dropout.of(0.0, None))
            for own, layer, selection_B in zip(rows, layers, selections_B, strict=True):
                y = x.new_empty((*x.shape[:-1], layer.weight.shape[0]))
                y_rows = rows_of(y)
                bias = None if layer.bias is None else layer.bias.expand(y_rows.shape)
                own_s = kernels.launch_expand_fwd(s[..., own], bias, bank, *selection_B, y_rows)
                y_rows.addmm_(x_rows, layer.weight.T)
                ys.append(y)
                kept += [layer.weight, own_s, *selection_B]
        ctx.save_for_backward(x, vector_bank, indices, weights, *kept)
        ctx.dtypes = [(layer.logits_A.dtype, layer.logits_B.dtype) for layer in layers]
        ctx.set_materialize_grads(False)
        return *ys, x.detach()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *dys, dx = grads
        used = [dy for dy in dys if dy is not None]
        if not used:
            return dx, *[None] * (len(ctx.needs_input_grad) - 1)
        for dy in used:
            refuse_batches("vblora_linear", dy)
        x, vector_bank, indices_A, weights_A, *others = ctx.saved_tensors
        # Of a layer whose result nobody used nothing is read, not even a NaN.
        run = _backward if len(used) == len(dys) and modes.is_plain(*grads, x, *others) else _one_by_one
        kept: list[Kept] = _grouped(others, Kept)
        with modes.below_autograd():
            return run(ctx.needs_input_grad, ctx.dtypes, dys, dx, x, vector_bank, (indices_A, weights_A), kept)


def _backward(
    needs: Sequence[bool],
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    dys: list[Any],
    dx: Tensor | None,
    x: Tensor,
    vector_bank: Tensor,
    selection_A: tuple[Tensor, Tensor],
    kept: list[Kept],
) -> tuple[Tensor | None, ...]:
    """Return the gradient of each argument of `Together` that `needs` asks for, None for the others.

    Args:
        dtypes: of both logits of each layer.
        dx: what others that read x have found, to which its gradient is added, in place; None for none.
    """
    need_x, need_bank, need_dA = needs[0], needs[1], needs[1] or any(needs[5::4])
    kernels, rows, bank = launchers(), _own_rows(own.s.shape[1] for own in kept), vector_bank.contiguous()
    found: list[Tensor | None] = [None] * len(needs)
    dBs: list[Tensor | None] = [None] * len(kept)
    dA, adds = None, need_x and dx is not None
    dx_rows = None
    if need_x:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else shared_input.writable(dx)
        found[0], dx_rows = dx, rows_of(dx)
    with on_device(x.device):
        ds = torch.empty((kept[0].s.shape[0], rows[-1].stop), dtype=torch.float32, device=x.device)
        for i, (own, dy) in enumerate(zip(kept, dys, strict=True)):
            selection_B = own.indices_B, own.weights_B
            need_ds, need_dB = need_x or need_dA, need_bank or needs[4 * i + 6]
            partials, dBs[i] = kernels.launch_expand_bwd(
                rows_of(dy), own.s, bank, *selection_B, need_ds=need_ds, need_dB=need_dB
            )
            if partials is not None:
                kernels.launch_sum_partials(partials, ds[:, rows[i]])
        if need_x or need_dA:
            nothing = kernels.Dropout.of(0.0, None)
            dA = kernels.launch_shrink_bwd(
                rows_of(x), ds, bank, *selection_A, nothing, dx_rows, need_dA=need_dA, add_to_dx=adds
            )
        for i, (own, dy) in enumerate(zip(kept, dys, strict=True)):
            if dx_rows is not None:
                dx_rows.addmm_(rows_of(dy), own.weight)
            indices_A, weights_A = (t[rows[i]] for t in selection_A)
            selection = Selection(indices_A, weights_A, own.indices_B, own.weights_B)
            *found[4 * i + 5 : 4 * i + 7], found[1] = kernels.launch_parameter_grads(
                None if dA is None else dA[:, rows[i]],
                dBs[i],
                bank,
                selection,
                logits_shapes(selection, bank),
                dtypes[i],
                need_logits_A=needs[4 * i + 5],
                need_logits_B=needs[4 * i + 6],
                need_bank=need_bank,
                dbank=found[1],
            )
    return tuple(found)


def _one_by_one(
    needs: Sequence[bool],
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    dys: list[Tensor | None],
    dx: Tensor | None,
    x: Tensor,
    vector_bank: Tensor,
    selection_A: tuple[Tensor, Tensor],
    kept: list[Kept],
) -> tuple[Tensor | None, ...]:
    """`_backward` by the operator of one layer, which somebody who observes sees; nothing is written that was given.

    Args:
        dys: None for a layer whose result nobody used.
    """
    found: list[Tensor | None] = [dx if needs[0] else None, *[None] * (len(needs) - 1)]
    for i, rows in enumerate(_own_rows(own.s.shape[1] for own in kept)):
        own, dy = kept[i], dys[i]
        if dy is None:
            continue
        positions = (0, 4 * i + 5, 4 * i + 6, 1)
        selection = (*(t[rows] for t in selection_A), own.indices_B, own.weights_B)
        grads = linear.bwd.operator(
            dy, x, own.s, *selection, vector_bank, None, 0.0, *dtypes[i], [needs[p] for p in positions]
        )
        for position, grad in zip((p for p in positions if needs[p]), grads, strict=True):
            grad = grad + (rows_of(dy) @ own.weight).view(x.shape) if position == 0 else grad
            before = found[position]
            found[position] = grad if before is None else before + grad
    return tuple(found)
