"""Measure a case in one direction by every provider: right first, then timed, turn by turn."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import correctness
from bench.cases import Case
from bench.device import Call, Machine
from bench.floors import Floor, Rates, must_take
from bench.providers import BASE, EAGER_PEFT, PROVIDERS, REFERENCE, Provider, UnavailableError, ready
from bench.records import Record
from bench.workloads import DTYPES, Workload, sharing_copy


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `least` and at most `most` runs, within about `seconds` for each provider."""

    least: int = 5
    most: int = 100
    seconds: float = 0.5
    warm_up: int = 3

    def runs(self, one: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(one, 1e-6))))


@dataclass
class Entrant:
    """A provider that has passed: what is timed, and what is known of it so far."""

    provider: Provider
    call: Call
    record: Record


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share q of the values does not exceed, between neighbours in proportion."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()


def paired_ratio(values: Sequence[float], against: Sequence[float]) -> float:
    """The median of the rounds' ratios: what else the machine did in a round slowed both."""
    return quantile([value / other for value, other in zip(values, against, strict=True)], 0.5)


def interleaved(calls: dict[str, Call], machine: Machine, effort: Effort) -> dict[str, list[float]]:
    """Milliseconds of many runs of each call, turn by turn, each round in an order of its own.

    A turn pays for what the one before it left in caches and in the allocator, so nobody is always to follow the same
    neighbour. The orders are drawn, the same ones in every run.
    """
    slowest = 0.0
    for call in calls.values():
        for i in range(effort.warm_up):
            call(i)
        machine.synchronize()
        start = time.perf_counter()
        call(0)
        machine.synchronize()
        slowest = max(slowest, time.perf_counter() - start)
    names = list(calls)
    waiting: dict[str, list] = {name: [] for name in names}
    draw = random.Random(0)
    for i in range(effort.runs(slowest)):
        for name in draw.sample(names, len(names)):
            waiting[name].append(machine.time(calls[name], i))
    machine.synchronize()
    return {name: [wait() for wait in waits] for name, waits in waiting.items()}


def blank(case: Case, direction: str, provider: str, **fields: Any) -> Record:
    """A record of a case that knows nothing yet."""
    return Record(case.suite, case.name, case.M, case.dtype, case.method, provider, direction, **fields)


def floor(case: Case, direction: str, provider: str, rates: Rates) -> Floor:
    """What no program can go below: the products of the base, and of the update where the provider has one."""
    fitting = rates if case.dtype != "fp32" else Rates(rates.copy, rates.matmul_fp32, rates.matmul_fp32)
    total = Floor(0, 0, 0.0)
    for (K, N), adapted in zip(case.shapes(), case.adapted(), strict=True):
        r = case.r if adapted and not provider.startswith(BASE) else 0
        width = DTYPES[case.dtype].itemsize
        total += must_take(K, N, case.M, r, direction, fitting, width, case.method == "vera")
    return total


class Measurement:
    """One case in one direction: judge, time, and count."""

    def __init__(self, case: Case, direction: str, machine: Machine, rates: Rates, effort: Effort, base: nn.Module):
        self.case, self.direction, self.machine = case, direction, machine
        self.rates, self.effort, self.base = rates, effort, base
        self.workload = Workload(case, direction, machine.device)
        self.truth: dict[str, Tensor] = {}
        self.eager: dict[str, float] = {}

    def run(self, providers: Sequence[Provider] = PROVIDERS) -> list[Record]:
        """One record for each provider that takes part, and one more for the base timed again."""
        records, entrants = [], []
        taking_part = [p for p in providers if p.takes_part(self.case, self.direction)]
        self._find_truth(taking_part)
        for provider in taking_part:
            outcome = self._enter(provider)
            entrants += [outcome] if isinstance(outcome, Entrant) else []
            records.append(outcome.record if isinstance(outcome, Entrant) else outcome)
        self._time(entrants, records)
        self.truth = {}
        return records

    def _find_truth(self, providers: list[Provider]) -> None:
        self.truth = correctness.truth_of(self.case, self.workload, self.base)
        # Plain PyTorch in the same dtypes sets what the others may be off by.
        reference = next(p for p in PROVIDERS if p.name == REFERENCE)
        model = self.workload.prepare(reference.adapt(self.case, sharing_copy(self.base)))
        self.eager = correctness.errors(self.workload.results(model), self.truth)

    def _enter(self, provider: Provider) -> Entrant | Record:
        record = blank(self.case, self.direction, provider.name)
        least = floor(self.case, self.direction, provider.name, self.rates)
        record.operations, record.bytes_moved, record.floor_ms = least.operations, least.bytes, least.seconds * 1e3
        try:
            call, wrong = self._judge(provider, record)
        except UnavailableError as error:
            record.status, record.reason = "unavailable", str(error)
            return record
        except Exception as error:
            # Whatever a rival, a compiler or a capture may raise: the others are still to be measured.
            record.status, record.reason = "failed", f"{type(error).__name__}: {error}"[:500]
            return record
        if wrong is not None:
            record.status, record.reason = "wrong", wrong
            return record
        return Entrant(provider, call, record)

    def _judge(self, provider: Provider, record: Record) -> tuple[Call, str | None]:
        """Make what is to be timed, and compare what it computes; count what it holds."""
        model = self.workload.prepare(provider.adapt(self.case, sharing_copy(self.base)))
        running = ready(provider, self.case, model, self.machine)
        call = self.workload.call(running)
        if provider.run == "graph":
            call = self.machine.in_graph(call)
            results = call(0)
        else:
            results = self.workload.results(running)
        # A graph writes its next results where these are.
        results = {name: t.detach().clone() for name, t in results.items()}
        if provider.same_function:
            truth = self.truth
            allowed = correctness.limits(self.eager, self.case.dtype, provider.run == "autocast")
            if provider.name == REFERENCE:
                allowed = correctness.eager_limit(self.case)
        else:
            truth = correctness.truth_of(self.case, self.workload, self.base, provider.adapt)
            allowed = correctness.eager_limit(self.case)
        found = correctness.errors(results, truth)
        record.max_rel_err = max(found.values())
        wrong = correctness.verdict(found, allowed)
        if wrong is None:
            call(0)
            # A replay allocates nothing: what the graph holds would not be seen.
            added = None if provider.run == "graph" else self.machine.peak_bytes(call)
            held = self.workload.held_bytes(running)
            record.peak_mib = None if added is None else (added + held) / 2**20
            record.saved_kib = self.workload.saved_kib(model) if provider.run == "eager" else None
        return call, wrong

    def _time(self, entrants: list[Entrant], records: list[Record]) -> None:
        calls = {entrant.provider.name: entrant.call for entrant in entrants}
        if BASE in calls:
            # The same thing under another name: how far apart the two come out is the noise.
            calls["base_again"] = calls[BASE]
            first = next(record for record in records if record.provider == BASE)
            records.insert(records.index(first) + 1, replace(first, provider="base_again"))
        times = interleaved(calls, self.machine, self.effort)
        for record in records:
            if record.provider in times:
                values = times[record.provider]
                record.runs = len(values)
                record.q20_ms, record.median_ms, record.q80_ms = (quantile(values, q) for q in (0.2, 0.5, 0.8))
        for field, provider in (("ratio_to_base", BASE), ("ratio_to_peft", EAGER_PEFT)):
            for record in records:
                if provider in times and record.provider in times:
                    setattr(record, field, paired_ratio(times[record.provider], times[provider]))
        # After the times: a profiler that has been on may slow what comes next.
        for entrant in entrants:
            launches = self.machine.launches(entrant.call)
            for record in records:
                if calls.get(record.provider) is entrant.call:
                    record.launches = launches
