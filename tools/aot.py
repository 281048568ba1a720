"""Compile kernels for a GPU that is not there, and read off the result what it will use of the chip.

Inside `compiling(target)` every launch compiles its kernel for `target` instead of running it, from the very arguments
that it would run with, which may be tensors on the meta device.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from vblora_triton.kernels.launch import intercepted, is_interpreted

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory of one program, in bytes: CUDA C++ Programming Guide, compute capability 8.0, 9.0, 10.0; CDNA 3 ISA.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one chip.

    registers: per thread. shared: bytes per program. spills: what went to local or scratch memory for want of
    registers, in bytes per thread on NVIDIA, in registers on AMD. ttir: Triton's own code. ptx: NVIDIA's, or nothing.
    binary: the cubin, or AMD's assembly.
    """

    kernel: str
    target: str
    arguments: dict[str, Any]
    registers: int
    shared: int
    spills: int
    ttir: str
    ptx: str
    binary: bytes


class _AbsentGPU:
    """What triton asks of the active driver before it has to load anything; and to load and launch, for `launching`."""

    def __init__(self, target: GPUTarget, launcher: Callable[..., None] | None = None) -> None:
        self._target, self._launcher, self._loaded = target, launcher, 0
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # The key of triton's table of compiled kernels: one table for each chip.
        return f"absent {self._target.arch}"

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[next(name for name, chip in TARGETS.items() if chip == self._target)]}

    def load_binary(self, name: str, binary: Any, shared: int, device: Any) -> tuple[Any, ...]:
        """The module, the function, here a number of its own, registers, spills and the most threads of a program."""
        self._loaded += 1
        return name, self._loaded, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self._launcher


# Everything compiled so far, by triton's own hash of source, target and compile-time arguments.
_known: dict[str, Compiled] = {}


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Compile every launch inside the context for `target`, one of TARGETS; yield the list of the compiled kernels.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if is_interpreted():
        raise RuntimeError("Kernels are interpreted in this process: compile them in one without TRITON_INTERPRET.")
    compiled: list[Compiled] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        result = kernel.warmup(grid=grid, **arguments)
        if result.hash not in _known:
            _known[result.hash] = _read(result, target, arguments)
        compiled.append(_known[result.hash])

    driver = triton.runtime.driver
    driver.set_active(_AbsentGPU(TARGETS[target]))
    try:
        with intercepted(compile_only):
            yield compiled
    finally:
        # As before the first use: the next one looks for a real GPU.
        driver._active = None


@contextmanager
def launching(target: str, launcher: Callable[..., None]) -> Iterator[Any]:
    """Compile for `target` what is launched inside the context, on any tensors, and launch it by `launcher`.

    Yield the driver. The launcher gets what the one of a chip gets: the grid's three sizes, the stream, the function,
    its metadata, that of the launch, the two hooks, and the values of all parameters of the kernel.
    """
    driver = triton.runtime.driver
    driver.set_active(_AbsentGPU(TARGETS[target], launcher))
    try:
        yield driver.active
    finally:
        driver._active = None


def _read(kernel: Any, target: str, arguments: dict[str, Any]) -> Compiled:
    if "cubin" in kernel.asm:
        binary = kernel.asm["cubin"]
        usage = cuda_tool("cuobjdump", binary, "--dump-resource-usage")
        registers, spills = _number("REG:", usage), _number("STACK:", usage) + _number("LOCAL:", usage)
    else:
        usage = kernel.asm["amdgcn"]
        binary = usage.encode()
        registers, spills = _number(r"\.vgpr_count:\s+", usage), _number(r"\.vgpr_spill_count:\s+", usage)
    code = {"ttir": kernel.asm["ttir"], "ptx": kernel.asm.get("ptx", ""), "binary": binary}
    return Compiled(kernel.metadata.name, target, arguments, registers, kernel.metadata.shared, spills, **code)


def _number(label: str, text: str) -> int:
    match = re.search(label + r"(\d+)", text)
    if match is None:
        raise RuntimeError(f"The compiler's report has no {label!r}:\n{text[:2000]}")
    return int(match[1])


def cuda_tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the tools in Triton's wheel prints about a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tools / name, *options, file.name], capture_output=True, text=True, check=True).stdout
