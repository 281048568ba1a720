"""`vblora-triton inspect`: what is in an adapter's folder."""

from __future__ import annotations

import json
from typing import Any

from vblora_triton.commands.folders import CODES, add_adapter, add_base, run_quietly, show
from vblora_triton.commands.parsing import add_command

_DESCRIPTION = """\
Say what is in an adapter's folder: its method, base model, sizes, layers, parameters and bytes, and whether it can be
trained further; of VB-LoRA which bank vectors are selected, and how evenly."""

_EPILOG = f"""\
examples:
  vblora-triton inspect out/adapter
  vblora-triton inspect out/adapter --json | jq .values.layers
  vblora-triton inspect out/adapter --plot bank.png

{CODES}"""


def add_to(commands: Any) -> None:
    """Declare the subcommand."""
    parser = add_command(commands, "inspect", run, "say what is in an adapter's folder", _DESCRIPTION, _EPILOG)
    add_adapter(parser)
    add_base(parser)
    parser.add_argument("--json", action="store_true", help="print all of it as JSON, each layer's selections too")
    parser.add_argument(
        "--plot", metavar="FILE", help="write a picture of how often each bank vector is selected; needs matplotlib"
    )


def run(options: dict[str, Any]) -> int:
    """Inspect; return the exit code."""
    from vblora_triton.exchange.inspection import inspect_adapter, inspection_lines

    report = run_quietly(inspect_adapter, options["adapter"], options["base"], plot=options["plot"])
    show([json.dumps(report, indent=2)] if options["json"] else inspection_lines(report))
    return 0
