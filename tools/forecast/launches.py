"""The launches of an adapted linear: ours, compiled for a Hopper GPU, and those of PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tools.aot import compiling
from tools.forecast.predict import Launch, Operation
from tools.kernels_report import vblora_passes, vblora_together_passes, vera_passes
from vblora_triton.kernels import launch
from vblora_triton.kernels.tuning import FIRST_ROWS
from vblora_triton.ops import triton_together

F32 = torch.float32
# Tokens up to which the activations of a linear stay in L2.
HOT = 256


# Of PyTorch's operators those that launch nothing: views, and new memory.
SILENT = ("empty", "view", "slice", "select", "permute", "transpose", "detach", "expand", "alias", "aten.t.")


class _Operations(TorchDispatchMode):
    """Note what PyTorch launches."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if not any(silent in name for silent in SILENT):
            given = [t for t in args if isinstance(t, Tensor)]
            is_product = ".mm." in name or ".addmm." in name
            # addmm is given what it adds before the factors; times beta 0, it is not read.
            factors = given[-2:] if is_product else []
            read = factors if is_product and not (kwargs or {}).get("beta", 0) else given
            self._calls.append(
                Operation(
                    name.removeprefix("aten.").rpartition(".")[0],
                    sum(t.numel() * t.element_size() for t in (*read, result)),
                    2 * factors[0].shape[0] * factors[0].shape[1] * factors[1].shape[1] if factors else 0,
                )
            )
        return result


def collect(
    method: str, K: int, N: int, M: int, *, r: int, h: int = 256, p: float = 0.0, together: int = 1
) -> dict[str, list[Launch | Operation]]:
    """Every launch of an adapted linear in bf16; on meta tensors, so that nothing runs.

    Args:
        method: "vblora" or "vera".
        h: vectors of VB-LoRA's bank, each of 256 elements.
        p: dropout.
        together: of VB-LoRA, how many such linears read one x and are computed as one node.
    Returns:
        Those of "project", which VeRA's forward begins with, once for all linears that read the same x; of "forward"
        beside them; and of "backward".
    """
    if together > 1:
        passes = vblora_together_passes(K, N, M, h, torch.bfloat16, count=together, r=r)
    elif method == "vblora":
        passes = vblora_passes(K, N, M, h, torch.bfloat16, r=r, p=p)
    else:
        passes = vera_passes(K, N, M, torch.bfloat16, r=r, p=p)
    given = list(passes.given)
    calls: list[Any] = []
    found: dict[str, list[Launch | Operation]] = {}
    with launch.intercepted(lambda *_: None):
        # What is made at the first use alone.
        passes.project()
    with compiling("sm_90") as compiled:
        compile_only = launch._launcher

        def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
            compile_only(kernel, grid, arguments)
            calls.append((kernel, grid, arguments))

        def launches(side: str, streamed: list[Tensor], owned: list[Tensor]) -> None:
            code, streamed = iter(compiled), streamed if M > HOT else []
            found[side] = [
                call
                if isinstance(call, Operation)
                else Launch(*call, next(code), _among(call[2], streamed), _among(call[2], owned), beside.get(i, 0))
                for i, call in enumerate(calls)
            ]
            for calls_of_side in (calls, compiled, beside):
                calls_of_side.clear()

        # The number of a launch -> that of the product beside which it runs, from 1 on.
        beside: dict[int, int] = {}

        @contextmanager
        def beside_it(
            left: Tensor, right: Tensor, added: Tensor | None = None
        ) -> Iterator[Callable[[], Tensor] | None]:
            first = len(calls)

            def product() -> Tensor:
                beside.update(dict.fromkeys(range(first, len(calls)), 1 + max(beside.values(), default=0)))
                return left.new_empty(M, right.shape[1], dtype=F32) if added is None else added

            yield product if method == "vblora" and M <= FIRST_ROWS else None

        own = patch.object(triton_together, "product_beside", beside_it)
        with launch.intercepted(note), _Operations(calls) if method == "vera" else nullcontext(), own:
            passes.project()
            launches("project", [given[0]], given)
            weight = given[0].new_empty(N, K)
            with beside_it(given[0], weight.T) as product:
                kept = passes.forward(product and (product, None))
            # x and y; what forward keeps beside y was written just now.
            launches("forward", [given[0], *kept[:together]], [*given, *kept])
            found["forward"] = found["forward"][len(found["project"]) :]
            with beside_it(kept[0], weight) as product:
                grads = passes.backward(kept) if product is None else passes.backward(kept, None, product)
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
