"""VB-LoRA's layers that read one x, as q, k and v do, or gate and up, in one node: x is read once in each direction.

Beside the products with the frozen bases W_i, of rows x (M, K), with A the layers' own below one another, (R, K), and
s and ds likewise side by side, (M, R):

    s = x A^T           y_i = bias_i + s_i B_i^T        y_i = y_i + x W_i^T
    ds_i = dy_i B_i     dx = ds A       dA = ds^T x     dx = dx + sum_i dy_i W_i

What else there is, and the kernels, are those of one layer: `triton_vblora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora_triton.ops import modes, shared_input
from vblora_triton.ops.dispatch import Choice
from vblora_triton.ops.overlap import product_beside
from vblora_triton.ops.reference import FrozenLinear, Selection
from vblora_triton.ops.register import (
    as_rows,
    first_derivative_only,
    on_device,
    refuse_batches,
    rows_of,
)
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
        alike = rest[2] is others[2] and rest[3] == others[3]
        alike = alike and [t.dtype for t in rest[:2]] == [t.dtype for t in others[:2]]
        if not alike or any(isinstance(t, Tensor) and t.data_ptr() == 0 for t in call):
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


class Saved(NamedTuple):
    """What backward is given of forward.

    rows_A, rows_B: which rows of both selections are each layer's.
    """

    x: Tensor
    vector_bank: Tensor
    selection: Selection
    layers: list[Kept]
    rows_A: list[slice]
    rows_B: list[slice]
    dtypes: tuple[torch.dtype, torch.dtype]

    def ranks(self) -> list[slice]:
        """Which columns of s are each layer's."""
        return _one_after_the_other(own.s.shape[1] for own in self.layers)

    def selection_of(self, i: int) -> Selection:
        r, topk = self.layers[i].s.shape[1], self.selection.indices_A.shape[1]
        A = (t[self.rows_A[i]].view(r, -1, topk) for t in self.selection[:2])
        B = (t[self.rows_B[i]].view(-1, r, topk) for t in self.selection[2:])
        return Selection(*A, *B)


def _grouped(values: Iterable[Any], kind: Any) -> list[Any]:
    return [kind(*group) for group in zip(*[iter(values)] * len(kind._fields), strict=True)]


def _one_after_the_other(sizes: Iterable[int]) -> list[slice]:
    """Where those of each layer are among those of all."""
    ends = list(accumulate(sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class Together(torch.autograd.Function):
    """(x, vector_bank, topk, weight, bias, logits_A, logits_B of each layer) -> (y of each layer, an alias of x).

    x (*batch, K) is of the weights' dtype, and nobody observes.
    """

    linear_in = 1

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector_bank: Tensor, topk: int, *given: Any) -> tuple[Tensor, ...]:
        layers: list[Layer] = _grouped(given, Layer)
        kernels, x_rows = launchers(), rows_of(x)
        logits = [(as_rows(layer.logits_A), as_rows(layer.logits_B)) for layer in layers]
        rows_A, rows_B = (_one_after_the_other(len(own) for own in side) for side in zip(*logits, strict=True))
        ranks = _one_after_the_other(layer.logits_A.shape[0] for layer in layers)
        ys, kept = [], []
        first = product_beside(x_rows, layers[0].weight.T)
        with modes.below_autograd(), on_device(x.device), first as product:
            bank = vector_bank.contiguous()
            indices_A, indices_B = (
                torch.empty((rows[-1].stop, topk), dtype=torch.int32, device=x.device) for rows in (rows_A, rows_B)
            )
            weights_A, weights_B = (torch.empty_like(t, dtype=torch.float32) for t in (indices_A, indices_B))
            A = kernels.new_terms(ranks[-1].stop, x.shape[-1], bank.shape[1], x.dtype, x.device)
            for both, of_A, of_B in zip(logits, rows_A, rows_B, strict=True):
                selection = indices_A[of_A], weights_A[of_A], indices_B[of_B], weights_B[of_B]
                kernels.launch_select(*both, selection, bank, A[:, of_A])
            nothing = kernels.Dropout.of(0.0, None)
            s = kernels.launch_shrink_fwd(x_rows, A, bank, indices_A, weights_A, ranks[-1].stop, nothing)
            for own, of_B, layer in zip(ranks, rows_B, layers, strict=True):
                y = x.new_empty((*x.shape[:-1], layer.weight.shape[0]))
                y_rows = rows_of(y)
                # The first layer's, where products come first.
                base, product = product() if product else None, None
                selection_B = indices_B[of_B], weights_B[of_B]
                own_s = kernels.launch_expand_fwd(s[..., own], base, bank, *selection_B, y_rows, layer.bias)
                if base is None:
                    y_rows.addmm_(x_rows, layer.weight.T)
                ys.append(y)
                kept += [layer.weight, own_s]
        ctx.save_for_backward(x, vector_bank, indices_A, weights_A, indices_B, weights_B, *kept)
        ctx.constants = rows_A, rows_B, (layers[0].logits_A.dtype, layers[0].logits_B.dtype)
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
        x, vector_bank, *rest = ctx.saved_tensors
        saved = Saved(x, vector_bank, Selection(*rest[:4]), _grouped(rest[4:], Kept), *ctx.constants)
        # Of a layer whose result nobody used nothing is read, not even a NaN.
        run = _backward if len(used) == len(dys) and modes.is_plain(*grads, x, *rest) else _one_by_one
        with modes.below_autograd():
            return run(ctx.needs_input_grad, dys, dx, saved)


def _backward(needs: Sequence[bool], dys: list[Any], dx: Tensor | None, saved: Saved) -> tuple[Tensor | None, ...]:
    """Return the gradient of each argument of `Together` that `needs` asks for, None for the others.

    Args:
        dx: what others that read x have found, to which its gradient is added, in place; None for none.
    """
    need_x, need_bank, need_logits_A, need_logits_B = needs[0], needs[1], any(needs[5::4]), any(needs[6::4])
    kernels, x, bank = launchers(), saved.x, saved.vector_bank.contiguous()
    found: list[Tensor | None] = [None] * len(needs)
    dx_rows, added, dA, need_dA = None, None, None, need_bank or need_logits_A
    # Those that are still to be added to dx.
    products: list[tuple[Tensor, Tensor]] = []
    if need_x:
        products = [(rows_of(dy), own.weight) for dy, own in zip(dys, saved.layers, strict=True)]
        whole = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else shared_input.writable(dx)
        found[0], dx_rows = whole, rows_of(whole)
        added = None if dx is None else dx_rows
    with on_device(x.device):
        with _first_beside(products, added) as product:
            ds, dB = _over_dy(dys, saved, bank, need_ds=need_x or need_dA, need_dB=need_bank or need_logits_B)
            if product:
                added = product()
                del products[0]
        if ds is not None:
            selection_A, nothing = saved.selection[:2], kernels.Dropout.of(0.0, None)
            dA = kernels.launch_shrink_bwd(rows_of(x), ds, bank, *selection_A, nothing, dx_rows, added, need_dA=need_dA)
        with _first_beside(products, dx_rows) as product:
            dlogits_A, dlogits_B, found[1] = kernels.launch_parameter_grads(
                dA,
                dB,
                bank,
                saved.selection,
                saved.dtypes,
                need_logits_A=need_logits_A,
                need_logits_B=need_logits_B,
                need_bank=need_bank,
            )
            if product:
                product()
                del products[0]
        for dy_rows, weight in products:
            dx_rows.addmm_(dy_rows, weight)  # type: ignore[union-attr]
    for i in range(len(dys)):
        shape_A, shape_B = logits_shapes(saved.selection_of(i), bank)
        if needs[4 * i + 5]:
            found[4 * i + 5] = dlogits_A[saved.rows_A[i]].view(shape_A)
        if needs[4 * i + 6]:
            found[4 * i + 6] = dlogits_B[saved.rows_B[i]].view(shape_B)
    return tuple(found)


def _first_beside(products: list[tuple[Tensor, Tensor]], added: Tensor | None) -> AbstractContextManager[Any]:
    return product_beside(*products[0], added) if products else nullcontext()


def _over_dy(
    dys: list[Tensor], saved: Saved, bank: Tensor, *, need_ds: bool, need_dB: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return ds (M, R), and the partials of dB of all layers, one after the other: one pass over each dy."""
    kernels, ranks = launchers(), saved.ranks()
    rows = [rows_of(dy) for dy in dys]
    sizes = [(*dy.shape, dy.dtype, own.s.shape[1]) for dy, own in zip(rows, saved.layers, strict=True)]
    ds = dB = partials = None
    if need_dB:
        dB = kernels.new_dB(*max(sizes, key=lambda size: size[1]), bank, rows=saved.rows_B[-1].stop)
    if need_ds:
        ds = torch.empty((rows[0].shape[0], ranks[-1].stop), dtype=torch.float32, device=saved.x.device)
    # Layers of one size write the partials of ds side by side, and one launch adds them up.
    for size, group in groupby(range(len(rows)), sizes.__getitem__):
        alike = list(group)
        start, stop = ranks[alike[0]].start, ranks[alike[-1]].stop
        if need_ds:
            partials = kernels.new_ds(*size, saved.x.device, len(alike))
        for i in alike:
            of_B = saved.rows_B[i]
            own_ds = None if partials is None else partials[..., ranks[i].start - start : ranks[i].stop - start]
            own_dB = None if dB is None else dB[:, of_B]
            selection_B = saved.selection.indices_B[of_B], saved.selection.weights_B[of_B]
            kernels.launch_expand_bwd(rows[i], saved.layers[i].s, bank, *selection_B, own_ds, own_dB)
        if ds is not None:
            kernels.launch_sum_partials(partials, ds[:, start:stop])
    return ds, dB


def _one_by_one(needs: Sequence[bool], dys: list[Any], dx: Tensor | None, saved: Saved) -> tuple[Tensor | None, ...]:
    """`_backward` by the operator of one layer, which somebody who observes sees; nothing is written that was given.

    Args:
        dys: None for a layer whose result nobody used.
    """
    found: list[Tensor | None] = [dx if needs[0] else None, *[None] * (len(needs) - 1)]
    for i, (dy, own) in enumerate(zip(dys, saved.layers, strict=True)):
        if dy is None:
            continue
        positions = (0, 4 * i + 5, 4 * i + 6, 1)
        grads = linear.bwd.operator(
            dy,
            saved.x,
            own.s,
            *saved.selection_of(i),
            saved.vector_bank,
            None,
            0.0,
            *saved.dtypes,
            [needs[p] for p in positions],
        )
        for position, grad in zip((p for p in positions if needs[p]), grads, strict=True):
            grad = grad + (rows_of(dy) @ own.weight).view(saved.x.shape) if position == 0 else grad
            before = found[position]
            found[position] = grad if before is None else before + grad
    return tuple(found)
