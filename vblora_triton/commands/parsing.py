"""What the subcommands' options have in common: how they are declared, and the types of their values."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from vblora_triton.errors import InputError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it.

    Where it has an option --config, that names a file with more options, which come before all others.
    """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args is not None and "--config" in self._option_string_actions:
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
            finder.add_argument("--config")
            # What is wrong with the option itself is said below.
            with suppress(argparse.ArgumentError):
                path = finder.parse_known_args(args)[0].config
                try:
                    args = [*(options_in(path) if path else ()), *args]
                except InputError as error:
                    self.error(str(error))
        return super().parse_known_args(args, namespace)


def options_in(path: str) -> list[str]:
    """Return the options that a file holds, as a command line: YAML, or where its name ends in .json JSON.

    A list gives an option's several values; true an option that takes none; false and null leave it out.

    Raises:
        InputError: the file cannot be read, or is no mapping from options to such values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except Exception as error:  # of two parsers and the file system
        raise InputError(f"--config {path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"--config {path} holds no mapping of options to values, such as `steps: 500`.")
    arguments = []
    for name, value in content.items():
        option = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        if option == "--config" or not all(isinstance(v, (str, int, float)) or v is None for v in values):
            raise InputError(f"--config {path}: {name!r} is {value!r}; give a value, or a list of values.")
        if isinstance(value, list):
            arguments += [option, *map(str, value)]
        elif value is True:
            arguments += [option]
        elif value is not None and value is not False:
            arguments += [f"{option}={value}"]
    return arguments


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
