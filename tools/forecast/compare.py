"""The forecast beside what a GPU measures, kernel by kernel: tools.gpu prints it where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.profiler import profile

from bench.cases import Case
from bench.device import Cuda, Device
from bench.providers import ours
from bench.workloads import Workload, make_base

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "forecast.json"


def kernel_us(case: Case, device: Device) -> dict[str, float]:
    """µs of each kernel in one forward and backward of a case by this package, by the profiler."""
    workload = Workload(case, "fwd_bwd", device.torch_device)
    call = workload.call(workload.prepare(ours("triton")(case, make_base(case, device.torch_device))))
    for i in range(3):
        call(i)
    device.synchronize()
    with profile(activities=device.activities) as found:
        call(0)
        device.synchronize()
    return {event.key: event.self_device_time_total for event in found.key_averages() if device.is_launch(event)}


def beside(forecast: dict[str, float], measured: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each kernel that was forecast: µs measured, µs forecast, and their ratio; None where it did not run."""
    rows = []
    for kernel, us in forecast.items():
        found = measured.get(kernel)
        ratio = None if found is None else found / us
        rows.append({"kernel": kernel, "measured_us": found, "forecast_us": us, "measured_over_forecast": ratio})
    return rows


def compare(device: Device | None = None, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Measure every block that was forecast, print measured / forecast of each kernel, and return it.

    What the base product reads, which is no kernel of ours, is forecast and not compared.
    """
    blocks: dict[tuple[str, int, int], dict[str, float]] = {}
    for block in json.loads(results.read_text(encoding="utf-8"))["blocks"]:
        both = blocks.setdefault((block["method"], block["r"], block["tokens"]), {})
        for kernel, us in block["kernels_us"].items():
            if kernel.endswith("_kernel"):
                both[kernel] = both.get(kernel, 0.0) + us
    device = device or Cuda()
    rows = []
    for (method, r, tokens), forecast in blocks.items():
        measured = kernel_us(Case("block", "llama2_7b", tokens, method=method, r=r), device)
        rows += [{"method": method, "r": r, "tokens": tokens} | row for row in beside(forecast, measured)]
    print(f"{'block':24} {'kernel':28} {'measured µs':>12} {'forecast µs':>12} {'ratio':>6}")
    for row in rows:
        name = f"{row['method']} r {row['r']}, {row['tokens']} tokens"
        measured_us = "-" if row["measured_us"] is None else f"{row['measured_us']:.1f}"
        ratio = "-" if row["measured_over_forecast"] is None else f"{row['measured_over_forecast']:.2f}"
        print(f"{name:24} {row['kernel'].strip('_'):28} {measured_us:>12} {row['forecast_us']:12.1f} {ratio:>6}")
    return rows
