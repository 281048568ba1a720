"""How an operator is defined, from one description: schema, implementation, fake, torch.autograd.Function, gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vblora_triton.ops import modes, overlap
from vblora_triton.ops.reference import FrozenLinear
from vblora_triton.ops.shared_input import HANDS_ON, writable

_library = torch.library.Library("vblora_triton", "DEF")


class Operator:
    """An operator `vblora_triton::name(arguments) -> returns`; autograd does not look inside it.

    Args:
        implementation: what it runs, on a GPU and under Triton's interpreter.
        fake: the same without values, which is all that a compiler runs.
    """

    def __init__(self, name: str, arguments: str, returns: str, implementation: Callable, fake: Callable) -> None:
        _library.define(f"{name}({arguments}) -> {returns}")
        for key in ("CPU", "CUDA"):
            _library.impl(name, implementation, key)
        torch.library.register_fake(f"vblora_triton::{name}", fake, lib=_library)
        self.unobserved: Callable = implementation
        self.operator: Callable = getattr(torch.ops.vblora_triton, name)

    def on(self, *tensors: Tensor | None) -> Callable:
        """Return what to call on these: the implementation or, where somebody observes, the operator that he sees."""
        return self.unobserved if modes.is_plain(*tensors) else self.operator


class Differentiable(Operator):
    """The operators `name`, which has a gradient, and `name_fwd`, which returns y and what backward wants.

    The gradient is a torch.autograd.Function: as the implementation for the Autograd key the cheapest form that
    torch.compile and opcheck accept, and where nobody observes called as it is.

    Args:
        arguments: the schema of the arguments.
        results: the schema of what `name_fwd` returns after y, if anything.
        allocate: (*arguments) -> room for y.
        forward: (y, *arguments) -> results, having written y.
        fake: (y, *arguments) -> results without values.
        saved: (results, *arguments) -> what `backward` takes between dy and `needs`: tensors, or None, and then others.
        backward: the operator (dy, *tensors, *others, needs) -> those of the gradients that `needs` asks for. Its
            implementation takes one more argument, if there are layers that read the same x: their dx, to which it
            adds its own, in place (`shared_input`).
        gradients: the position among the arguments of each gradient that `backward` can give; None for none.
        has_base: the second argument is the base's result, or None, to which an update that is linear in x is added:
            its gradient is dy. Where nobody observes it may be a FrozenLinear, whose product is then added in place,
            by cuBLAS with beta = 1, to y as forward has written it, bias + update, and to dx as backward has: no other
            tensor of the size of either exists, and nothing is rounded before the sum.
        overlaps: of few rows the base's product is given to `forward` in the place of base, beside the bias, and to
            `backward` as one more argument, `product`: a callable, called once, as late as it can be (`overlap`).
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        results: str,
        *,
        allocate: Callable[..., Tensor],
        forward: Callable[..., tuple[Tensor, ...]],
        fake: Callable[..., tuple[Tensor, ...]],
        saved: Callable[..., tuple[tuple[Tensor | None, ...], tuple[Any, ...]]],
        backward: Operator,
        gradients: tuple[int | None, ...],
        has_base: bool,
        overlaps: bool = False,
    ) -> None:
        def whole(*args: Any) -> tuple[Tensor, ...]:
            y = allocate(*args)
            return y, *forward(y, *args)

        def whole_fake(*args: Any) -> tuple[Tensor, ...]:
            y = allocate(*args)
            return y, *fake(y, *args)

        results = f"(Tensor y, {results})" if results else "Tensor[]"
        self.fwd, self.bwd = Operator(f"{name}_fwd", arguments, results, whole, whole_fake), backward
        super().__init__(name, arguments, "Tensor", lambda *args: self.fwd.operator(*args)[0], allocate)
        _library.impl(name, self._autograd, "Autograd")
        self._name, self._gradients, self._has_base = name, gradients, has_base
        self._product_beside = overlap.product_beside if overlaps else overlap.product_after
        self._function = self._make_function(allocate, forward, saved)
        self.unobserved, self._forward = self._function.apply, partial(self._function.forward, None)

    def _make_function(self, allocate: Callable, forward: Callable, saved: Callable) -> type[torch.autograd.Function]:
        run, has_base, product_beside = forward, self._has_base, self._product_beside

        class Function(torch.autograd.Function):
            linear_in = 2 if has_base else 0

            @staticmethod
            def forward(ctx, *args):
                weight, again, hands_on = None, None, args[-1] is HANDS_ON
                args = args[:-1] if hands_on else args
                with modes.below_autograd():
                    if has_base and isinstance(args[1], FrozenLinear):
                        x, (weight, bias), *rest = args
                        again = args[1].again
                        y = allocate(x, None, *rest)
                        with product_beside(rows_of(x), weight.T) as product:
                            base = (product, bias) if product else None if bias is None else bias.expand(y.shape)
                            kept = run(y, x, base, *rest)
                        if product is None:
                            rows_of(y).addmm_(rows_of(x), weight.T)
                    elif modes.is_plain(*_tensors(args)):
                        y = allocate(*args)
                        kept = run(y, *args)
                    else:
                        y, *kept = self.fwd.operator(*args)
                if ctx is not None:
                    tensors, ctx.others = saved(kept, *args)
                    ctx.again = again
                    ctx.save_for_backward(weight if again is None else None, *tensors)
                if hands_on:
                    ctx.set_materialize_grads(False)
                    return y, args[0].detach()
                return y

            @staticmethod
            @first_derivative_only
            def backward(ctx, dy, dx=None):
                return self._backward(ctx, dy, dx)

        # As profilers and autograd's graph show it.
        Function.__name__ = Function.__qualname__ = self._name
        return Function

    def _backward(self, ctx: Any, dy: Tensor | None, others_dx: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dy is None:
            # Of a layer whose result nobody used; others read the x that it handed on.
            return others_dx, *grads[1:]
        refuse_batches(self._name, dy)
        needs = [position is not None and ctx.needs_input_grad[position] for position in self._gradients]
        if any(needs):
            # Before autograd is left: checkpointing computes them again here, and records that.
            weight, *tensors = ctx.saved_tensors
            run, received = self.bwd.on(dy, *tensors), others_dx if needs[0] else None
            is_observed = run is self.bwd.operator
            # An operator that somebody observes writes to nothing that it is given.
            into = [] if received is None or is_observed else [writable(received)]
            arguments = (dy, *tensors, *ctx.others, needs)
            with modes.below_autograd():
                if ctx.again is not None and needs[0]:
                    weight = ctx.again()
                if weight is None or not needs[0]:
                    found = run(*arguments, *into)
                else:
                    beside = overlap.product_after if is_observed else self._product_beside
                    with beside(rows_of(dy), weight, rows_of(into[0]) if into else None) as product:
                        found = run(*arguments, *into, **({"product": product} if product else {}))
                    if product is None:
                        rows_of(found[0]).addmm_(rows_of(dy), weight)
                if received is not None and not into:
                    found[0].add_(received)
            wanted = (position for position, need in zip(self._gradients, needs, strict=True) if need)
            for position, grad in zip(wanted, found, strict=True):
                grads[position] = grad  # type: ignore[index]
        if self._has_base and ctx.needs_input_grad[1]:
            grads[1] = dy
        return tuple(grads)

    def _autograd(self, *args: Any) -> Tensor:
        if forward_ad._current_level >= 0 and any(
            isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
        ):
            raise NotImplementedError(
                f"{self._name} has no forward-mode derivative in Triton; use backend='reference'."
            )
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return self._function.apply(*args)
        with modes.below_autograd():
            return self.fwd.operator(*args)[0]

    def on(self, *tensors: Tensor | None) -> Callable:
        """Return what to call on these, as `Operator.on` does; where no gradients are recorded, forward alone."""
        found = super().on(*tensors)
        return self._forward if found is self.unobserved and not torch.is_grad_enabled() else found


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def rows_of(t: Tensor) -> Tensor:
    """(*batch, size) as a matrix, (M, size)."""
    # Twice as fast as reshape.
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def refuse_batches(name: str, dy: Tensor) -> None:
    """Raise NotImplementedError for the gradient that autograd makes of several with is_grads_batched."""
    if torch._C._functorch.is_batchedtensor(dy) or torch._C._functorch.is_legacy_batchedtensor(dy):
        raise NotImplementedError(
            f"{name} takes no batches of gradients (is_grads_batched) in Triton; use backend='reference'."
        )


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate the backward of an autograd.Function that has no derivative of its own; autocast is off inside.

    The function's `linear_in`, where it has one, counts its first inputs that it is linear in: their gradients do not
    depend on them.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            if any(isinstance(g, Tensor) and g.requires_grad for g in grads) or any(
                ctx.needs_input_grad[getattr(ctx._forward_cls, "linear_in", 0) :]
            ):
                raise RuntimeError(
                    "This backend cannot be differentiated twice, which create_graph=True asks for; "
                    "use backend='reference'."
                )
            with torch.no_grad():
                return checked(ctx, *grads)
        for g in grads:
            # Of a result that was not used there is none.
            if g is not None and modes.is_autocast(g):
                with torch.autocast(g.device.type, enabled=False):
                    return backward(ctx, *grads)
        return backward(ctx, *grads)

    return checked


_here = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _here
    return torch.cuda.device(device)


def as_rows(logits: Tensor) -> Tensor:
    """(*rows, num_vectors) as a matrix whose last dimension is contiguous."""
    rows = rows_of(logits)
    return rows if rows.stride(1) == 1 else rows.contiguous()
