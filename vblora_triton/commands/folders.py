"""What the subcommands that look into adapters' folders share: their arguments, and errors in one line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vblora_triton.commands.parsing import Parser
from vblora_triton.errors import InputError

CODES = "The exit code is 0, or 2 when something asked for cannot be done (nothing is written)."


def add_adapter(parser: Parser, name: str = "adapter", help: str = "") -> None:
    """Add an adapter's folder as an argument."""
    parser.add_argument(name, metavar=name.upper(), help=help or "folder of a saved adapter, or its id on the Hub")


def add_base(parser: Parser) -> None:
    """Add --base, of which the configuration alone is read."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model, a folder or a hub id, to check the adapter against; only its configuration is read "
        "(default: what the adapter names, if it is on this machine)",
    )


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn what can go wrong with files into an InputError, and warnings into notes, a line each, when all went well.

    Raises:
        InputError: for every ValueError, OSError or missing package in the block.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield
    except (ValueError, OSError, SafetensorError, ImportError) as error:
        raise InputError(_first_lines(error)) from error
    finally:
        logging.set_verbosity(verbosity)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"note: {' '.join(message.split())}", file=sys.stderr)


def show(lines: list[str]) -> None:
    """Print lines; a pipe that nobody reads any more is no error."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Python would complain again when it closes the stream.
        sys.stdout = None


def run_quietly(work: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function in `in_one_line`."""
    with in_one_line():
        return work(*arguments, **options)


def _first_lines(error: BaseException) -> str:
    # PyTorch adds its own stack below a message.
    return str(error).partition("\nException raised from")[0] or type(error).__name__
