"""Which backend computes an op: one table of them, and one choice for each call."""

# Not "backends.py": torch.compile leaves every file alone whose path has "triton/backends" in it.

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora_triton.ops import cpu, modes, reference, triton_vblora, triton_vera
from vblora_triton.ops.reference import FrozenLinear, frozen_product
from vblora_triton.ops.register import Operator

# Limits of the kernels; beyond them PyTorch computes.
MAX_RANK = 64
MAX_TOPK = 1024
MAX_VECTORS = 65536
MAX_VECTOR_LENGTH = 2048
MAX_VERA_RANK = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (name, size, limit) of each size of a call that has a limit.
Sizes = tuple[tuple[str, int, int], ...]


def _with_base(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, base: Tensor | FrozenLinear | None, *rest: Any) -> Tensor:
        return op(x, frozen_product(x, base) if isinstance(base, FrozenLinear) else base, *rest)

    return run


# backend -> op -> what computes it, given the op's tensors and the probability of dropout. "triton" takes a seed after
# that, and for VeRA's linear the projected input before it; the others draw their own dropout, and "cpu" has none.
BACKENDS: dict[str, dict[str, Callable | Operator]] = {
    "triton": {
        "compose": triton_vblora.compose,
        "select": triton_vblora.select,
        "vblora_linear": triton_vblora.linear,
        "vblora_linear_selected": triton_vblora.linear_selected,
        "vera_linear": triton_vera.linear,
    },
    "cpu": {
        "compose": reference.compose,
        "select": reference.selection,
        "vblora_linear": cpu.vblora_linear,
        "vblora_linear_selected": cpu.vblora_linear_selected,
        "vera_linear": cpu.vera_linear,
    },
    "reference": {
        "compose": reference.compose,
        "select": reference.selection,
        "vblora_linear": _with_base(reference.vblora_linear),
        "vblora_linear_selected": _with_base(reference.vblora_linear_selected),
        "vera_linear": _with_base(reference.vera_linear),
    },
}

# What `backend="auto"` means at present: `use_backend` changes it for the whole process.
_default_backend = "auto"
# Where the names of the backends that run go; None where nobody wants to know.
_ran: set[str] | None = None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Let every op that is called with `backend="auto"` inside the context use `backend`.

    It holds for the whole process: do not let contexts of several threads overlap.

    Args:
        backend: "auto" (Triton where the tensors are on a GPU that it supports, PyTorch elsewhere), "triton", "cpu"
            (PyTorch with gradients written out), or "reference" (PyTorch as plain as can be, differentiable any number
            of times).
    Raises:
        ValueError: the name is none of these.
    """
    global _default_backend
    check_backend(backend)
    previous, _default_backend = _default_backend, backend
    try:
        yield
    finally:
        _default_backend = previous


@contextmanager
def backends_that_run() -> Iterator[set[str]]:
    """Yield a set to which the name of each backend comes that computes an op inside the context.

    It holds for the whole process. What torch.compile has compiled does not ask for a backend any more, nor is it seen.
    """
    global _ran
    previous, _ran = _ran, set()
    try:
        yield _ran
    finally:
        _ran = previous


def resolve(backend: str) -> str:
    """Return what a backend's name means at present: "auto" may have been set to another one by `use_backend`.

    Raises:
        ValueError: the name is none of a backend.
    """
    check_backend(backend)
    return _default_backend if backend == "auto" else backend


def check_backend(backend: str) -> None:
    """Raise ValueError unless this is the name of a backend, or "auto"."""
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"`backend` is {backend!r}; the backends are {names}.")


def owns_base(x: Tensor, base: Tensor | FrozenLinear | None, *others: Tensor) -> bool:
    """Say whether the base goes to a backend as a FrozenLinear: the op may compute its product.

    It may where the result has x's dtype, the layer has no gradient, and nobody observes.

    Args:
        others: the op's other tensors.
    """
    if not isinstance(base, FrozenLinear):
        return False
    weight, bias = base
    return (
        x.dtype == weight.dtype == (x.dtype if bias is None else bias.dtype)
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and modes.is_plain(x, weight, bias, *others)
        and not modes.is_autocast(x)
    )


class Choice(NamedTuple):
    """What computes a call.

    run: takes the op's tensors, and then `dropout(x)`.
    dropout_p: the probability in force.
    calls_base: the base is a FrozenLinear, and its product is to be computed before.
    may_hand_on: `run` takes HANDS_ON after that, and x has a gradient that it may be of use for (`shared_input`).
    """

    backend: str
    run: Callable[..., Any]
    dropout_p: float = 0.0
    calls_base: bool = False
    may_hand_on: bool = False

    def dropout(self, x: Tensor) -> tuple[Any, ...]:
        """The probability and, for Triton, the seed."""
        if self.backend != "triton":
            return (self.dropout_p,)
        # A tensor, and from torch's generator: torch.manual_seed, checkpointing and graph capture reproduce it.
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if self.dropout_p > 0 else None
        return self.dropout_p, seed


# Of arguments that are told apart by their values.
_PLAIN = frozenset((int, float, str, bool, type(None)))
# As many calls that differ are remembered of each op; then it starts anew.
MOST_REMEMBERED = 4096


def remembered(settle: Callable[..., Choice]) -> Callable[..., Choice]:
    """Decorate what checks the arguments of an op and chooses what computes it: once for all arguments that are alike.

    settle(*arguments) may ask dtype, device, shape and need of a gradient of a tensor, whether gradients are recorded,
    whether autocast is on for the first one's device, and what `use_backend` said; and may raise. Where somebody
    observes nothing is remembered.
    """
    known: dict[Any, Choice] = {}

    @wraps(settle)
    def settled(*arguments: Any) -> Choice:
        key = _likeness(arguments)
        found = None if key is None else known.get(key)
        if found is None:
            found = settle(*arguments)
            if key is not None:
                if len(known) >= MOST_REMEMBERED:
                    known.clear()
                known[key] = found
        if _ran is not None and not torch.compiler.is_compiling():
            _ran.add(found.backend)
        return found

    return settled


def _likeness(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What decides a call, of ordinary tensors and where nobody observes; else None."""
    x, base = arguments[:2]
    if modes.is_observed() or not isinstance(x, Tensor):
        return None
    found: list[Any] = [_default_backend, torch.is_grad_enabled(), modes.is_autocast(x)]
    for argument in (*base, *arguments) if isinstance(base, FrozenLinear) else arguments:
        kind = type(argument)
        if kind is nn.Parameter or kind is Tensor:
            # A device takes longer to hash and to compare than all else.
            found += (argument.dtype, argument.is_cpu or argument.device, argument.shape, argument.requires_grad)
        elif kind in _PLAIN:
            # True is 1, and is not taken for it.
            found += (kind, argument)
        elif issubclass(kind, FrozenLinear):
            found.append(kind)
        else:
            return None
    return tuple(found)


def choose(op: str, backend: str, sizes: Sizes, dropout_p: float, *tensors: Tensor | FrozenLinear | None) -> Choice:
    """Choose the backend of a call; told which one, raise where it cannot run.

    Args:
        op: as in BACKENDS.
        sizes: those that the kernels set a limit to.
        dropout_p: the probability in force.
        tensors: those that it would run on, all on one device; the first one is not None.
    Raises:
        ValueError, TypeError: the backend does not exist, or cannot run here.
    """
    given: list[Tensor] = []
    for tensor in tensors:
        given += [t for t in (tensor if isinstance(tensor, FrozenLinear) else (tensor,)) if t is not None]
    backend = resolve(backend)
    if backend == "auto":
        # Neither the kernels nor the CPU's code know transforms. Kernels that are interpreted are for tests.
        first = "reference" if modes.is_transformed() else "triton" if given[0].is_cuda else "cpu"
        backend = "reference" if _why_not(first, op, sizes, dropout_p, given) else first
    else:
        problem = _why_not(backend, op, sizes, dropout_p, given)
        if problem is not None:
            error, reason = problem
            raise error(
                f"backend {backend!r} cannot run here: {reason}. Use backend='reference', or 'auto' to have it chosen."
            )
    found = BACKENDS[backend][op]
    return Choice(backend, found.on(*given) if isinstance(found, Operator) else found, dropout_p)


def choose_linear(
    op: str, backend: str, sizes: Sizes, dropout_p: float, x: Tensor, base: Any, *others: Tensor
) -> Choice:
    """`choose`, and whether the op may compute the base's product, and hand x on; what runs is not under autocast."""
    owns = owns_base(x, base, *others)
    calls = isinstance(base, FrozenLinear) and not owns
    chosen = choose(op, backend, sizes, dropout_p, x, *((base,) if owns or not calls else base), *others)
    hands_on = chosen.backend == "cpu" or chosen.run is getattr(BACKENDS[chosen.backend][op], "unobserved", None)
    has_gradient = torch.is_grad_enabled() and x.requires_grad and op != "vblora_linear_selected"
    run = _without_autocast(chosen.run, x.device.type) if modes.is_autocast(x) else chosen.run
    return chosen._replace(run=run, calls_base=calls, may_hand_on=hands_on and has_gradient)


def _without_autocast(run: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Let products keep their own dtypes: autocast is for the base model."""

    def running(*arguments: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return run(*arguments)

    return running


def _why_not(
    backend: str, op: str, sizes: Sizes, dropout_p: float, tensors: list[Tensor]
) -> tuple[type[Exception], str] | None:
    """Why a backend cannot compute a call: the error to raise and the reason, or None where it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        reason = cpu.why_not(op, dropout_p, tensors)
        return None if reason is None else (ValueError, reason)
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return TypeError, f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
    for name, size, limit in sizes:
        if size > limit:
            return ValueError, f"`{name}` is {size}, and its limit is {limit}"
    # Nothing that asks a device can be traced; a graph is compiled for one that runs it.
    reason = None if torch.compiler.is_compiling() else _why_no_kernels(tensors[0].device)
    return None if reason is None else (ValueError, reason)


@lru_cache
def _why_no_kernels(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            # The tensors are fakes.
            return "there is no GPU"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None
    if device.type == "cpu":
        from vblora_triton.kernels.launch import is_interpreted

        if is_interpreted():
            return None
        return "the tensors are on the CPU, and TRITON_INTERPRET=1 was not set before triton was imported"
    return f"the tensors are on {device.type}"


def vblora_sizes(r: int, topk: int, num_vectors: int, vector_length: int) -> Sizes:
    """The sizes of a VB-LoRA op."""
    return (
        ("r", r, MAX_RANK),
        ("topk", topk, MAX_TOPK),
        ("num_vectors", num_vectors, MAX_VECTORS),
        ("vector_length", vector_length, MAX_VECTOR_LENGTH),
    )


def vera_sizes(r: int) -> Sizes:
    """The sizes of a VeRA op."""
    return (("r", r, MAX_VERA_RANK),)
