"""`vblora-triton diff`: what two adapters differ in."""

from __future__ import annotations

import json
from typing import Any

from vblora_triton.commands.folders import add_adapter, add_base, run_quietly, show
from vblora_triton.commands.parsing import add_command

_DESCRIPTION = "Say what two adapters differ in: settings, tensors, and what they add to each layer's weight."

_EPILOG = """\
examples:
  vblora-triton diff out/adapter out/adapter-topk
  vblora-triton diff monday tuesday --json

The exit code is 0 whether they differ or not, with --exit-code 1 if they differ, and 2 when one cannot be read."""


def add_to(commands: Any) -> None:
    """Declare the subcommand."""
    parser = add_command(commands, "diff", run, "say what two adapters differ in", _DESCRIPTION, _EPILOG)
    add_adapter(parser, "first")
    add_adapter(parser, "second", "the other adapter")
    add_base(parser)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if they differ")


def run(options: dict[str, Any]) -> int:
    """Compare; return the exit code."""
    from vblora_triton.exchange.difference import diff_adapters, difference_lines

    report = run_quietly(diff_adapters, options["first"], options["second"], options["base"])
    show([json.dumps(report, indent=2)] if options["json"] else difference_lines(report))
    return 1 if options["exit_code"] and not report["same"] else 0
