"""Forecast the time of every kernel of an adapted transformer block on a Hopper GPU, without one: `make forecast`.

The kernels are compiled for sm_90 and their machine code is run through a model of one multiprocessor. What comes out
is a forecast and never a measurement; README.md beside this file says what it is good for.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cases import LINEARS as SHAPES
from bench.environment import environment
from bench.floors import H200, base_time
from tools.forecast import predict
from tools.forecast.launches import HOT, collect
from tools.forecast.source import UndeclaredError
from vblora_triton.kernels.tuning import FEW_ROWS

# The linears of one block of Llama-2-7B, by what reads one x: (in, out) of each, and how many there are.
LINEARS = {
    name: (SHAPES[f"llama2_7b_{shape}"], count)
    for name, shape, count in (("q, k, v", "q", 3), ("o", "q", 1), ("gate, up", "gate", 2), ("down", "down", 1))
}
# Out of L2, bytes per second: the low end of what is likely.
L2 = 5.5e12
# Method, rank and tokens of the blocks that are forecast where the options name none.
BLOCKS = (
    ("vblora", 4, 1),
    ("vblora", 4, 256),
    ("vblora", 4, 4096),
    ("vera", 256, 256),
    ("vera", 256, 4096),
    ("vera", 1024, 4096),
)


def forecast(
    method: str, r: int, M: int, linears: list[str], rates: predict.Rates, *, h: int = 256, p: float = 0.0
) -> list[dict[str, Any]]:
    """A row for each launch of these linears: which one, and what `predict` says."""
    rows: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}
    for name in linears:
        (K, N), count = LINEARS[name]
        # What VB-LoRA computes as one node is one unit, whose launches are all in it.
        together = count if method == "vblora" and p == 0 and M > FEW_ROWS else 1
        for side, calls in collect(method, K, N, M, r=r, h=h, p=p, together=together).items():
            for call in calls:
                # Of linears that read one x the projected input is made once.
                units, of_side = (1, "forward") if side == "project" else (count // together, side)
                row = {"method": method, "r": r, "tokens": M, "linear": name, "count": units, "side": of_side}
                if isinstance(call, predict.Operation):
                    row |= predict.predict_operation(call, rates)
                else:
                    # Two launches may be the same, as those of k and v.
                    key = repr((call.compiled.kernel, call.grid, sorted(call.activations), call.arguments))
                    if key not in known:
                        known[key] = predict.predict(call, rates)
                    row |= known[key] | {"beside": call.beside}
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def block(rows: list[dict[str, Any]], rates: predict.Rates) -> dict[str, Any]:
    """One side of the block: its time over the frozen base's, if every launch took its floor too, and µs by kernel.

    The base product adds to the y, or dx, that a kernel has written. "ratio" counts that it reads it as a pass of its
    own, "hidden" that it does so under its own arithmetic; the truth lies between. Kernels on a second stream beside it
    count as far as they take longer.

    Args:
        rows: of one method, number of tokens and side.
    """
    first = rows[0]
    M, linears = first["tokens"], {row["linear"] for row in rows}
    chip = replace(H200, copy=rates.dram)
    shapes = [shape for name, (shape, count) in LINEARS.items() if name in linears for _ in range(count)]
    base = base_time(shapes, M, chip) * 1e6
    kernels: dict[str, float] = {}
    for row in rows:
        if not row.get("beside"):
            kernels[row["kernel"]] = kernels.get(row["kernel"], 0.0) + row["count"] * row["us"]
    # Of each unit, and there are so many of them.
    beside: dict[tuple[str, int, int], float] = {}
    for row in rows:
        if row.get("beside"):
            key = row["linear"], row["beside"], row["count"]
            beside[key] = beside.get(key, 0.0) + row["us"]
    for (name, _, count), us in beside.items():
        longer = count * (us - base_time(LINEARS[name][:1], M, chip) * 1e6)
        if longer > 0:
            kernels["longer than the product beside"] = kernels.get("longer than the product beside", 0.0) + longer
    hidden = 1 + sum(kernels.values()) / base
    # Where kernels run beside a product, it is the first of those that read one x, and they add to it.
    first_ones = {name: count for name, number, count in beside if number == 1}
    after = [shape for name in linears for shape in [LINEARS[name][0]] * (LINEARS[name][1] - first_ones.get(name, 0))]
    if after:
        written = sum(shape[1 if first["side"] == "forward" else 0] for shape in after)
        kernels["the base product's read of what was written"] = (
            2 * M * written / (chip.copy if M > HOT else rates.l2) * 1e6
        )
    floor = sum(row["count"] * row["floor"] for row in rows)
    return {
        **{key: first[key] for key in ("method", "r", "tokens", "side")},
        "ratio": 1 + sum(kernels.values()) / base,
        "hidden": hidden,
        "floors": 1 + floor / base,
        "base_us": base,
        "kernels_us": kernels,
    }


def blocks(rows: list[dict[str, Any]], rates: predict.Rates) -> list[dict[str, Any]]:
    """`block` of each method, number of tokens and side."""
    keys = ("method", "r", "tokens", "side")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [block(group, rates) for group in groups.values()]


_HEAD = (
    f"{'method':7} {'tokens':>6} {'linear':8} {'side':8} {'kernel':24} {'grid':>10} {'regs':>4} {'shared':>7} "
    f"{'instr/warp':>10} {'µs':>7} {'floor':>7}  binds"
)


def _line(row: dict[str, Any]) -> str:
    grid = "x".join(map(str, row.get("grid", ())))
    spilled = f"; {row['spills']} bytes spilled" if row.get("spills") else ""
    beside = "; beside the base" if row.get("beside") else ""
    return (
        f"{row['method']:7} {row['tokens']:6} {row['linear']:8} {row['side']:8} {row['kernel'].strip('_'):24} "
        f"{grid:>10} {row.get('registers', ''):4} {row.get('shared', ''):7} {row.get('instructions', ''):10} "
        f"{row['us']:7.1f} "
        f"{row['floor']:7.1f}  {row['binds']}{spilled}{beside}"
    )


def _summary(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{name.strip('_')} {us:.1f}" for name, us in found["kernels_us"].items())
    return (
        f"{found['method']:7} r {found['r']}, {found['tokens']} tokens, {found['side']:8}: {found['ratio']:.2f} "
        f"({found['hidden']:.2f} with that read hidden; "
        f"floors alone {found['floors']:.2f}); base {found['base_us']:.1f} µs, kernels {parts}"
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m tools.forecast", description=__doc__)
    made.add_argument("--method", choices=("vblora", "vera"), help="default: both")
    made.add_argument("--tokens", type=int, nargs="+", help="default: those that are committed")
    made.add_argument("--r", type=int, help="default: 4 for vblora, 256 for vera")
    made.add_argument("--vectors", type=int, default=256, help="of VB-LoRA's bank, each of 256 elements")
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--linears", nargs="+", choices=list(LINEARS), default=list(LINEARS))
    made.add_argument("--dram", type=float, default=4.3, help="10^12 bytes/s of a long stream: 4.3 H200, 3.0 H100")
    made.add_argument("--l2", type=float, default=L2 / 1e12, help="10^12 bytes/s out of L2: 5.5 to 9 is likely")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    rates = predict.Rates(options.dram * 1e12, options.l2 * 1e12)
    chosen = [
        (method, options.r or r, M)
        for method, r, tokens in BLOCKS
        if options.method in (None, method)
        for M in ([tokens] if options.tokens is None else options.tokens)
    ]
    print(
        f"FORECAST, not measured: bf16, dropout {options.dropout}, DRAM {options.dram}, L2 {options.l2} TB/s\n{_HEAD}"
    )
    rows: list[dict[str, Any]] = []
    try:
        for method, r, M in dict.fromkeys(chosen):
            rows += forecast(method, r, M, options.linears, rates, h=options.vectors, p=options.dropout)
    except UndeclaredError as error:
        print(error)
        return 2
    found = blocks(rows, rates)
    print("\nFORECAST, not measured, of one transformer block: its time over the frozen base's")
    print("\n".join(_summary(one) for one in found))
    if options.json:
        made = {key: environment()[key] for key in ("python", "torch", "triton", "commit", "date")}
        what = {"what": "a forecast by tools.forecast, not a measurement", "made_by": made}
        assumed = {"dram": rates.dram, "l2": rates.l2, "dropout": options.dropout, "vectors": options.vectors}
        text = json.dumps(what | {"assumed": assumed, "blocks": found, "launches": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
