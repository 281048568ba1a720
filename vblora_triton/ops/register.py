"""How an operator is defined: schema, implementation, fake and, where it is differentiable, autograd formula."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vblora_triton.ops.support import no_autocast

_library = torch.library.Library("vblora_triton", "DEF")


def define(name: str, arguments: str, returns: str, implementation: Callable, fake: Callable) -> None:
    """Define the operator `vblora_triton::name(arguments) -> returns`; autograd does not look inside it."""
    _library.define(f"{name}({arguments}) -> {returns}")
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"vblora_triton::{name}", fake, lib=_library)


def define_differentiable(name: str, arguments: str, function: Any, fwd: str, fwd_fake: Callable) -> None:
    """Define the operator `name`, which returns the first, or the only, result of the operator `fwd`.

    Its gradient is that of `function`, a torch.autograd.Function that calls operators opaque to the compiler. As the
    implementation for the Autograd key this is the cheapest form that torch.compile and opcheck accept.
    """

    def first(results: Any) -> Tensor:
        return results if isinstance(results, Tensor) else results[0]

    def forward(*args: Any) -> Tensor:
        return first(getattr(torch.ops.vblora_triton, fwd)(*args))

    def autograd(*args: Any) -> Tensor:
        if forward_ad._current_level >= 0 and any(
            isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
        ):
            raise NotImplementedError(f"{name} has no forward-mode derivative in Triton; use backend='reference'.")
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        with below_autograd():
            return forward(*args)

    define(name, arguments, "Tensor", forward, lambda *args: first(fwd_fake(*args)))
    _library.impl(name, autograd, "Autograd")


def below_autograd() -> Any:
    """Inside the context operators run without a look at autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate the backward of an autograd.Function that has no derivative of its own; autocast is off inside.

    The function's `linear_in`, where it has one, counts its first inputs that it is linear in: their gradients do not
    depend on them.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and (
            any(isinstance(g, Tensor) and g.requires_grad for g in grads)
            or any(ctx.needs_input_grad[getattr(ctx._forward_cls, "linear_in", 0) :])
        ):
            raise RuntimeError(
                "This backend cannot be differentiated twice, which create_graph=True asks for; "
                "use backend='reference'."
            )
        with torch.no_grad(), no_autocast(grads[0].device.type):
            return backward(ctx, *grads)

    return checked


def scatter(needs: list[bool], grads: list[Tensor]) -> list[Tensor | None]:
    """Put the gradients that were needed in the places of all."""
    given = iter(grads)
    return [next(given) if need else None for need in needs]
