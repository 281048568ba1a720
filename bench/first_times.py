"""A first table of times on a GPU: one adapted linear beside its frozen base alone and the reference."""

from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from bench.kernels_report import SHAPES
from vblora_triton import ops

QUANTILES = (0.5, 0.2, 0.8)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def row(name: str, M: int, h: int, bandwidth: float) -> dict[str, Any]:
    """Times in ms (median, 20 % and 80 % quantile) of forward, and of forward and backward, by provider."""
    K, N = SHAPES[name]
    r, b, k = 4, 256, 2
    make = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(M, K, **make).requires_grad_()  # type: ignore[arg-type]
    weight, dy = torch.randn(N, K, **make) * K**-0.5, torch.randn(M, N, **make)  # type: ignore[arg-type]
    logits_A, logits_B = torch.randn(r, K // b, h, device="cuda"), torch.randn(N // b, r, h, device="cuda")
    parameters = [t.requires_grad_() for t in (logits_A, logits_B, torch.rand(h, b, device="cuda") * 0.04 - 0.02)]

    def adapted(backend: str):
        return lambda: ops.vblora_linear(x, F.linear(x, weight), *parameters, k, backend=backend)

    providers = {"base": lambda: F.linear(x, weight), "triton": adapted("triton"), "reference": adapted("reference")}
    # Refused if it is wrong.
    wide = ops.vblora_linear(
        x.double(), F.linear(x, weight).double(), *(p.double() for p in parameters), k, backend="reference"
    )
    error = ((providers["triton"]().double() - wide).norm() / wide.norm()).item()
    if not error < 5e-3:
        raise RuntimeError(f"{name} M{M} h{h}: relative error {error}")
    result: dict[str, Any] = {"shape": name, "M": M, "h": h, "dtype": "bf16", "r": r, "error": error}
    # Bytes that the adapter must move: x and y read, y written; back, x and dy read, dx written.
    result["floor_ms"] = {
        "fwd": 2 * M * (K + 2 * N) / bandwidth * 1e3,
        "fwd_bwd": 2 * M * (3 * K + 3 * N) / bandwidth * 1e3,
    }
    for provider, function in providers.items():
        result[provider] = {"fwd": do_bench(function, quantiles=QUANTILES)}
        inputs = [x] if provider == "base" else [x, *parameters]
        both = lambda f=function, i=inputs: torch.autograd.grad(f(), i, dy)  # noqa: E731
        result[provider]["fwd_bwd"] = do_bench(both, quantiles=QUANTILES)
    return result


def table() -> dict[str, Any]:
    """Measure Llama-2-7B's shapes at four numbers of tokens, print one line each, return all."""
    bandwidth = copy_bandwidth()
    rows = []
    print(f"copy: {bandwidth / 1e12:.2f} TB/s; ms, ratio to the base alone in brackets")
    for name in ("llama2_7b_q", "llama2_7b_gate", "llama2_7b_down"):
        for M in (1, 256, 4096, 16384):
            rows.append(row(name, M, 256, bandwidth))
            cells = [f"{name} M{M:<6}"]
            for direction in ("fwd", "fwd_bwd"):
                base = rows[-1]["base"][direction][0]
                cells.append(f"{direction}: base {base:.4f}")
                for provider in ("triton", "reference"):
                    time = rows[-1][provider][direction][0]
                    cells.append(f"{provider} {time:.4f} ({time / base:.2f})")
            print("  ".join(cells), flush=True)
    return {"copy_bytes_per_second": bandwidth, "rows": rows}
