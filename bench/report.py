"""Put the tables into README.md and CONTRIBUTING.md: `make report`; `--check` says whether they are up to date.

Between two markers stands what files of bench/results/ hold, and nothing else: in the README what runs on a GPU
measured, cpu.json and quality.json; in CONTRIBUTING.md forecast.json, which was not measured, and host.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from bench.records import Record, load
from bench.table import by_case, number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
METHODS = {"vblora": "VB-LoRA", "vera": "VeRA"}
# README shows these; the files have the rest.
# "all" is a case that failed as a whole.
SHOWN = ("all", "base", "ours", "ours_graph", "ours_compiled", "peft", "peft_compiled", "peft_patched", "lora_r32")
# The many cases of single layers are in the files and the pictures.
SHOWN_SUITES = ("block", "decode", "model")
NOTHING = (
    "No GPU results yet: the benchmark has not run on one, and nothing is claimed about speed until it has. "
    "`make bench` on a machine with a GPU measures; `make report` puts the tables here."
)


def files(folder: Path) -> list[tuple[str, dict[str, Any], list[Record]]]:
    """(name, header, records) of every result of the benchmark that was measured on a GPU."""
    found = []
    for path in sorted(folder.glob("*.json")):
        # The folder also holds reports of other shapes.
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"header", "records"} <= content.keys() and content["header"].get("gpu"):
            found.append((path.name, *load(path)))
    return found


def _commit(commit: str) -> str:
    """Short, but still said to be dirty."""
    return commit.removesuffix("-dirty")[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def _line(record: Record) -> str:
    if record.status != "ok":
        return f"| {record.provider} | {record.status} | | | | |"
    ratios = f"{number(record.ratio_to_base, 2)} | {number(record.ratio_to_peft, 2)}"
    counted = f"{number(record.launches, 0)} | {number(record.peak_mib, 0)}"
    return f"| {record.provider} | {number(record.median_ms)} | {ratios} | {counted} |"


def render(folder: Path = RESULTS) -> str:
    """The tables and pictures of what was measured on a GPU."""
    found = files(folder)
    if not found:
        return NOTHING
    blocks = []
    for name, header, records in found:
        blocks.append(
            f"`{name}`: {header['gpu']}, torch {header['torch']}, triton {header['triton']}, peft {header['peft']}, "
            f"transformers {header['transformers']}, commit {_commit(header['commit'])}, {header['date'][:10]}; "
            f"copy {header['copy_gb_s']:,.0f} GB/s, bf16 products {header['matmul_tflop_s']:,.0f} TFLOP/s."
        )
        for title, group in by_case([r for r in records if r.provider in SHOWN and r.suite in SHOWN_SUITES]):
            lines = [
                f"**{title}**",
                "",
                "| provider | ms | over base | over PEFT | launches | MiB |",
                "|---|--:|--:|--:|--:|--:|",
            ]
            blocks.append("\n".join([*lines, *(_line(record) for record in group)]))
    pictures = [
        f"![{path.stem}]({path.relative_to(folder.parents[1]).as_posix()})" for path in sorted(folder.glob("*.png"))
    ]
    return "\n\n".join([*blocks, *pictures])


# Directions of a CPU's layers, and how the table calls them.
CPU_COLUMNS = {"fwd": "eval", "fwd_grad": "forward", "bwd": "backward"}


def render_cpu(path: Path) -> str:
    """The table of our times over PEFT's on a CPU, from the file that `bench layer model` wrote there."""
    header, records = load(path)
    ours = [r for r in records if r.provider == "ours" and r.status == "ok"]
    rows: dict[tuple[str, int, int], dict[tuple[str, str], str]] = {}
    for r in ours:
        size = re.fullmatch(r"square_(\d+)-.*-t(\d+)", r.case)
        if size and r.suite == "cpu_layer":
            row = rows.setdefault((size[1], int(size[2]), r.M), {})
            row[r.method, r.direction] = number(r.ratio_to_peft, 2)
    columns = [(method, direction) for method in ("vblora", "vera") for direction in CPU_COLUMNS]
    titles = " | ".join(f"{METHODS[method]} {CPU_COLUMNS[direction]}" for method, direction in columns)
    steps = ", ".join(f"{METHODS[r.method]} {number(r.ratio_to_peft, 2)}" for r in ours if r.suite == "cpu_model")
    lines = [
        f"Without a GPU: our time over PEFT's, float32, measured in one run; {header['cpu']}, torch {header['torch']}, "
        f"peft {header['peft']}, commit {_commit(header['commit'])}, {header['date'][:10]}. "
        f"A training step of a small Llama: {steps or 'not measured'}. One linear layer:",
        "",
        f"| layer | threads | tokens | {titles} |",
        "|---" + "|--:" * (len(columns) + 2) + "|",
    ]
    for (size, threads, M), row in rows.items():
        found = " | ".join(row.get(column, "") for column in columns)
        lines.append(f"| {size} x {size} | {threads} | {M:,} | {found} |")
    return "\n".join(lines)


def render_quality(path: Path) -> str:
    """The table of what methods learned, from the file that bench.quality wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    what, where, runs = content["quality"], content["environment"], content["runs"]
    # A seed that some have not run yet says nothing about the others.
    kinds = {(run["method"], run["library"]) for run in runs}
    whole = {seed for seed, n in Counter(run["seed"] for run in runs).items() if n == len(kinds)}
    runs = [run for run in runs if run["seed"] in whole]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        rows.setdefault((run["method"], run["library"]), []).append(run)
    names = {"peft": "PEFT", "vblora_triton": "this package", "torch": ""}
    lines = [
        f"Accuracy on {what['held_out']:,} held-out texts ({100 * what['positive']:.0f} % are positive), mean over "
        f"{len(whole)} seeds, after {what['steps']} steps of {what['batch']} texts: "
        f"`{what['model']}` on the movie reviews of `{what['texts']}`; torch {where['torch']}, peft {where['peft']}.",
        "",
        "| method | by | accuracy | lowest to highest | trained beside the head | file, bytes |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (method, library), group in rows.items():
        found = [run["accuracy"] for run in group]
        spread = f"{mean(found):.3f} | {min(found):.3f} to {max(found):.3f}"
        lines.append(f"| {method} | {names[library]} | {spread} | {group[0]['trained']:,} | {group[0]['bytes']:,} |")
    return "\n".join(lines)


def render_forecast(path: Path) -> str:
    """The table of what blocks would take over the frozen base, from the file that tools.forecast wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    made = content["made_by"]
    lines = [
        f"A forecast, and no measurement; torch {made['torch']}, triton {made['triton']}, commit "
        f"{_commit(made['commit'])}, {made['date'][:10]}. A block of Llama-2-7B in bf16, its time over that of the "
        "frozen base alone; and where the base's product hides its read of what our kernels wrote; and if every launch "
        "took the floor of its bytes.",
        "",
        "| method | r | tokens | side | ratio | read hidden | floors |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for row in content["blocks"]:
        ratios = " | ".join(number(row[name], 2) for name in ("ratio", "hidden", "floors"))
        lines.append(f"| {row['method']} | {row['r']} | {row['tokens']:,} | {row['side']} | {ratios} |")
    return "\n".join(lines)


def render_host(path: Path) -> str:
    """The table of what Python takes, from the file that tools.forecast.host wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    made = content["made_by"]
    lines = [
        f"µs of the host, with the driver's launches replaced by nothing; {made['cpu']}, python {made['python']}, "
        f"torch {made['torch']}, peft {made['peft']}, commit {_commit(made['commit'])}, {made['date'][:10]}.",
        "",
        "| | forward | forward and backward |",
        "|---|--:|--:|",
    ]
    for name, times in content["times"].items():
        lines.append(f"| {name} | {number(times['forward'], 0)} | {number(times['forward and backward'], 0)} |")
    return "\n".join(lines)


# Of each page the names in its markers, and what makes the text between them: of the folder of results, or of the file
# there that has that name.
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"bench": render, "cpu": render_cpu, "quality": render_quality},
    "CONTRIBUTING.md": {"forecast": render_forecast, "host": render_host},
}


def marked(name: str, text: str) -> str:
    """A text between the markers of that name."""
    return f"<!-- {name}: begin -->\n{text}\n<!-- {name}: end -->"


def updated(page: str, text: str, name: str, rendered: str) -> str:
    """The text of a page with what is between the markers replaced.

    Raises:
        ValueError: it has not exactly one pair of markers.
    """
    begin, end = marked(name, "").split("\n\n")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} must have one line {begin!r} and after it one line {end!r}.")
    before, _, rest = text.partition(begin)
    return before + marked(name, rendered) + rest.partition(end)[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is out of date")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where the pages are, and bench/results/")
    options = parser.parse_args(arguments)
    wrong = 0
    for page, sections in PAGES.items():
        path = options.folder / page
        text = new = path.read_text(encoding="utf-8")
        for name, render_section in sections.items():
            folder = options.folder / "bench" / "results"
            source = folder if render_section is render else folder / f"{name}.json"
            new = updated(page, new, name, render_section(source) if source.exists() else "Not made yet.")
        if new == text:
            continue
        wrong += 1
        if options.check:
            print(f"{page} does not show what bench/results/ holds; run `make report`.", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
    return int(options.check and wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
