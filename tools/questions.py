"""What the forecast assumes, asked of a GPU: `python -m tools.gpu --parts questions`.

Each kernel's time in one linear; whether a product that adds to what is there hides reading it; the gap from one node
of a CUDA graph to the next; and the host's time for a call, launches and all.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.cases import LINEARS, Case
from bench.device import Device
from bench.providers import ours
from bench.workloads import Workload, make_base
from tools.forecast.compare import kernel_us

RUNS = 20


def kernels(device: Device, shapes: Sequence[str], tokens: Sequence[int], **bank: int) -> list[dict[str, Any]]:
    """µs of each kernel, by the profiler, in forward and backward of one linear of either method.

    Args:
        bank: the sizes of VB-LoRA's that are not the default, as `Case` names them.
    """
    return [
        {"shape": shape, "M": M, "method": method, "kernels_us": kernel_us(case, device)}
        for shape in shapes
        for M in tokens
        for method, r in (("vblora", 4), ("vera", 256))
        for case in [Case("layer", shape, M, method=method, r=r, **bank)]
    ]


def products(device: Device, shapes: Sequence[str], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """µs of y = x W^T alone, of y <- y + x W^T, and of the product with an addition after it."""
    rows = []
    for shape in shapes:
        K, N = LINEARS[shape]
        for M in tokens:
            x, weight, y = (
                torch.randn(size, device=device.torch_device, dtype=torch.bfloat16) for size in ((M, K), (N, K), (M, N))
            )
            result = torch.empty_like(y)
            calls: dict[str, Callable[[int], object]] = {
                "alone": lambda i, x=x, w=weight, out=result: torch.mm(x, w.T, out=out),  # type: ignore[misc]
                "beta 1": lambda i, x=x, w=weight, y=y: y.addmm_(x, w.T),  # type: ignore[misc]
                "then added": lambda i, x=x, w=weight, y=y: y.add_(x @ w.T),  # type: ignore[misc]
            }
            rows.append(
                {
                    "shape": shape,
                    "M": M,
                    "us": {name: device.median_seconds(call) * 1e6 for name, call in calls.items()},
                }
            )
    return rows


def gap(device: Device, nodes: tuple[int, int] = (50, 250)) -> float:
    """µs from one node of a graph to the next: what each of many kernels that do next to nothing adds."""
    number = torch.zeros(1, device=device.torch_device)

    def several(count: int) -> Callable[[int], object]:
        return device.in_graph(lambda i: [number.add_(1) for _ in range(count)])

    few, many = (device.median_seconds(several(count)) * 1e6 for count in nodes)
    return (many - few) / (nodes[1] - nodes[0])


def host(device: Device, shape: str = "llama2_7b_q", M: int = 32, **bank: int) -> dict[str, dict[str, float]]:
    """Median µs of the host for a call of one linear, until it has launched everything, by method and direction."""
    found: dict[str, dict[str, float]] = {}
    for method, r in (("vblora", 4), ("vera", 256)):
        for direction in ("fwd", "fwd_bwd"):
            case = Case("layer", shape, M, method=method, r=r, **bank)
            workload = Workload(case, direction, device.torch_device)
            call = workload.call(workload.prepare(ours("triton")(case, make_base(case, device.torch_device))))
            times = []
            for i in range(RUNS + 5):
                device.synchronize()
                start = time.perf_counter()
                call(i)
                times.append((time.perf_counter() - start) * 1e6)
            found.setdefault(method, {})[direction] = sorted(times[5:])[RUNS // 2]
    return found


def answers(device: Device) -> dict[str, Any]:
    """All of them, at the sizes of Llama-2-7B."""
    linears = ("llama2_7b_q", "llama2_7b_gate", "llama2_7b_down")
    return {
        "kernels": kernels(device, linears, (1, 256, 4096)),
        "products": products(device, (*linears, "llama3_70b_q"), (256, 1024, 4096, 16384)),
        "graph_gap_us": gap(device),
        "host_us": host(device),
    }
