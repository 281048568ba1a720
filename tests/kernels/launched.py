"""Launch small kernels for a GPU that is not there, by `launch` and by Triton; print as JSON what each handed over.

A process of its own: where tests run kernels may be interpreted.
"""

import json
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs

from tools.aot import launching
from vblora_triton.kernels.launch import launch

# What the compiled launchers got since the last look.
handed_over: list[tuple[Any, ...]] = []


@triton.jit
def _copy_kernel(X_ptr, Y_ptr, M, scale, FLAG: triton.language.constexpr, BLOCK: triton.language.constexpr):
    offs = triton.language.arange(0, BLOCK)
    y = triton.language.zeros((BLOCK,), dtype=triton.language.float32)
    if X_ptr is not None:
        y = triton.language.load(X_ptr + offs, mask=offs < M).to(triton.language.float32) * scale
    triton.language.store(Y_ptr + offs, y, mask=offs < M)


def look() -> list[Any]:
    """The grid, stream, function and arguments of each launch, tensors as addresses."""
    found = [
        [*call[:5], *(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in call[9:])]
        for call in handed_over
    ]
    handed_over.clear()
    return [repr(call) for call in found]


def case(x: Any, y: Any, M: int, scale: float = 0.5, FLAG: bool = True, grid: Any = (3,), **options: int) -> Any:
    return grid, {"X_ptr": x, "Y_ptr": y, "M": M, "scale": scale, "FLAG": FLAG, "BLOCK": 32, **options}


def cases() -> dict[str, Any]:
    fp32, bf16 = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    return {
        "plain": case(fp32, fp32, 7),
        "other addresses": case(torch.zeros(64), fp32, 7),
        "divisible by 16": case(fp32, fp32, 32),
        "one": case(fp32, fp32, 1),
        "other dtype": case(bf16, fp32, 7),
        "no x": case(None, fp32, 7),
        "x at 4 bytes": case(fp32[1:], fp32, 7),
        "y at 4 bytes": case(fp32, fp32[1:], 7),
        "other scale": case(fp32, fp32, 7, scale=2.0),
        "other constexpr": case(fp32, fp32, 7, FLAG=False),
        "two dimensions": case(fp32, fp32, 7, grid=(2, 5)),
        "8 warps": case(fp32, fp32, 7, num_warps=8),
        "4 stages": case(fp32, fp32, 7, num_stages=4),
        "shuffled": (lambda grid, given: (grid, dict(reversed(given.items()))))(*case(fp32, bf16, 7, scale=3.0)),
    }


def main() -> None:
    with launching("sm_90", lambda *call: handed_over.append(call)) as driver:
        found: dict[str, Any] = {"cases": {}}
        run = type(_copy_kernel).run
        asked: list[Any] = []

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(self)
            return run(self, *args, **kwargs)

        def direct(grid: Any, arguments: dict[str, Any]) -> tuple[list[Any], int]:
            """What a launch handed over, and how often it asked Triton."""
            asked.clear()
            launch(_copy_kernel, grid, **arguments)
            return look(), len(asked)

        with mock.patch.object(type(_copy_kernel), "run", counted):
            given = cases()
            for grid, arguments in given.values():
                launch(_copy_kernel, grid, **arguments)
            look()
            for name, (grid, arguments) in given.items():
                second = direct(grid, arguments)
                _copy_kernel[grid](**arguments)
                found["cases"][name] = {"launch": second, "triton": look()}
            plain = given["plain"]
            found["empty grid"] = direct((0, 3), plain[1])
            with mock.patch.object(driver, "get_current_stream", return_value=17):
                found["other stream"] = direct(*plain)
            with mock.patch.object(driver, "get_current_device", return_value="another"):
                found["other device"] = [direct(*plain) for _ in range(2)]
            found["first device"] = direct(*plain)
            seen: list[Any] = []

            def hook(*args: Any, **kwargs: Any) -> None:
                seen.append(kwargs)

            for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
                hooks.add(hook)
                found.setdefault("hooked", []).append(direct(*plain)[1])
                hooks.remove(hook)
            _copy_kernel.pre_run_hooks.append(hook)
            found["before the run"] = [direct(*plain)[1], seen[-1]["M"]]
            _copy_kernel.pre_run_hooks.clear()
            knobs.runtime.debug = True
            found["debug"] = direct(*plain)[1]
            knobs.runtime.debug = False
            found["after"] = direct(*plain)[1]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
