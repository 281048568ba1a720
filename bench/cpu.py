"""What a CPU can say: this package's layers as its users run them beside PEFT's, and the kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.cases import SUITES, on_cpu, tiny
from bench.device import Call, Cpu
from bench.floors import Rates
from bench.providers import BASE, EAGER_PEFT, PATCHED_PEFT, PROVIDERS, Provider, ours
from bench.records import Record
from bench.runner import Effort
from bench.suites import Work, measure, work_of

ROOT = Path(__file__).parents[1]
# Before the ids of what is compared here, so that no one takes them for a GPU's.
PREFIX = "cpu_"
# Of what is judged only, or rehearsed: the times mean nothing, so one run will do.
ONCE = Effort(least=1, most=1, warm_up=1)
# A CPU's floor is not asked for.
NO_RATES = Rates(float("inf"), float("inf"), float("inf"))


class Timer(Cpu):
    """A CPU that only tells the time: of one thread its own, to which others on the machine add little.

    Args:
        threads: those of the case, if it says how many.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(time.process_time if threads == 1 else time.perf_counter)

    def launches(self, function: Call) -> None:
        return None


_BY_NAME = {p.name: p for p in PROVIDERS}
# What a user of a CPU gets is the backend "auto"; the definition, which nobody runs, only sets the tolerance.
COMPARED = (_BY_NAME[BASE], Provider("ours", ours("auto")), _BY_NAME[EAGER_PEFT], _BY_NAME[PATCHED_PEFT])


def work_on_cpu(wanted: Callable[[str], bool], suites: Sequence[str] = SUITES) -> list[Work]:
    """What `compare` has to do: a linear, a step of a small Llama, its files; of these what is wanted by either id."""
    cases = [case for suite in SUITES if suite in suites for case in on_cpu(suite)]
    return work_of(cases, lambda identifier: wanted(PREFIX + identifier) or wanted(identifier))


def compare(effort: Effort, work: Sequence[Work]) -> Iterator[list[Record]]:
    """Yield records of the ratios to PEFT on this CPU."""
    for case, direction in work:
        with on_threads(case.threads):
            ((_, records),) = measure([(case, direction)], Timer(case.threads), NO_RATES, effort, COMPARED)
        for record in records:
            record.suite = PREFIX + record.suite
            record.floor_ms = record.operations = record.bytes_moved = None
        yield records


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Let torch compute on so many threads inside the context; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_interpreter(module: str, *arguments: str) -> int:
    """Run a module in a process of its own, because Triton reads its variable when a kernel is defined.

    It runs in this folder, which paths among the arguments may be relative to.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode


def main() -> int:
    """Judge the kernels on tiny cases; 1 where one is wrong. Wants TRITON_INTERPRET=1 where there is no GPU."""
    work = work_of(tiny("layer"), lambda identifier: "/fwd_bwd/" in identifier)
    bad = False
    for _, (record,) in measure(work, Timer(), NO_RATES, ONCE, (Provider("ours", ours("triton")),)):
        right = record.status == "ok"
        print(f"  {record.id()}: {'right' if right else f'{record.status.upper()}: {record.reason}'}", flush=True)
        bad |= not right
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
