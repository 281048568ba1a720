"""Layers that read one x, as q, k and v do, or gate and up: what they share while a model's forward is under way.

A chain of gradients. Autograd would add up the dx of such layers, and reads two and writes a third to do so. Instead
each hands x on, as an alias that the next one reads in the place of x:

    x -> q -> alias -> k -> alias -> v          forward: the alias is x's own memory
    dx <- q <- dx <- k <- dx <- v               backward: each adds its own to what it receives, in place

Which layers these are nobody has to know before: whoever comes next with the very same x takes the newest alias. A
layer whose result is not used hands on what it receives. The gradients are those of x, to rounding. Hooks on tensors
and modules see what they always do; one on the grad_fn of y sees the sum that it takes part in, in memory that the next
layer adds to.

Values: VeRA's layers read x by one A, and project it once.

And whole calls. Which layers read one x a model's memory, `Readers`, knows from its last forward pass. The first of
them may then compute all of them, and the others find their results (`triton_together`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from vblora_triton.ops import modes
from vblora_triton.ops.modes import TensorState, is_plain

# The last argument of an op that is to hand x on: its result is y and an alias.
HANDS_ON = object()


# What an op is called with beside x: tensors that stay the same from step to step, and numbers.
Arguments = tuple[Any, ...]


def _key(arguments: Arguments) -> tuple[Any, ...]:
    """What tells calls apart: the very same tensors, and equal numbers."""
    return tuple(id(a) if isinstance(a, Tensor) else a for a in arguments)


def _states(arguments: Arguments) -> list[tuple[int, int, bool]]:
    return [(a._version, a.data_ptr(), a.requires_grad) for a in arguments if isinstance(a, Tensor)]


class Readers:
    """A model's memory of the calls that read one x in its last forward pass.

    following: the first call -> itself, for its tensors must live as long as their ids are known, and those that came
        after it; or itself alone, where these once came otherwise than it had been foreseen.
    """

    def __init__(self) -> None:
        self.following: dict[Any, list[Arguments]] = {}

    def __reduce__(self) -> Any:
        # A copy is of another model.
        return Readers, ()


class _Shared:
    """The last x that a layer read, its newest alias, and what was made of it, by what it was made with."""

    def __init__(self, readers: Readers | None = None) -> None:
        self.thread = get_ident()
        self.x: TensorState | None = None
        self.stream = 0
        self.alias: Tensor | None = None
        self.values: dict[Any, Any] = {}
        # Calls that could have been computed together and were not, and what was computed ahead, of how tensors were.
        self.calls: list[Arguments] = []
        self.ahead: dict[Any, tuple[list[tuple[int, int, bool]], Tensor]] = {}
        self.leader: Any = None
        self.readers = readers
        self.following: dict[Any, list[Arguments]] = {}

    def meets(self, x: Tensor) -> None:
        """Forget what is of another tensor, of other values, or of another stream, which does not wait for this one."""
        stream = modes.stream_of(x)
        if self.x is None or self.stream != stream or not self.x.holds(x):
            self.leaves()
            self.x, self.stream, self.alias, self.values = TensorState.of(x), stream, None, {}

    def leaves(self) -> None:
        """Note which calls read x, now that none will."""
        if self.ahead:
            self.following[self.leader] = self.following[self.leader][:1]
        elif len(self.calls) > 1:
            self.following[_key(self.calls[0])] = self.calls
        self.calls, self.ahead = [], {}


# Of the forward pass of a model that is under way; None outside of one.
_shared: ContextVar[_Shared | None] = ContextVar("shared_input", default=None)


def _of_this_thread() -> _Shared | None:
    shared = _shared.get()
    # A thread may have been started in a copy of the context, and run at the same time.
    return shared if shared is not None and shared.thread == get_ident() else None


class shared_inputs:  # noqa: N801
    """Let layers that read the very same tensor, inside the context, share; only what `readers` note outlives it.

    Args:
        readers: of the model whose forward pass it is.
    """

    def __init__(self, readers: Readers | None = None) -> None:
        self._readers = readers

    def __enter__(self) -> None:
        if self._readers is not None and not torch.is_grad_enabled():
            # Of a model that is not trained any more no tensor is kept, nor of one that has got other parameters.
            self._readers.following = {}
        self._pass = _Shared(self._readers)
        self._token = _shared.set(self._pass)

    def __exit__(self, error: object, *_: object) -> None:
        _shared.reset(self._token)
        if error is None:
            self._pass.leaves()
            if self._readers is not None and self._pass.following:
                # Of calls that did not come back nothing is kept.
                self._readers.following = self._pass.following


def newest_alias(x: Tensor) -> Tensor | None:
    """Return what to read in the place of x, whose gradient is asked for; None where nothing is handed on.

    Call `hand_on` after it. Outside of a model's forward there is nothing: so none is there when checkpointing
    repeats a layer. Nor of a leaf: a backward pass for each of its readers alone keeps nothing of the others.
    """
    shared = _of_this_thread()
    if shared is None or x.grad_fn is None:
        return None
    shared.meets(x)
    return x if shared.alias is None else shared.alias


def hand_on(alias: Tensor) -> None:
    """Keep the alias that a layer made of the x of the last `newest_alias`."""
    shared = _of_this_thread()
    if shared is not None:
        shared.alias = alias


def take_result(x: Tensor, arguments: Arguments) -> Tensor | None:
    """Return what was computed ahead for this call of x, if that was and nothing has changed since."""
    shared = _of_this_thread()
    if shared is None or not shared.ahead:
        return None
    shared.meets(x)
    key = _key(arguments)
    if key not in shared.ahead or shared.ahead[key][0] != _states(arguments):
        # If it does not come any more, `leaves` finds it.
        return None
    return shared.ahead.pop(key)[1]


def followers_of(x: Tensor, arguments: Arguments) -> list[Arguments]:
    """Return the calls of x that will come after this one, so far as is known; remember this one for the next pass."""
    shared = _of_this_thread()
    if shared is None or shared.readers is None:
        return []
    shared.meets(x)
    key = _key(arguments)
    known = shared.readers.following.get(key)
    if known is not None:
        shared.following[key] = known
    elif key not in map(_key, shared.calls):
        shared.calls.append(arguments)
    return [] if known is None or shared.ahead else known[1:]


def keep_results(leader: Arguments, followers: list[Arguments], results: Sequence[Tensor]) -> None:
    """Keep what was computed ahead of the x of the last `followers_of`."""
    shared = _of_this_thread()
    if shared is not None:
        shared.leader = _key(leader)
        shared.ahead = {_key(call): (_states(call), y) for call, y in zip(followers, results, strict=True)}


def writable(dx: Tensor) -> Tensor:
    """Return the dx that a layer received, to be added to: the one that handed it back made it for nobody else."""
    if dx.is_contiguous() and is_plain(dx):
        return dx
    # Somebody's hook replaced it.
    return dx.clone(memory_format=torch.contiguous_format)


def may_share_values(x: Tensor, base: Any) -> bool:
    """Say whether what is made of x may be kept for other layers.

    Args:
        base: the base layer's result, if it is a tensor.
    """
    # A compiler finds equal products itself, and what a mode looks at may be replayed in another order.
    return (
        is_plain(x, base if isinstance(base, Tensor) else None)
        and _of_this_thread() is not None
        and not x.is_inference()
    )


def find_value(x: Tensor, made_with: Tensor, dtype: torch.dtype) -> tuple[bool, Any]:
    """Return whether something was made of this very x with that tensor for results in that dtype; and what."""
    shared = _of_this_thread()
    if shared is None:
        return False, None
    shared.meets(x)
    found = shared.values.get((id(made_with), dtype))
    return found is not None, None if found is None else found[1]


def keep_value(made_with: Tensor, dtype: torch.dtype, value: Any) -> None:
    """Keep what was made of the x of the last `find_value`, until another x comes or the context ends."""
    shared = _of_this_thread()
    if shared is not None:
        # With the tensor, so that its id is not another's.
        shared.values[id(made_with), dtype] = made_with, value
