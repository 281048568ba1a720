"""What a CPU can say: this package's layers as its users run them beside PEFT's, and the kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.cases import SUITES, Case, on_cpu, tiny
from bench.correctness import errors, limits, truth_of, verdict
from bench.device import Call, Cpu
from bench.floors import Rates
from bench.providers import BASE, EAGER_PEFT, PATCHED_PEFT, PROVIDERS, Adapt, Provider, UnavailableError, ours
from bench.records import Record
from bench.runner import Effort
from bench.suites import Work, measure, work_of
from bench.workloads import Workload, make_base, sharing_copy

ROOT = Path(__file__).parents[1]
# Before the ids of what is compared here, so that no one takes them for a GPU's.
PREFIX = "cpu_"
# A CPU's floor is not asked for.
NO_RATES = Rates(float("inf"), float("inf"), float("inf"))


class Timer(Cpu):
    """A CPU that only tells the time."""

    def launches(self, function: Call) -> None:
        return None


_BY_NAME = {p.name: p for p in PROVIDERS}
# What a user of a CPU gets is the backend "auto"; the definition, which nobody runs, only sets the tolerance.
COMPARED = (_BY_NAME[BASE], Provider("ours", ours("auto")), _BY_NAME[EAGER_PEFT], _BY_NAME[PATCHED_PEFT])


def work_on_cpu(wanted: Callable[[str], bool], suites: Sequence[str] = SUITES) -> list[Work]:
    """What `compare` has to do: a linear, a step of a small Llama, its files; of these what is wanted by its id."""

    def by_either_id(identifier: str) -> bool:
        return wanted(PREFIX + identifier) or wanted(identifier)

    return work_of([case for suite in SUITES if suite in suites for case in on_cpu(suite)], by_either_id)


def compare(effort: Effort, work: Sequence[Work]) -> Iterator[list[Record]]:
    """Yield records of the ratios to PEFT on this CPU."""
    for _, records in measure(work, Timer(), NO_RATES, effort, COMPARED):
        for record in records:
            record.suite = PREFIX + record.suite
            record.floor_ms = record.operations = record.bytes_moved = None
        yield records


def interpreted() -> list[tuple[str, str | None]]:
    """Judge the kernels on tiny cases; (id, what is wrong or None). Wants TRITON_INTERPRET=1 where there is no GPU."""
    found = []
    for case in tiny("layer"):
        try:
            problem = judge(case, Provider("ours", ours("triton")))
        except UnavailableError as error:
            print(f"  {case.id('fwd_bwd')}: unavailable: {error}")
            continue
        found.append((case.id("fwd_bwd"), problem))
    return found


def judge(case: Case, provider: Provider) -> str | None:
    """What is wrong with a provider's outputs and gradients on a CPU, or None."""
    workload = Workload(case, "fwd_bwd", Cpu().device)
    base = make_base(case, Cpu().device)
    truth = truth_of(case, workload, base)

    def results(adapt: Adapt) -> dict[str, float]:
        model = workload.prepare(adapt(case, sharing_copy(base)))
        return errors(workload.results(model), truth)

    return verdict(results(provider.adapt), limits(results(ours("reference")), case.dtype, False))


def interpret_elsewhere() -> int:
    """Run `interpreted` in a process of its own, because Triton reads its variable when a kernel is defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-m", "bench.cpu"], cwd=ROOT, env=environment).returncode


def main() -> int:
    wrong = 0
    for identifier, problem in interpreted():
        print(f"  {identifier}: {'right' if problem is None else 'WRONG: ' + problem}", flush=True)
        wrong += problem is not None
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
