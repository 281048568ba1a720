"""What a person sees: a bar while it runs, tables at the end; plain text where rich is missing."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.floors import PLANS
from bench.records import Record, is_ours

COLUMNS = ("provider", "ms", "20 %..80 %", "/ base", "/ PEFT", "floor", "launches", "MiB", "error")


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def number(value: float | None, digits: int = 3) -> str:
    """Rounded to so many digits, large ones to none; empty where there is none."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value < 100 else f"{value:,.0f}"


def row(record: Record) -> list[str]:
    """The cells of one record; what has no time has its status alone."""
    if record.status != "ok":
        return [record.provider, record.status]
    return [
        record.provider,
        number(record.median_ms),
        f"{number(record.q20_ms)}..{number(record.q80_ms)}",
        number(record.ratio_to_base, 2),
        number(record.ratio_to_peft, 2),
        number(record.floor_ms),
        number(record.launches, 0),
        number(record.peak_mib, 1) if record.bytes_on_disk is None else f"{record.bytes_on_disk:,} B",
        "" if record.max_rel_err is None else f"{record.max_rel_err:.0e}",
    ]


def by_case(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Neighbouring records of one case and direction, with their common id."""
    for key, group in itertools.groupby(records, key=lambda r: r.id().rpartition("/")[0]):
        yield key, list(group)


def show(records: Sequence[Record], stream: Any = None) -> None:
    """Print one table for each case and direction, and below it why some have no time."""
    stream = stream or sys.stdout
    for title, group in by_case(records):
        rows = [row(record) for record in group]
        if has_rich():
            _show_rich(title, rows, stream)
        else:
            print(f"\n{title}", file=stream)
            for first, *others in (COLUMNS, *rows):
                print(f"{first:22}" + "".join(f"{cell:>16}" for cell in others), file=stream)
        for record in group:
            if record.status != "ok":
                print(f"  {record.provider}: {record.status}: {record.reason}", file=stream)


def _show_rich(title: str, rows: list[list[str]], stream: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*map(Text, cells), style="red" if cells[1] == "wrong" else None)
    Console(file=stream, width=None if stream.isatty() else 120).print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with the name of what comes next; it moves a bar, or prints a line."""
    begun = itertools.count()
    if not (has_rich() and sys.stderr.isatty()):
        yield lambda name: print(f"[{next(begun) + 1}/{total}] {name}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, description=name, completed=next(begun))


def show_floors(rows: list[dict[str, float]], stream: Any = None) -> None:
    """Print what plans of kernels cost over the base alone."""
    stream = stream or sys.stdout
    plans = ("peft", *PLANS)
    print("One layer of Llama-2-7B over its frozen base alone, computed: forward / backward", file=stream)
    print(f"{'tokens':>8}" + "".join(f"{plan:>16}" for plan in plans), file=stream)
    for entry in rows:
        cells = [f"{entry[plan + '_fwd']:.2f} / {entry[plan + '_bwd']:.2f}" for plan in plans]
        print(f"{entry['M']:>8.0f}" + "".join(f"{cell:>16}" for cell in cells), file=stream)


def show_ratios(records: Sequence[Record], stream: Any = None) -> None:
    """Print a line for each of ours in each case on a CPU: times, ratio, noise, and what is kept for backward."""
    stream = stream or sys.stdout
    head = ("case", "", "ours ms", "PEFT ms", "ratio", "noise", "ours KiB kept", "PEFT KiB kept")
    print(f"{head[0]:58}{head[1]:22}" + "".join(f"{name:>14}" for name in head[2:]), file=stream)
    for title, group in by_case(records):
        by_name = {r.provider: r for r in group}
        # PEFT's record of a file's form is named after the form, that of a layer is not.
        for name in (name for name in by_name if is_ours(name)):
            rival = name.replace("ours_", "peft_", 1) if name.startswith("ours_") else "peft"
            print(f"{title:58}{name:22}" + _ratio_cells(by_name[name], by_name.get(rival), by_name), file=stream)


def _ratio_cells(mine: Record, other: Record | None, by_name: dict[str, Record]) -> str:
    if mine.provider == "all":
        return f"  {mine.status}: {mine.reason}"
    problems = [f"{r.provider} {r.status}: {r.reason}" for r in (mine, other) if r and r.status != "ok"]
    if problems or other is None:
        return "  " + "; ".join(problems or ["PEFT was not measured"])
    base, again = by_name.get("base"), by_name.get("base_again")
    cells = [number(mine.median_ms), number(other.median_ms), number(mine.ratio_to_peft), ""]
    if base and again and base.median_ms and again.median_ms:
        cells[-1] = f"{abs((again.ratio_to_base or 0) - 1):.1%}"
    cells += [number(mine.saved_kib, 0), number(other.saved_kib, 0)]
    return "".join(f"{cell:>14}" for cell in cells)
