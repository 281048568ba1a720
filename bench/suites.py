"""Work through a list of cases, each base made once, whatever any of them does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bench.cases import DIRECTIONS, Case
from bench.device import Device
from bench.files import measure_files
from bench.floors import Rates
from bench.providers import PROVIDERS, Provider
from bench.records import Record
from bench.runner import Effort, Measurement, blank, noting
from bench.workloads import make_base

Work = tuple[Case, str]


def work_of(cases: Sequence[Case], wanted: Callable[[str], bool]) -> list[Work]:
    """The cases in their directions, those that are wanted by their id. Files are saved and loaded in one go."""
    found = []
    for case in cases:
        if case.suite == "load":
            found += [(case, "files")] if any(wanted(case.id(d)) for d in ("files", *DIRECTIONS["load"])) else []
            continue
        found += [(case, direction) for direction in case.directions() if wanted(case.id(direction))]
    return found


def measure(
    work: Sequence[Work],
    device: Device,
    rates: Rates,
    effort: Effort,
    providers: Sequence[Provider] = PROVIDERS,
) -> Iterator[tuple[Work, list[Record]]]:
    """Yield the records of each piece of work as soon as it is done."""
    kept: tuple[tuple[str, str, str], nn.Module] | None = None
    for case, direction in work:
        key = (case.suite, case.shape, case.dtype)
        records = [blank(case, direction, "all")]
        # The device's memory may have run out, say; the next case may be smaller.
        with noting(records):
            if kept is None or kept[0] != key:
                kept = None
                gc.collect()
                kept = (key, make_base(case, device.torch_device))
            if case.suite == "load":
                records = measure_files(case, device, effort, kept[1])
            else:
                records = Measurement(case, direction, device, rates, effort, kept[1]).run(providers)
        yield (case, direction), records
        # What was compiled holds models; collecting first would leave them.
        torch._dynamo.reset()
        gc.collect()
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()
