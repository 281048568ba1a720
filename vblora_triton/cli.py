"""The command `vblora-triton`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vblora_triton import __version__
from vblora_triton.commands import check, convert, diff, finetune, inspect, merge, pack
from vblora_triton.commands.parsing import Parser
from vblora_triton.errors import InputError
from vblora_triton.hub import AdapterFileError

# In the order of --help.
_COMMANDS = (finetune, inspect, convert, merge, pack, diff, check)


def _parser() -> Parser:
    parser = Parser(prog="vblora-triton", description="VB-LoRA and VeRA with fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=Parser)
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after the command's name; sys.argv's by default.
    Returns:
        The exit code: 0, 2 where something asked for cannot be done, or 130 after Ctrl-C. argparse exits with 2 by
        itself.
    """
    # Threads that wait spin, and take the time of those that work where others use the machine too: OpenMP reads this
    # when torch is imported, which is not yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    options = vars(_parser().parse_args(arguments))
    command, run = options.pop("command"), options.pop("run")
    try:
        return run(options)
    except (InputError, AdapterFileError) as error:
        print(f"vblora-triton {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vblora-triton {command}: interrupted", file=sys.stderr)
        return 130
