"""Host time of an adapted linear by this package and by PEFT: `make host`.

Our kernels are compiled for a Hopper GPU that is not there; the driver's launch alone is replaced by nothing. What
remains of ours is Python, torch's dispatcher and autograd: what a step cannot go below unless it is captured in a CUDA
graph. PEFT's layers are of torch's own operators, which run here on tensors so small that they have next to nothing to
compute. Left out of both is what a launch costs in the driver. All take turns, and each time is the least median of a
turn, so that what else the machine does counts little; compare within one file all the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import vblora_triton
from bench.environment import environment
from tools.aot import launching
from vblora_triton import ops
from vblora_triton.kernels import launch

# Of the linear and its adapter, which our times do not depend on; more tokens than selection inside the products takes.
SIZE, M, VECTOR, VECTORS = 64, 32, 16, 16
RANKS = {"vblora": 4, "vera": 8}
PASSES = ("forward", "forward and backward")
TURNS = 20


def median_us(call: Callable[[], object], seconds: float) -> float:
    """Microseconds of a call: the median over as many as fit."""
    times, end, clock = [], time.perf_counter() + seconds, time.perf_counter_ns
    while time.perf_counter() < end:
        start = clock()
        call()
        times.append(clock() - start)
    return sorted(times)[len(times) // 2] / 1e3


def adapted(library: Any, method: str) -> nn.Module:
    """One bf16 linear adapted by this package or by PEFT, whose names are the same."""
    r = RANKS[method]
    if method == "vblora":
        config = library.VBLoRAConfig(
            r=r, num_vectors=VECTORS, vector_length=VECTOR, topk=2, target_modules=["linear"]
        )  # fmt: skip
    else:
        config = library.VeraConfig(r=r, target_modules=["linear"])
    base = nn.Sequential()
    base.add_module("linear", plain())
    model = library.get_peft_model(base, config)
    return next(module for name, module in model.named_modules() if name.endswith("linear"))


def plain() -> nn.Linear:
    """The frozen linear alone."""
    return nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16).requires_grad_(False)


def op(method: str, base: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """The op, given the base's result, and what it trains."""
    if method == "vblora":
        shapes = ((RANKS[method], SIZE // VECTOR, VECTORS), (SIZE // VECTOR, RANKS[method], VECTORS), (VECTORS, VECTOR))
        logits_A, logits_B, bank = trained = [torch.randn(shape, requires_grad=True) for shape in shapes]
        return lambda x: ops.vblora_linear(x, base, logits_A, logits_B, bank, 2, backend="triton"), trained
    r = RANKS[method]
    lambda_b, lambda_d = trained = [torch.randn(size, requires_grad=True) for size in (SIZE, r)]
    A, B = torch.randn(r, SIZE), torch.randn(SIZE, r)
    return lambda x: ops.vera_linear(x, base, lambda_b, lambda_d, A, B, backend="triton"), trained


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """µs of either pass, by who makes it; the ops take CPU tensors, as if kernels were interpreted."""
    import peft

    torch.set_num_threads(1)
    x = torch.randn(M, SIZE, dtype=torch.bfloat16, requires_grad=True)
    calls: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {"base alone": (plain(), [])}
    for method in RANKS:
        calls[f"{method}: op"] = op(method, torch.randn(M, SIZE, dtype=torch.bfloat16))
        for name, library in (("layer", vblora_triton), ("PEFT's layer", peft)):
            layer = adapted(library, method).train()
            if library is vblora_triton:
                layer.backend = "triton"
            calls[f"{method}: {name}"] = layer, [p for p in layer.parameters() if p.requires_grad]
    pairs: dict[str, dict[str, Callable[[], object]]] = {}
    with launching("sm_90", lambda *_: None), mock.patch.object(launch, "is_interpreted", return_value=True):
        for name, (call, trained) in calls.items():
            dy = torch.ones_like(call(x))

            def both(call: Any = call, trained: Any = trained, dy: Tensor = dy) -> object:
                return torch.autograd.grad(call(x), [x, *trained], dy, allow_unused=True)

            pairs[name] = dict(zip(PASSES, (lambda call=call: call(x), both), strict=True))
        found = {name: dict.fromkeys(PASSES, float("inf")) for name in pairs}
        gc.collect()
        # What one call leaves in a circle must not be collected in the time of another.
        gc.disable()
        for _ in range(TURNS):
            for name, pair in pairs.items():
                for side, run in pair.items():
                    found[name][side] = min(found[name][side], median_us(run, seconds / TURNS))
        gc.enable()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.forecast.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of runs of each pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times here")
    options = parser.parse_args(arguments)
    if launch.is_interpreted():
        command = [sys.executable, "-m", "tools.forecast.host", *(sys.argv[1:] if arguments is None else arguments)]
        environment_ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        return subprocess.run(command, cwd=Path.cwd(), env=environment_).returncode
    found = measure(options.seconds)
    print(f"{'host time on this machine, the driver left out, µs':52} {PASSES[0]:>10} {PASSES[1]:>22}")
    for name, times in found.items():
        print(f"{name:52} {times[PASSES[0]]:10.1f} {times[PASSES[1]]:22.1f}")
    if options.json:
        made = {key: environment()[key] for key in ("cpu", "python", "torch", "triton", "peft", "commit", "date")}
        text = json.dumps(
            {"what": "µs of the host, the driver's launches left out", "made_by": made, "times": found}, indent=1
        )
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
