"""Measure this package beside PEFT and the frozen base alone: `python -m bench`, or `make bench`.

Without a GPU it compares both on the CPU, and runs the kernels under Triton's interpreter. Exits 1 where something of
ours is wrong or fails, 2 where the options are.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import concatenation, cpu
from bench.cases import SUITES, full, quick, tiny
from bench.device import Cpu, Cuda, Device
from bench.environment import environment
from bench.floors import H200, Rates, table
from bench.providers import PROVIDERS, Provider
from bench.records import Results, check_writable, problems
from bench.runner import Effort
from bench.suites import Work, measure, work_of
from bench.table import progress, show, show_floors, show_ratios


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    made.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; all by default")
    made.add_argument("--quick", action="store_true", help="few cases, short, nothing compiled: under 2 minutes")
    made.add_argument("--list", action="store_true", help="print the cases that would run here, and the providers")
    made.add_argument("--filter", default="", help="of the ids, those that contain this, or match it with * and ?")
    made.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and the base and PEFT's for ratios")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results here, after each case")
    made.add_argument("--plot", type=Path, metavar="DIR", help="write pictures here")
    made.add_argument("--seconds", type=float, help="of runs for each provider of a case (default 0.2)")
    made.add_argument("--minutes", type=float, help="begin nothing new after this")
    made.add_argument("--commit", help="the commit, where the checkout has no history")
    made.add_argument("--floors", action="store_true", help="print what plans of kernels cost, computed for an H200")
    made.add_argument(
        "--concatenation", action="store_true", help="an experiment: base and VeRA's update as one product"
    )
    made.add_argument("--rehearse", action="store_true", help="run all of it on tiny sizes on the CPU")
    return made


def wanted(pattern: str) -> Callable[[str], bool]:
    """Whether an id contains the pattern, or matches it as a whole."""
    return lambda identifier: pattern in identifier or fnmatch.fnmatch(identifier, pattern)


def chosen(options: argparse.Namespace) -> tuple[list[Work], list[Provider], str]:
    """What the options ask for that can run here, by whom, and what stands before the ids.

    Raises:
        ValueError: a name is unknown, or nothing is left.
    """
    names = {provider.name for provider in PROVIDERS}
    for kind, given, known in (("suite", options.suites, SUITES), ("provider", options.providers or [], names)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"unknown {kind} {', '.join(map(repr, unknown))}; there are {', '.join(sorted(known))}")
    suites = options.suites or SUITES
    if options.rehearse or torch.cuda.is_available():
        source = tiny if options.rehearse else quick if options.quick else full
        cases = [case for suite in SUITES if suite in suites for case in source(suite)]
        keep = {"base", "peft", *(options.providers or names)}
        providers = [p for p in PROVIDERS if p.name in keep and not (options.quick and p.run == "compiled")]
        work, prefix = work_of(cases, wanted(options.filter)), ""
    else:
        providers, prefix = list(cpu.COMPARED), cpu.PREFIX
        work = cpu.work_on_cpu(wanted(options.filter), suites)
    if not work:
        asked = " ".join([*options.suites, *(["--filter", repr(options.filter)] if options.filter else [])])
        raise ValueError(f"no case that runs here matches {asked or 'these options'}; --list prints those that do")
    return work, providers, prefix


def check_outputs(options: argparse.Namespace) -> None:
    """See, before anything is measured, that what is to be written can be.

    Raises:
        ValueError: it cannot.
    """
    try:
        if options.json is not None:
            check_writable(options.json)
        if options.plot is not None:
            options.plot.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write: {error}") from error
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot wants matplotlib, which is not installed: pip install matplotlib, or leave it out")


def header(device_name: str | None, rates: Rates | None, commit: str | None) -> dict[str, Any]:
    """What a result was measured on."""
    found = environment(commit)
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    found["machine"] = device_name or f"{found['cpu']}, {threads}"
    if rates is not None:
        found["copy_gb_s"] = rates.copy * 1e-9
        found["matmul_tflop_s"] = rates.matmul * 1e-12
        found["matmul_fp32_tflop_s"] = rates.matmul_fp32 * 1e-12
    return found


def run_suites(
    options: argparse.Namespace, work: list[Work], providers: list[Provider], device: Device, effort: Effort
) -> int:
    """Measure what was chosen; print each case as it comes, and keep the file up to date. Return the exit status."""
    rates = device.rates()
    print(
        f"{device.name}: copy {rates.copy * 1e-9:,.0f} GB/s, bf16 products {rates.matmul * 1e-12:,.1f} TFLOP/s, "
        f"float32 {rates.matmul_fp32 * 1e-12:,.1f}",
        flush=True,
    )
    results = Results(header(device.name, rates, options.commit), options.json)
    start = time.monotonic()
    with progress(len(work)) as step:
        for i, entry in enumerate(work):
            if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
                print(f"{len(work) - i} of {len(work)} cases were not begun: the time is up.", flush=True)
                break
            step(entry[0].id(entry[1]))
            for _, records in measure([entry], device, rates, effort, providers):
                results.add(records)
                show(records)
    return finish(options, results)


def run_on_cpu(options: argparse.Namespace, work: list[Work]) -> int:
    """What is left to do without a GPU: ratios to PEFT, and the kernels under the interpreter."""
    print("There is no GPU here: the GPU suites (layer, block, decode, model, load) were skipped.")
    unused = [name for name in ("providers", "seconds", "minutes") if getattr(options, name) is not None]
    if unused:
        print(f"Without a GPU these do not apply: {', '.join('--' + name for name in unused)}.")
    results = Results(header(None, None, options.commit), options.json)
    print(f"On {results.header['machine']}:")
    print("ours with backend \"auto\", PEFT's layers, and PEFT's patched by this package,")
    print("turn by turn; a ratio to PEFT's below 1 means that ours is faster.", flush=True)
    effort = Effort(least=9, most=20, seconds=0.3) if options.quick else Effort(least=20, most=500, seconds=1.0)
    with progress(len(work)) as step:
        for records in cpu.compare(effort, work):
            step(records[0].id().rpartition("/")[0])
            results.add(records)
    show_ratios(results.records)
    print("\nThe kernels under Triton's interpreter, outputs and gradients against float64:", flush=True)
    code = cpu.with_interpreter("bench.cpu")
    return finish(options, results) or code


def run_concatenation(rehearse: bool) -> int:
    """Time the experiment on a GPU, or rehearse it. Return 2 where there is none."""
    if rehearse:
        rows = concatenation.compare(Cpu(), ["tiny"], (20, 80), (16,))
    elif torch.cuda.is_available():
        linears = ("llama2_7b_q", "llama2_7b_gate", "llama2_7b_down")
        rows = concatenation.compare(Cuda(), linears, (256, 4096), (256, 1024))
    else:
        print("bench: --concatenation wants a GPU, or --rehearse", file=sys.stderr)
        return 2
    concatenation.show(rows)
    return 0


def finish(options: argparse.Namespace, results: Results) -> int:
    """Draw what is to be drawn. Return 1 where something of ours is wrong or failed, having said what; else 0."""
    if options.plot is not None:
        from bench.plot import plot

        for path in plot(results.header, results.records, options.plot):
            print(path)
    bad = problems(results.records)
    for line in bad:
        print(f"bench: {line}", file=sys.stderr)
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.floors:
        show_floors(table(H200))
        return 0
    if options.concatenation:
        return run_concatenation(options.rehearse)
    try:
        work, providers, prefix = chosen(options)
        if not options.list:
            check_outputs(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.list:
        for case, direction in work:
            print(prefix + case.id(direction))
        print("\nproviders: " + ", ".join(provider.name for provider in providers))
        return 0
    if options.rehearse:
        if os.environ.get("TRITON_INTERPRET") != "1":
            return cpu.with_interpreter("bench", *(sys.argv[1:] if arguments is None else arguments))
        return run_suites(options, work, providers, Cpu(), cpu.ONCE)
    if not torch.cuda.is_available():
        return run_on_cpu(options, work)
    seconds = 0.2 if options.seconds is None else options.seconds
    return run_suites(options, work, providers, Cuda(), Effort(seconds=seconds / 2 if options.quick else seconds))


if __name__ == "__main__":
    raise SystemExit(main())
