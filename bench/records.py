"""Records and the file that holds them, rewritten after each: a run that is cut short keeps what it measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Value = float | None


@dataclass
class Record:
    """One measurement, of one case in one direction by one provider.

    status: "ok"; "wrong" (its results are off, so that it has no time); "unavailable" or "failed". `reason` says more.
    median_ms, q20_ms, q80_ms: over `runs` runs.
    ratio_to_base, ratio_to_peft: to the frozen base alone, and to PEFT's eager layers of the same method; the median
        over the rounds, in each of which every provider has one turn.
    floor_ms: what no program can go below at the rates measured in the same run, for the base and the update.
    launches: kernels that the device runs in one call.
    peak_mib: the model, its optimizer's state, and what one call adds at its height.
    max_rel_err: the largest over outputs and gradients.
    saved_kib: what forward keeps for backward, beside the inputs, parameters and frozen matrices.
    operations, bytes_moved: those of the floor.
    bytes_on_disk: in the suite `load`.
    """

    suite: str
    case: str
    M: int
    dtype: str
    method: str
    provider: str
    direction: str
    status: str = "ok"
    reason: str | None = None
    median_ms: Value = None
    q20_ms: Value = None
    q80_ms: Value = None
    runs: int = 0
    ratio_to_base: Value = None
    ratio_to_peft: Value = None
    floor_ms: Value = None
    launches: int | None = None
    peak_mib: Value = None
    max_rel_err: Value = None
    saved_kib: Value = None
    operations: int | None = None
    bytes_moved: int | None = None
    bytes_on_disk: int | None = None

    def id(self) -> str:
        """Case and provider."""
        return f"{self.suite}/{self.direction}/{self.case}/M{self.M}/{self.dtype}/{self.method}/{self.provider}"


def is_ours(provider: str) -> bool:
    """Whether a provider runs this package's code, PEFT's patched layers included; "all" is a whole case."""
    return provider in ("all", "ours", "peft_patched") or provider.startswith("ours_")


def problems(records: Iterable[Record]) -> list[str]:
    """What is wrong or failed of ours. A rival's failure is its own affair."""
    bad = [r for r in records if r.status in ("wrong", "failed") and is_ours(r.provider)]
    return [f"{r.id()}: {r.status}: {r.reason}" for r in bad]


def check_writable(path: Path) -> None:
    """Raise OSError where `Results` could not write this file; makes its folder.

    Raises:
        OSError: the folder cannot be made or written to, or something that is no file has the name.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file")
    partial = partial_of(path)
    partial.touch()
    partial.unlink()


def partial_of(path: Path) -> Path:
    """Where a file is written before it is moved into place."""
    return path.with_name(path.name + ".partial")


class Results:
    """The header and the records so far.

    Args:
        header: what it was measured on.
        path: the file to keep up to date, if any.
    """

    def __init__(self, header: dict[str, Any], path: Path | None = None) -> None:
        # A link stays one: what it leads to is replaced.
        self.header, self.path = header, path and path.resolve()
        self.records: list[Record] = []
        self.save()

    def add(self, records: list[Record]) -> None:
        """Take records in, and write the file anew."""
        self.records += records
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"header": self.header, "records": [asdict(r) for r in self.records]}, indent=1)
        # Into place in one go: a run that is killed leaves the last file whole.
        partial = partial_of(self.path)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def load(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Read a file of `Results`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["header"], [Record(**record) for record in found["records"]]
