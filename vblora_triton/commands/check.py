"""`vblora-triton check`: whether results can be trusted on this machine."""

from __future__ import annotations

import json
from typing import Any

from vblora_triton import __version__
from vblora_triton.commands.folders import run_quietly, show
from vblora_triton.commands.parsing import add_command

_DESCRIPTION = """\
Compare each op, its result and its gradients, with its definition in float64, on this machine, on a handful of shapes
in each dtype, and say in one line whether fused results can be trusted here. It takes less than a minute."""

_EPILOG = """\
examples:
  vblora-triton check
  vblora-triton check --json > check.json

The exit code is 0 when every comparison passes, 1 when one fails, and 2 when what was asked for cannot run here.
Without a GPU no kernels run, and PyTorch, which takes their place, is compared."""


def add_to(commands: Any) -> None:
    """Declare the subcommand."""
    parser = add_command(commands, "check", run, "say whether results can be trusted here", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--backend",
        choices=["auto", "triton", "cpu"],
        default="auto",
        help="triton: the kernels; cpu: PyTorch with gradients written out; auto: what runs here (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print every comparison as JSON")


def run(options: dict[str, Any]) -> int:
    """Check; return the exit code."""
    from vblora_triton.exchange.checking import check_kernels

    check = run_quietly(check_kernels, options["backend"])
    versions = {"vblora-triton": __version__} | check.versions
    if options["json"]:
        rows = [c._asdict() | {"shape": c.shape._asdict(), "passed": c.passed} for c in check.comparisons]
        report = check._asdict() | {"versions": versions, "comparisons": rows, "passed": check.passed}
        show([json.dumps(report, indent=2)])
        return 0 if check.passed else 1
    failed = [c for c in check.comparisons if not c.passed]
    lines = [
        f"device: {check.device}, backend {check.backend}",
        f"versions: {', '.join(f'{name} {number}' for name, number in versions.items())}",
    ]
    for op, dtype in dict.fromkeys((c.op, c.dtype) for c in check.comparisons):
        own = [c for c in check.comparisons if (c.op, c.dtype) == (op, dtype)]
        wrong = [c for c in own if not c.passed]
        worst = max(own, key=lambda c: c.error / c.allowed if c.passed else float("inf"))
        says = f"error {worst.error:.1e}, allowed {worst.allowed:.1e}" if worst.problem is None else worst.problem
        state = f"WRONG in {len(wrong)} of {len(own)} shapes" if wrong else f"right in {len(own)} shapes"
        lines.append(f"  {op:<14} {dtype:<9} {state}: {says}")
    total = f"{len(check.comparisons) - len(failed)} of {len(check.comparisons)} comparisons in {check.seconds:.0f} s"
    what = "Fused results" if check.backend == "triton" else "No kernels run here; the results of PyTorch, instead,"
    lines.append(f"{what} {'cannot' if failed else 'can'} be trusted here: {total} agree with float64.")
    show(lines)
    return 1 if failed else 0
