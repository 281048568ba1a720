"""What the subcommands' options have in common: how they are declared, and the types of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def add_command(
    commands: Any, name: str, run: Callable[[dict[str, Any]], int], help: str, description: str, epilog: str
) -> Parser:
    """Add a subcommand and return its parser.

    Args:
        commands: what argparse's add_subparsers returned.
        run: called with the options, by name; returns the exit code.
        help: a line in the list of commands.
        description, epilog: before and after the options in its --help, laid out as they are.
    """
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return a type for argparse: a whole number in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            wanted = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {wanted}")
        return value

    return parse


def rate(text: str) -> float:
    """Parse a number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 1e-3")
    return value
