"""Measure a case in one direction by every provider: right first, then timed, turn by turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from bench import correctness
from bench.cases import Case
from bench.device import Call, Device
from bench.floors import Floor, Rates, must_take
from bench.providers import BASE, EAGER_PEFT, PROVIDERS, REFERENCE, Provider, UnavailableError, ours, ready
from bench.records import Record
from bench.workloads import DTYPES, Workload, sharing_copy

BASE_AGAIN = "base_again"


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `least` and at most `most` runs, within about `seconds` for each provider."""

    least: int = 5
    most: int = 100
    seconds: float = 0.5
    warm_up: int = 3

    def runs(self, one: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(one, 1e-6))))


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share q of the values does not exceed, between neighbours in proportion."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()


def paired_ratio(values: Sequence[float], against: Sequence[float]) -> float:
    """The median of the rounds' ratios: what else the device did in a round slowed both."""
    return quantile([value / other for value, other in zip(values, against, strict=True)], 0.5)


def interleaved(
    calls: dict[str, Call], device: Device, effort: Effort, prepare: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of many runs of each call, turn by turn, each round in an order of its own.

    A turn pays for what the one before it left in caches and in the allocator, so nobody is always to follow the same
    neighbour. The orders are drawn, the same ones in every run.

    Args:
        prepare: called before each run, outside its time.
    """
    slowest = 0.0
    for call in calls.values():
        for i in range(effort.warm_up):
            prepare()
            call(i)
        prepare()
        device.synchronize()
        start = time.perf_counter()
        call(0)
        device.synchronize()
        slowest = max(slowest, time.perf_counter() - start)
    names = list(calls)
    waiting: dict[str, list] = {name: [] for name in names}
    draw = random.Random(0)
    for i in range(effort.runs(slowest)):
        for name in draw.sample(names, len(names)):
            prepare()
            waiting[name].append(device.time(calls[name], i))
    device.synchronize()
    return {name: [wait() for wait in waits] for name, waits in waiting.items()}


def blank(case: Case, direction: str, provider: str) -> Record:
    """A record of a case that knows nothing yet."""
    return Record(case.suite, case.name, case.M, case.dtype, case.method, provider, direction)


@contextmanager
def noting(records: Collection[Record]) -> Iterator[None]:
    """Write what is raised inside into these records: it is a result, and the others are still to be measured."""
    try:
        yield
        return
    except UnavailableError as error:
        status, reason = "unavailable", str(error)
    except correctness.WrongError as error:
        status, reason = "wrong", str(error)
    except Exception as error:
        # Whatever a rival, a compiler or a capture may raise.
        status, reason = "failed", f"{type(error).__name__}: {error}"[:500]
    for record in records:
        record.status, record.reason = status, reason


def enter_times(record: Record, values: Sequence[float]) -> None:
    """Write the median and the quantiles of some runs into a record."""
    record.runs = len(values)
    record.q20_ms, record.median_ms, record.q80_ms = (quantile(values, q) for q in (0.2, 0.5, 0.8))


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

    def __init__(self, case: Case, direction: str, device: Device, rates: Rates, effort: Effort, base: nn.Module):
        self.case, self.direction, self.device = case, direction, device
        self.rates, self.effort, self.base = rates, effort, base
        self.workload = Workload(case, direction, device.torch_device)
        self.truth = correctness.truth_of(case, self.workload, base)
        # Plain PyTorch in the same dtypes sets what the others may be off by.
        model = self.workload.prepare(ours("reference")(case, sharing_copy(base)))
        self.eager = correctness.errors(self.workload.results(model), self.truth)

    def run(self, providers: Sequence[Provider] = PROVIDERS) -> list[Record]:
        """One record for each provider that takes part, and one more for the base timed again."""
        records: dict[str, Record] = {}
        calls: dict[str, Call] = {}
        for provider in providers:
            if not provider.takes_part(self.case, self.direction):
                continue
            record = records[provider.name] = blank(self.case, self.direction, provider.name)
            least = floor(self.case, self.direction, provider.name, self.rates)
            record.operations, record.bytes_moved, record.floor_ms = least.operations, least.bytes, least.seconds * 1e3
            with noting([record]):
                calls[provider.name] = self._judged(provider, record)
                if provider.name == BASE:
                    # The same thing under another name: how far apart the two come out is the noise.
                    calls[BASE_AGAIN], records[BASE_AGAIN] = calls[BASE], replace(record, provider=BASE_AGAIN)
        self._time(calls, records)
        return list(records.values())

    def _judged(self, provider: Provider, record: Record) -> Call:
        """Make what is to be timed, and count what it holds.

        Raises:
            WrongError: it computes something else.
        """
        model = self.workload.prepare(provider.adapt(self.case, sharing_copy(self.base)))
        running = ready(provider, model, self.device)
        call = self.workload.call(running)
        if provider.run == "graph":
            call = self.device.in_graph(call)
            results = call(0)
        else:
            results = self.workload.results(running)
        # A graph writes its next results where these are.
        results = {name: t.detach().clone() for name, t in results.items()}
        truth = self.truth
        if not provider.same_function:
            truth = correctness.truth_of(self.case, self.workload, self.base, provider.adapt)
        if provider.same_function and provider.name != REFERENCE:
            allowed = correctness.limits(self.case, self.eager, provider.run == "autocast")
        else:
            allowed = dict.fromkeys(truth, correctness.eager_limit(self.case))
        found = correctness.errors(results, truth)
        record.max_rel_err = max(found.values())
        correctness.check(found, allowed)
        call(0)
        # A replay allocates nothing: what the graph holds would not be seen.
        added = None if provider.run == "graph" else self.device.peak_bytes(call)
        record.peak_mib = None if added is None else (added + self.workload.held_bytes(running)) / 2**20
        record.saved_kib = self.workload.saved_kib(model) if provider.run == "eager" else None
        return call

    def _time(self, calls: dict[str, Call], records: dict[str, Record]) -> None:
        times = interleaved(calls, self.device, self.effort)
        for name, values in times.items():
            enter_times(records[name], values)
            for field, rival in (("ratio_to_base", BASE), ("ratio_to_peft", EAGER_PEFT)):
                if rival in times:
                    setattr(records[name], field, paired_ratio(values, times[rival]))
        # After the times: a profiler that has been on may slow what comes next.
        for name, call in calls.items():
            records[name].launches = records[BASE].launches if name == BASE_AGAIN else self.device.launches(call)
