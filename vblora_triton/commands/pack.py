"""`vblora-triton pack`: adapters in their small form."""

from __future__ import annotations

from typing import Any

from vblora_triton.commands.folders import CODES, add_adapter, add_base, run_quietly, show
from vblora_triton.commands.parsing import add_command

_DESCRIPTION = """\
Write an adapter in its small form: VB-LoRA's with the selected bank vectors and their weights in place of all logits,
to use and to merge, not to train further; VeRA's without the projections, which are drawn again."""

_EPILOG = f"""\
examples:
  vblora-triton pack out/adapter out/adapter-small

{CODES}"""


def add_to(commands: Any) -> None:
    """Declare the subcommand."""
    parser = add_command(commands, "pack", run, "write an adapter in its small form", _DESCRIPTION, _EPILOG)
    add_adapter(parser)
    parser.add_argument("output", metavar="OUT", help="the folder to write, which must be new")
    add_base(parser)


def run(options: dict[str, Any]) -> int:
    """Pack; return the exit code."""
    from vblora_triton.exchange.pack import pack_adapter

    done = run_quietly(pack_adapter, options["adapter"], options["output"], options["base"])
    part = 100 * done.bytes_after / done.bytes_before
    show([f"{done.folder}: {done.form}, {done.bytes_after:,d} bytes ({part:.3g} % of {done.bytes_before:,d})"])
    return 0
