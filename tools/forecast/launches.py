"""The launches of an adapted linear, compiled for a Hopper GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.aot import compiling
from tools.forecast.predict import Launch
from tools.kernels_report import vblora_passes, vblora_together_passes, vera_passes
from vblora_triton.kernels import launch

# Tokens up to which the activations of a linear stay in L2.
HOT = 256


def collect(
    method: str, K: int, N: int, M: int, *, r: int, h: int = 256, p: float = 0.0, together: int = 1
) -> dict[str, list[Launch]]:
    """Every launch of forward and backward of an adapted linear in bf16; on meta tensors, so that nothing runs.

    Args:
        method: "vblora" or "vera".
        h: vectors of VB-LoRA's bank, each of 256 elements.
        p: dropout.
        together: of VB-LoRA, how many such linears read one x and are computed as one node.
    """
    if together > 1:
        passes = vblora_together_passes(K, N, M, h, torch.bfloat16, count=together, r=r)
    elif method == "vblora":
        passes = vblora_passes(K, N, M, h, torch.bfloat16, r=r, p=p)
    else:
        passes = vera_passes(K, N, M, torch.bfloat16, r=r, p=p)
    given = list(passes.given)
    calls: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
    found: dict[str, list[Launch]] = {}
    with compiling("sm_90") as compiled:
        compile_only = launch._launcher

        def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
            compile_only(kernel, grid, arguments)
            calls.append((kernel, grid, arguments))

        def launches(side: str, streamed: list[Tensor], owned: list[Tensor]) -> None:
            found[side] = [
                Launch(
                    *call,
                    code,
                    _among(call[2], streamed if M > HOT else []),
                    _among(call[2], owned),
                )
                for call, code in zip(calls, compiled, strict=True)
            ]
            calls.clear()
            compiled.clear()

        with launch.intercepted(note):
            kept = passes.forward(None)
            # x and y; what forward keeps beside y was written just now.
            launches("forward", [given[0], *kept[:together]], [*given, *kept])
            grads = passes.backward(kept)
            # What forward kept has long left L2.
            launches("backward", [given[0], *kept, grads[0]], [*given, *kept, *grads])
    return found


def _among(arguments: dict[str, Any], tensors: list[Tensor]) -> frozenset[str]:
    """The arguments that are these tensors, or views of them."""
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return frozenset(
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.untyped_storage()._cdata in storages
    )
