"""Pictures of a run: overhead over the base against tokens, the roofline, memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import Record


def plot(header: dict[str, Any], records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the PNGs that the records have data for, and return their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    timed = [r for r in records if r.status == "ok" and r.median_ms is not None]
    return [*_overhead(header, timed, folder), *_roofline(header, timed, folder), *_memory(header, timed, folder)]


def _finish(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    # Without the date and the version of matplotlib, so that equal data gives equal files.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    import matplotlib.pyplot as plt

    plt.close(figure)
    return path


def _overhead(header: dict[str, Any], records: list[Record], folder: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for r in records:
        if r.suite in ("layer", "block") and r.ratio_to_base is not None:
            groups[(r.suite, r.case, r.dtype, r.method, r.direction)].append(r)
    paths = []
    for (suite, case, dtype, method, direction), group in groups.items():
        if len({r.M for r in group}) < 2:
            continue
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for provider in dict.fromkeys(r.provider for r in group if r.provider not in ("base", "base_again")):
            points = sorted((r.M, r.ratio_to_base) for r in group if r.provider == provider)
            axes.plot(*zip(*points, strict=True), marker="o", label=provider)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time over the frozen base alone")
        axes.set_title(f"{case} {dtype} {method} {direction}, {header.get('gpu') or 'no GPU'}", fontsize=9)
        axes.legend(fontsize=7)
        paths.append(_finish(figure, folder / f"overhead-{suite}-{case}-{dtype}-{method}-{direction}.png"))
    return paths


def _roofline(header: dict[str, Any], records: list[Record], folder: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    points = [r for r in records if r.operations and r.bytes_moved and r.provider in ("base", "ours", "peft")]
    if not points or not header.get("copy_gb_s"):
        return []
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for provider in dict.fromkeys(r.provider for r in points):
        mine = [r for r in points if r.provider == provider]
        intensity = [r.operations / r.bytes_moved for r in mine]  # type: ignore[operator]
        rate = [r.operations / r.median_ms * 1e-9 for r in mine]  # type: ignore[operator]
        axes.scatter(intensity, rate, s=14, label=provider, alpha=0.7)
    ends = [0.5, header["matmul_tflop_s"] * 1e3 / header["copy_gb_s"], 1e4]
    axes.plot(ends, [min(x * header["copy_gb_s"] * 1e-3, header["matmul_tflop_s"]) for x in ends], color="black")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    axes.set_title(f"Roofline, {header.get('gpu') or 'no GPU'}", fontsize=9)
    axes.legend(fontsize=7)
    return [_finish(figure, folder / "roofline.png")]


def _memory(header: dict[str, Any], records: list[Record], folder: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    groups: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        if r.peak_mib is not None and r.direction in ("fwd_bwd", "step") and r.provider != "base_again":
            groups[r.id().rpartition("/")[0]].append(r)
    # The largest few: whole models where there are any.
    largest = sorted(groups, key=lambda key: -max(r.peak_mib or 0 for r in groups[key]))[:6]
    if not largest:
        return []
    figure, grid = plt.subplots(len(largest), 1, figsize=(7, 2.2 * len(largest)), squeeze=False)
    for axes, key in zip(grid[:, 0], largest, strict=True):
        axes.barh([r.provider for r in groups[key]], [(r.peak_mib or 0) / 1024 for r in groups[key]])
        axes.set_title(key, fontsize=8)
        axes.tick_params(labelsize=7)
    grid[-1, 0].set_xlabel("GiB at the height of one call")
    return [_finish(figure, folder / "memory.png")]
