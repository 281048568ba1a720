"""Put the measured tables into README.md: `make report`; `--check` says whether they are up to date.

Between the markers stands what bench/results/*.json of runs on a GPU hold, and in a second place what quality.json
holds, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from bench.records import Record, load
from bench.table import by_case, number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
QUALITY, QUALITY_END = "<!-- quality: begin -->", "<!-- quality: end -->"
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


def render(folder: Path = RESULTS, root: Path = ROOT) -> str:
    """The text between the markers."""
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
    pictures = [f"![{path.stem}]({path.relative_to(root).as_posix()})" for path in sorted(folder.glob("*.png"))]
    return "\n\n".join([*blocks, *pictures])


def render_quality(path: Path) -> str:
    """The table of what methods learned, from the file that bench.quality wrote."""
    if not path.is_file():
        return "Not measured yet."
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


def updated(text: str, rendered: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with what is between the markers replaced.

    Raises:
        ValueError: it has not exactly one pair of markers.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must have one line {begin!r} and after it one line {end!r}.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{rendered}\n{end}{rest.partition(end)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README.md is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    new = updated(text, render(options.results, options.readme.resolve().parent))
    quality = options.results / "quality.json"
    if quality.is_file() or QUALITY in text:
        new = updated(new, render_quality(quality), QUALITY, QUALITY_END)
    if new == text:
        return 0
    if options.check:
        print("README.md does not show what bench/results/ holds; run `make report`.", file=sys.stderr)
        return 1
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
