"""What a program of a launch does, followed through the source of its kernel: iterations, branches, tensors.

Machine code does not say how often a loop runs; the source does, given the arguments of the launch and the number of
the program. So the scalars of a kernel are computed here as the program computes them, its pointers are followed by the
name of their tensor, and whatever comes out of memory is unknown: comments declare what hangs on that (source.py).
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tools.forecast.source import Place, UndeclaredError, cdiv, comment, definitions, evaluate


@dataclass(frozen=True)
class _Pointer:
    """A pointer into the tensor of this argument, or a block of them."""

    name: str


_UNKNOWN = object()


class _Value(NamedTuple):
    """A value, and whether it is only known when the kernel runs."""

    value: Any
    runtime: bool


@dataclass
class Found:
    """What a program does, by the place in the source; lists are in the order of the source.

    trips: of each loop; None where nothing says.
    conditions: whether each `if` holds that is decided when the kernel runs; None where nothing says.
    tensors: the arguments that a load or store may touch.
    l2: what a comment says of a load or store, and over which names.
    """

    trips: dict[Place, list[int | None]] = field(default_factory=dict)
    conditions: dict[Place, list[bool | None]] = field(default_factory=dict)
    tensors: dict[Place, set[str]] = field(default_factory=dict)
    l2: dict[Place, tuple[str, dict[str, Any]]] = field(default_factory=dict)


def follow(kernel: Any, grid: Sequence[int], arguments: dict[str, Any], program: Sequence[int]) -> Found:
    """Follow one program of a launch through its kernel.

    Args:
        kernel: what `launch` was given.
        program: its number in each dimension of the grid.
    Raises:
        UndeclaredError: a comment declares what cannot be, or other than what the source says.
    """
    walker = _Walker(kernel, grid, arguments, program)
    values = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            values[name] = _Value(_Pointer(name), True)
        else:
            # Triton makes a constant of an integer that is 1.
            constant = value is None or isinstance(value, str | bool) or (isinstance(value, int) and value == 1)
            values[name] = _Value(value, not constant)
    walker.call(kernel.fn, values)
    return walker.found


_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
# Functions of triton that scalars are computed with, by the last part of their name.
_FUNCTIONS: dict[str, Any] = {
    "cdiv": cdiv,
    "minimum": min,
    "maximum": max,
    "min": min,
    "max": max,
    "next_power_of_2": triton.next_power_of_2,
    "where": lambda condition, yes, no: yes if condition else no,
    "cast": lambda value, dtype: value,
}
_ACCESSES = ("load", "store", "atomic_add", "atomic_xchg", "atomic_cas")


class _Walker:
    """Walks through the source of a kernel, and of what it calls, once."""

    def __init__(self, kernel: Any, grid: Sequence[int], arguments: dict[str, Any], program: Sequence[int]) -> None:
        self.kernel, self.grid, self.program = kernel.fn.__name__, grid, program
        self.constants = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        self.found = Found()
        self.l2: tuple[str, dict[str, Any]] | None = None

    def call(self, function: Any, values: dict[str, _Value]) -> _Value:
        """Walk through a function with these arguments; return what it returns."""
        path = inspect.getsourcefile(function)
        assert path is not None
        definition = definitions(path)[function.__name__]
        scope, parameters = {}, inspect.signature(function).parameters
        for argument in definition.args.args:
            default = parameters[argument.arg].default
            absent = _Value(_UNKNOWN, True) if default is inspect.Parameter.empty else _Value(default, False)
            value = values.get(argument.arg, absent)
            constant = argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation)
            scope[argument.arg] = _Value(value.value, value.runtime and not constant)
        return _Frame(self, path, function.__globals__, scope).run(definition.body)

    def names(self, scope: dict[str, _Value]) -> dict[str, Any]:
        """What an expression of a comment may use."""
        known = {
            name: value.value
            for name, value in scope.items()
            if value.value is not _UNKNOWN and not isinstance(value.value, _Pointer)
        }
        return self.constants | known


class _Frame:
    """One call of a function."""

    def __init__(self, walker: _Walker, path: str, outer: dict[str, Any], scope: dict[str, _Value]) -> None:
        self.walker, self.path, self.outer, self.scope = walker, path, outer, scope
        self.returned: _Value | None = None

    def run(self, body: list[ast.stmt]) -> _Value:
        """Walk through the body; return what it returns."""
        self.block(body)
        return self.returned or _Value(None, False)

    def place(self, node: Any) -> Place:
        """Where a node stands, as the compiler names it."""
        return Path(self.path).name, node.lineno

    def block(self, body: list[ast.stmt]) -> bool:
        """Walk through statements; say whether the function returns there."""
        return any(self.statement(node) for node in body)

    def statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return self.branch(node)
        if isinstance(node, ast.For | ast.While):
            self.loop(node)
            return False
        outer_l2 = self.walker.l2
        if said := comment(self.path, node.lineno, node.end_lineno or node.lineno, "l2"):
            self.walker.l2 = said, self.walker.names(self.scope)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, self.value(node.value))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, _Value(self.value(node.value).value, False))
        elif isinstance(node, ast.AugAssign):
            right = self.value(node.value)
            self.assign(node.target, _apply(_OPERATORS.get(type(node.op)), self.value(node.target), right))
        elif isinstance(node, ast.Expr):
            self.value(node.value)
        elif isinstance(node, ast.Return):
            value = _Value(None, False) if node.value is None else self.value(node.value)
            # The first one that is reached; what comes behind one that is not certain, is not certain.
            self.returned = value if self.returned is None else _Value(_UNKNOWN, True)
        self.walker.l2 = outer_l2
        return isinstance(node, ast.Return)

    def assign(self, target: ast.expr, value: _Value) -> None:
        if isinstance(target, ast.Name):
            self.scope[target.id] = value
        elif isinstance(target, ast.Tuple):
            parts = value.value
            fits = isinstance(parts, tuple) and len(parts) == len(target.elts)
            for i, part in enumerate(target.elts):
                self.assign(part, parts[i] if fits else _Value(_UNKNOWN, value.runtime))

    def branch(self, node: ast.If) -> bool:
        """Both sides are in the code where the condition is the kernel's; else the compiler leaves one out."""
        test = self.value(node.test)
        known = test.value is not _UNKNOWN and not isinstance(test.value, _Pointer)
        if known and not test.runtime:
            return self.block(node.body if test.value else node.orelse)
        if test.runtime:
            self.walker.found.conditions.setdefault(self.place(node), []).append(bool(test.value) if known else None)
        before, scopes, returned = self.scope, [], []
        for body in (node.body, node.orelse):
            self.scope = dict(before)
            returned.append(self.block(body))
            scopes.append(self.scope)
        if known:
            self.scope = scopes[0 if test.value else 1]
        else:
            self.scope = {
                name: value if scopes[1][name].value == value.value else _Value(_UNKNOWN, True)
                for name, value in scopes[0].items()
                if name in scopes[1]
            }
        return all(returned)

    def loop(self, node: ast.For | ast.While) -> None:
        trips, first, step, unrolled = self.count(node)
        carried = {n.id for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name) and _stores(n)}
        for name in carried & self.scope.keys():
            if not isinstance(self.scope[name].value, _Pointer):
                self.scope[name] = _Value(_UNKNOWN, True)
        if unrolled and trips is not None:
            for i in range(trips):
                self.iteration(node, _Value(first + i * step, False))
            return
        self.walker.found.trips.setdefault(self.place(node), []).append(trips)
        # One in the middle stands for all.
        middle = _UNKNOWN if trips is None or first is None else first + trips // 2 * step
        self.iteration(node, _Value(middle, True))

    def iteration(self, node: ast.For | ast.While, variable: _Value) -> None:
        if isinstance(node, ast.For):
            self.assign(node.target, variable)
        self.block(node.body)

    def count(self, node: ast.For | ast.While) -> tuple[int | None, Any, Any, bool]:
        """Iterations of a loop, the first value of its variable, its step, and whether the compiler unrolls it."""
        found: tuple[int | None, Any, Any, bool] = (None, None, None, False)
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
            bounds = [self.value(argument).value for argument in node.iter.args]
            start, stop, step = [[0], [], []][len(bounds) > 1] + bounds + [1] * (len(bounds) < 3)
            unrolled = ast.unparse(node.iter.func).endswith("static_range")
            if all(isinstance(bound, int) for bound in (start, stop, step)):
                found = max(0, cdiv(stop - start, step)), start, step, unrolled
        said = comment(self.path, node.lineno, node.body[0].lineno - 1, "trips")
        if said is not None:
            found = (self.declared(node, said, found[0]), *found[1:])
        return found

    def declared(self, node: ast.stmt, said: str, counted: int | None) -> int:
        """The iterations that a comment declares.

        Raises:
            UndeclaredError: it is not a number of iterations, or not the one that the source says.
        """
        file, number = self.place(node)
        where = f"{self.walker.kernel}: the loop at {file}:{number} declares `trips: {said}`"
        try:
            trips = evaluate(said, self.walker.names(self.scope))
        except UndeclaredError as error:
            raise UndeclaredError(f"{where}, but {error}.") from error
        if not isinstance(trips, int) or trips < 0:
            raise UndeclaredError(f"{where}, which is {trips!r}: no number of iterations.")
        if counted is not None and counted != trips:
            raise UndeclaredError(f"{where}, which is {trips}, but the source says {counted}: leave the comment away.")
        return trips

    def value(self, node: ast.expr) -> _Value:
        """Compute an expression, as far as it does not come out of memory."""
        if isinstance(node, ast.Constant):
            return _Value(node.value, False)
        if isinstance(node, ast.Name):
            return self.scope.get(node.id) or _Value(
                self.outer.get(node.id, getattr(builtins, node.id, _UNKNOWN)), False
            )
        if isinstance(node, ast.Call):
            return self.called(node)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Tuple):
            parts = tuple(self.value(part) for part in node.elts)
            return _Value(parts, any(part.runtime for part in parts))
        if isinstance(node, ast.IfExp):
            test, yes, no = (self.value(part) for part in (node.test, node.body, node.orelse))
            if test.value is _UNKNOWN:
                return _Value(_UNKNOWN, test.runtime or yes.runtime or no.runtime)
            return yes if test.value else no
        parts = [self.value(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return _apply(_OPERATORS.get(type(node.ops[0])), *parts)
        if isinstance(node, ast.BinOp | ast.UnaryOp):
            return _apply(_OPERATORS.get(type(node.op)), *parts)
        if isinstance(node, ast.BoolOp):
            return _apply(all_of if isinstance(node.op, ast.And) else any_of, *parts)
        # A block of pointers stays one, however it is turned.
        return parts[0] if isinstance(node, ast.Subscript) and _is_pointer(parts[0]) else _Value(_UNKNOWN, True)

    def attribute(self, node: ast.Attribute) -> _Value:
        of = self.value(node.value)
        if node.attr in ("dtype", "shape", "element_ty"):
            return _Value(_UNKNOWN, False)
        if of.value is _UNKNOWN or isinstance(of.value, _Pointer | int | float):
            return _Value(_UNKNOWN, of.runtime)
        return _Value(getattr(of.value, node.attr, _UNKNOWN), of.runtime)

    def called(self, node: ast.Call) -> _Value:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        values = [self.value(argument) for argument in node.args]
        keywords = {keyword.arg or "": self.value(keyword.value) for keyword in node.keywords}
        function = self.value(node.func).value
        # A kernel's own helper, and not one of triton's library.
        if hasattr(function, "fn") and not function.fn.__module__.startswith("triton."):
            names = inspect.signature(function.fn).parameters
            return self.walker.call(function.fn, dict(zip(names, values, strict=False)) | keywords)
        if name in ("program_id", "num_programs"):
            axis = values[0].value if values else keywords["axis"].value
            return _Value((self.walker.program if name == "program_id" else self.walker.grid)[axis], True)
        of = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else _Value(_UNKNOWN, False)
        if name in _ACCESSES:
            self.access(node, of if isinstance(of.value, _Pointer) else values[0])
            return _Value(_UNKNOWN, True)
        if name == "to" and of.value is not tl:
            return of
        if name in _FUNCTIONS:
            return _apply(_FUNCTIONS[name], *values, *keywords.values())
        # What is made of a pointer, such as a descriptor, points to the same tensor.
        return next((v for v in (of, *values, *keywords.values()) if _is_pointer(v)), _Value(_UNKNOWN, True))

    def access(self, node: ast.Call, pointer: _Value) -> None:
        if isinstance(pointer.value, _Pointer):
            self.walker.found.tensors.setdefault(self.place(node), set()).add(pointer.value.name)
            if self.walker.l2 is not None:
                self.walker.found.l2[self.place(node)] = self.walker.l2


def all_of(*values: Any) -> bool:
    return all(values)


def any_of(*values: Any) -> bool:
    return any(values)


def _stores(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _is_pointer(value: _Value) -> bool:
    return isinstance(value.value, _Pointer)


def _apply(function: Any, *values: _Value) -> _Value:
    """A function of known values; of a pointer, the pointer."""
    runtime = any(value.runtime for value in values)
    compares = function in (operator.is_, operator.is_not, operator.eq, operator.ne)
    if compares and any(value.value is None for value in values):
        # Whether there is a tensor is known when the kernel is compiled.
        same = values[0].value is values[1].value
        return _Value(same == (function in (operator.is_, operator.eq)), False)
    pointer = next((value for value in values if _is_pointer(value)), None)
    if pointer is not None:
        return _Value(_UNKNOWN, runtime) if compares else pointer
    if function is None or any(value.value is _UNKNOWN for value in values):
        return _Value(_UNKNOWN, runtime)
    try:
        return _Value(function(*(value.value for value in values)), runtime)
    except (TypeError, ValueError, ZeroDivisionError):
        return _Value(_UNKNOWN, runtime)
