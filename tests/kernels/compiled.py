"""Every launch of a step of training, as Triton compiles it: in a process where kernels are not interpreted.

Tensors are on the meta device, and so may have any size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]


class Launch(NamedTuple):
    """One launch, and the kernel in Triton's own code."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    ttir: str

    def integers(self) -> dict[str, int]:
        return {name: value for name, value in self.arguments.items() if type(value) is int}


def in_another_process(function: str, *arguments: Any) -> Any:
    """What `function`, "module:name", prints as JSON."""
    module, name = function.split(":")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = f"from {module} import {name}; {name}(*{list(arguments)!r})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def step(
    method: str,
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    h: int = 64,
    b: int = 256,
    k: int = 2,
    p: float = 0.0,
    strided: bool = False,
    base: bool = True,
) -> None:
    """Forward and backward of one adapted linear on meta tensors.

    Args:
        strided: x, the base's result and dy are stored column by column.
        base: there is a base's result to add to.
    """
    from vblora_triton import ops
    from vblora_triton.ops import dispatch

    # Nothing runs, and so nothing need be able to.
    dispatch._why_no_kernels = lambda device: None  # type: ignore[assignment]

    def activation(columns: int) -> torch.Tensor:
        shape = (columns, M) if strided else (M, columns)
        made = torch.empty(shape, dtype=dtype, device="meta")
        return (made.T if strided else made).requires_grad_()

    def parameter(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    x, given, dy = activation(K), activation(N) if base else None, activation(N).detach()
    options: dict[str, Any] = {"dropout_p": p, "training": True, "backend": "triton"}
    if method == "vblora":
        parameters = parameter(r, K // b, h), parameter(N // b, r, h), parameter(h, b)
        y = ops.vblora_linear(x, given, *parameters, k, **options)
    else:
        frozen = parameter(r, K).detach(), parameter(N, r).detach()
        y = ops.vera_linear(x, given, parameter(N), parameter(r), *frozen, **options)
    y.backward(dy)


def launches(method: str, **sizes: Any) -> list[Launch]:
    """Every launch of `step`, as it is for sm_90."""
    import triton.compiler

    from tools.aot import compiling
    from vblora_triton.kernels.launch import intercepted

    found: list[Launch] = []
    # This process is for nothing else.
    triton.compiler.compile = _to_ttir

    def look(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        found.append(Launch(kernel.fn.__name__, tuple(grid), arguments, kernel.warmup(grid=grid, **arguments).ttir))

    with compiling("sm_90"), intercepted(look):
        step(method, **sizes)
    assert found
    return found


def _to_ttir(source: Any, target: Any, options: dict[str, Any], **_: Any) -> SimpleNamespace:
    """The first step of Triton's own `compile`, of whose minutes the others take most."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    settled = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators, modules = backend.get_codegen_implementation(settled), backend.get_module_map()
    stages: dict[str, Any] = {}
    backend.add_stages(stages, settled, source.language)
    module = source.make_ir(target, settled, generators, modules, context)
    return SimpleNamespace(ttir=str(stages["ttir"](module, {})))
