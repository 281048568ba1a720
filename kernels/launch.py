"""How every kernel is launched: one place, so that launches can be counted, and compiled without being run."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import triton

Launcher = Callable[[Any, tuple[int, ...], dict[str, Any]], None]


def _run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    kernel[grid](**arguments)


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


if is_interpreted():
    from .interpreter import repair_bfloat16

    repair_bfloat16()
