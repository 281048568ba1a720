"""How every kernel is launched: one place, so that launches can be counted, and compiled without being run."""

from collections.abc import Callable
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
import triton
from triton import knobs

Launcher = Callable[[Any, tuple[int, ...], dict[str, Any]], None]

# What a launch may say beside the kernel's parameters.
OPTIONS = ("num_warps", "num_stages")
# What Triton found or compiled for a launch, by all that decides it: see `_run`. When it has MOST entries, as batches
# of ever new lengths make some, it is emptied.
_compiled: dict[tuple[Any, ...], Any] = {}
MOST = 8192
# A kernel's function -> what takes the values of its parameters, in their order, from arguments; how many are pointers.
_parameters: dict[Any, tuple[Callable[[dict[str, Any]], tuple[Any, ...]], int]] = {}


def _run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Launch by Triton, and at once what Triton launched before for the very same numbers.

    Triton looks at each of some thirty arguments for what it may specialise the code by, which takes 14 to 37 us. That
    hangs on the numbers themselves and, of a pointer, on its dtype and on whether 16 divides it (on AMD on more).
    """
    if not _is_direct or _is_watched(kernel):
        kernel[grid](**arguments)
        return
    take, pointers = _parameters.get(kernel.fn) or _note(kernel)
    values = take(arguments)
    tensors, numbers = values[:pointers], values[pointers:]
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    dtypes, alignments = [t if t is None else t.dtype for t in tensors], [a and a % 16 for a in addresses]
    key = (kernel.fn, device, numbers, *map(arguments.get, OPTIONS), *dtypes, *alignments)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](**arguments)
        others = len(arguments) - len(values) - sum(option in arguments for option in OPTIONS)
        if isinstance(compiled, triton.compiler.CompiledKernel) and not others:
            if len(_compiled) >= MOST:
                _compiled.clear()
            _compiled[key] = compiled
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    # As Triton does it; without hooks, of which there are none.
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *numbers
    )  # fmt: skip


def _note(kernel: Any) -> tuple[Callable[[dict[str, Any]], tuple[Any, ...]], int]:
    names = kernel.arg_names
    # They come first in every kernel.
    pointers = sum(name.endswith("_ptr") for name in names)
    found = _parameters[kernel.fn] = itemgetter(*names), pointers
    return found


def _is_watched(kernel: Any) -> bool:
    """Say whether somebody wants to see launches, as profilers do, or to have kernels compiled in another way."""
    runtime = knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or kernel.pre_run_hooks
    )


_launcher: Launcher = _run


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch `kernel` over `grid`; an empty grid launches nothing."""
    if 0 not in grid:
        _launcher(kernel, grid, arguments)


@contextmanager
def intercepted(launcher: Launcher):
    """Hand every launch inside the context to `launcher(kernel, grid, arguments)` instead of running it."""
    global _launcher
    previous, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = previous


@contextmanager
def counted():
    """Run every launch inside the context, and yield the list of the names of the kernels launched so far."""
    names: list[str] = []
    inner = _launcher

    def count(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        names.append(kernel.fn.__name__)
        inner(kernel, grid, arguments)

    with intercepted(count):
        yield names


def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET was set before triton was imported)."""
    return not isinstance(_probe, triton.runtime.JITFunction)


@triton.jit
def _probe():
    pass


# Whether what Triton compiled may be launched without asking it again.
_is_direct = not is_interpreted() and torch.version.hip is None

if is_interpreted():
    from .interpreter import repair_bfloat16

    repair_bfloat16()
