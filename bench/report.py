"""Put the measured tables into README.md: `make report`; `--check` says whether they are up to date.

Between the markers stands what bench/results/*.json of runs on a GPU hold, and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.records import Record, load
from bench.table import by_case, number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
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
    import json

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


def updated(text: str, rendered: str) -> str:
    """The README with what is between the markers replaced.

    Raises:
        ValueError: it has not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must have one line {BEGIN!r} and after it one line {END!r}.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{rendered}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README.md is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    new = updated(text, render(options.results, options.readme.resolve().parent))
    if new == text:
        return 0
    if options.check:
        print("README.md does not show what bench/results/ holds; run `make report`.", file=sys.stderr)
        return 1
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
