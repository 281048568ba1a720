"""The text of the kernels: their functions, the sides of an `if`, and what comments declare.

A comment at the end of a line declares what a kernel's source does not say:

    for match in range(0, found):  # trips: cdiv(2 * R, H)
    a = mix(...)  # (COPIES * R_PAD, BLOCK_K); l2: bytes / COPIES

`trips` is for a loop whose count hangs on what is in memory; `l2` says how many bytes L2 moves where lanes of one warp
ask for the same ones and L1 answers, for every load and store of the line and of what it calls. Expressions are over
what is known there (program.py), the arguments of the kernel, cdiv, min, max, and for `l2` the bytes of one warp.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path
from typing import Any

Place = tuple[str, int]  # name of a file, number of a line


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


class UndeclaredError(ValueError):
    """A kernel does something that its source does not say and no comment declares, or declares wrongly."""


@functools.cache
def lines(path: str) -> list[str]:
    """The lines of a source file, each without its newline."""
    return Path(path).read_text(encoding="utf-8").splitlines()


@functools.cache
def definitions(path: str) -> dict[str, ast.FunctionDef]:
    """The functions of a source file, by name."""
    tree = ast.parse("\n".join(lines(path)))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def comment(path: str, first: int, last: int, kind: str) -> str | None:
    """What the comment `kind: ...` at the end of one of these lines says."""
    for text in lines(path)[first - 1 : last]:
        if match := re.search(rf"#(?:.*;)?\s*{kind}:\s*(.+)$", text):
            return match[1]
    return None


def evaluate(expression: str, names: dict[str, Any]) -> Any:
    """An expression of a comment.

    Raises:
        UndeclaredError: it cannot be computed from these names.
    """
    try:
        return eval(expression, {"__builtins__": {}}, {"cdiv": cdiv, "min": min, "max": max} | names)
    except (NameError, TypeError, SyntaxError, ZeroDivisionError) as error:
        raise UndeclaredError(f"{expression!r} cannot be computed: {error}") from error


def file_of(kernel: Any, place: Place) -> str | None:
    """The source file of a place, which is the kernel's own or beside it; None of what the compiler brings along."""
    own = inspect.getsourcefile(kernel.fn)
    path = Path(own or "").parent / place[0]
    return str(path) if path.exists() else None


def text(kernel: Any, place: Place | None) -> str:
    """The text of the line at a place."""
    path = file_of(kernel, place) if place else None
    return lines(path)[place[1] - 1].strip() if path and place else ""


def sides(kernel: Any, place: Place) -> tuple[range, range]:
    """The lines of either side of the `if` at a place."""
    path = file_of(kernel, place)
    for function in definitions(path).values() if path else ():
        for node in ast.walk(function):
            if isinstance(node, ast.If) and node.lineno == place[1]:
                return _span(node.body), _span(node.orelse)
    return range(0), range(0)


def _span(statements: list[ast.stmt]) -> range:
    return range(statements[0].lineno, (statements[-1].end_lineno or 0) + 1) if statements else range(0)
