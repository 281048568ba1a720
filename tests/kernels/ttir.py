"""Triton's own code of a kernel, read as text: what addresses are computed from, and where memory is read and written.

Integers are followed as intervals, from the very arguments of a launch: a 32-bit sum or product that leaves 32 bits is
found without a tensor of such a size.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

Interval = tuple[int, int]
# Of integers that come from memory or are the largest of some (indices of bank vectors, rows of logits), whatever bits
# they are put together from; and of what is not followed.
UNKNOWN = (0, 2**20)
DATA = ("tt.load", "tt.reduce")
# `%a#1` is the second of the values of `%a:2`.
NAME = re.compile(r"%[\w.]+(?:#\d+)?")
# `%a, %b = op operands : types`, also with the number of results: `%a:2 = ...`
ASSIGNMENT = re.compile(r'(%[\w.]+)(?::(\d+))? = "?([a-z_]+\.[\w.]+)"?(.*)')
LOOP = re.compile(r"(%[\w.]+) = (%[\w.]+) to (%[\w.]+) step (%[\w.]+)")
CARRIED = re.compile(r"iter_args\((.*?)\) ->")
WIDTH = re.compile(r"i(\d+)>?\s*$")


@dataclass
class Op:
    """One operation: `text` is what stands after its name; of a region, `body` is what is inside."""

    name: str
    results: list[str]
    operands: list[str]
    text: str
    body: list[Op] = field(default_factory=list)


def parse(ttir: str) -> Op:
    """The kernel as an operation whose body is its code; functions are inlined in what is given."""
    root = Op("module", [], [], "")
    regions, scopes = [root], [{}]  # type: list[Op], list[dict[str, str]]
    for number, line in enumerate(ttir.splitlines()):
        code = re.sub(r" loc\(.*", "", line).strip()
        if not code or code.startswith(("#", "tt.func", "module")):
            continue
        if code.startswith("}"):
            if len(regions) == 1:
                break
            scopes.pop()
            if code.endswith("{"):
                # `} else {`: the operation goes on.
                scopes.append({})
            else:
                regions.pop()
            continue
        code = _with_own_names(code, number, scopes)
        match = ASSIGNMENT.match(code)
        text = match[4] if match else code
        name = match[3] if match else code.split(" ")[0].split("(")[0]
        op = Op(name, _results(match), NAME.findall(text), text)
        regions[-1].body.append(op)
        if code.endswith(("{", "({")):
            regions.append(op)
    return root


def _results(assignment: re.Match[str] | None) -> list[str]:
    if assignment is None:
        return []
    return [f"{assignment[1]}#{i}" for i in range(int(assignment[2]))] if assignment[2] else [assignment[1]]


def _with_own_names(code: str, number: int, scopes: list[dict[str, str]]) -> str:
    """The line with a name of its own for each value that it defines: regions side by side use the same ones."""
    match = ASSIGNMENT.match(code)
    outside = [match[1]] if match else []
    inside = NAME.findall(code) if code.startswith("^") else []
    if "scf.for" in code:
        inside = [LOOP.search(code)[1], *(name for name, _ in _carried(code))]  # type: ignore[index]
    opened: dict[str, str] = {name: f"{name}.{number}" for name in inside}
    known = {old: new for scope in scopes for old, new in scope.items()} | opened
    known |= {name: f"{name}.{number}" for name in outside}
    scopes[-1].update({name: known[name] for name in outside})
    if code.startswith("^"):
        scopes[-1].update(opened)
    elif code.endswith(("{", "({")):
        scopes.append(opened)

    def own(found: re.Match[str]) -> str:
        name, _, number = found[0].partition("#")
        return known.get(name, name) + (f"#{number}" if number else "")

    return NAME.sub(own, code)


def every(op: Op) -> list[Op]:
    """The operation and all inside it."""
    return [op, *(inner for child in op.body for inner in every(child))]


def _carried(code: str) -> list[tuple[str, str]]:
    """(inside, before) of each value that a loop carries from step to step."""
    match = CARRIED.search(code)
    return re.findall(r"(%[\w.]+) = (%[\w.]+)", match[1]) if match else []


def sources(root: Op) -> dict[str, set[str]]:
    """Of each value the values that it is made from; what comes from memory is made from none."""
    found: dict[str, set[str]] = defaultdict(set)

    def visit(op: Op) -> None:
        for inner in op.body:
            visit(inner)
        yielded = [o for inner in op.body if inner.name == "scf.yield" for o in inner.operands]
        if op.name == "scf.for":
            step, *bounds = LOOP.search(op.text).groups()  # type: ignore[union-attr]
            found[step] |= set(bounds)
            carried = _carried(op.text)
            for (inside, before), after, result in zip(carried, yielded, op.results, strict=True):
                found[inside] |= {before, after}
                found[result] |= {before, after}
        elif op.name != "tt.load":
            for result in op.results:
                found[result] |= {*op.operands, *yielded}

    visit(root)
    return found


def closure(names: set[str], made_from: dict[str, set[str]]) -> set[str]:
    """These values and all that they are made from."""
    seen: set[str] = set()
    left = set(names)
    while left:
        seen |= left
        left = {source for name in left for source in made_from.get(name, ())} - seen
    return seen


def overflows(ttir: str, grid: tuple[int, ...], arguments: dict[str, int]) -> list[str]:
    """The 32-bit sums, products and casts that an address is made from and that leave 32 bits in this launch.

    Args:
        arguments: the kernel's integers by name.
    """
    root = parse(ttir)
    offsets = {op.operands[1] for op in every(root) if op.name == "tt.addptr"}
    bounds = {op.operands[i] for op in every(root) if op.name == "scf.for" for i in range(len(op.operands)) if i < 4}
    made_from = sources(root)
    values: dict[str, Interval] = {f"%{name}": (value, value) for name, value in arguments.items()}
    ids = [(0, count - 1) for count in (*grid, 1, 1)]
    follower = _Follower(ids, closure(offsets | bounds, made_from), _data(root, made_from))
    follower.run(root.body, values)
    return sorted(set(follower.found))


def _data(root: Op, made_from: dict[str, set[str]]) -> set[str]:
    """What comes from memory, or is the largest of some, and what is made of it by other than sums and products."""
    data = {name for op in every(root) if op.name in DATA for name in op.results}
    others = [name for op in every(root) if op.name not in ("arith.addi", "arith.muli") for name in op.results]
    while more := {name for name in others if name not in data and made_from[name] & data}:
        data |= more
    return data


@dataclass
class _Follower:
    """ids: of the programs, along each axis. watched: what may not leave 32 bits; data: what is not followed."""

    ids: list[Interval]
    watched: set[str]
    data: set[str]
    found: list[str] = field(default_factory=list)

    def run(self, body: list[Op], values: dict[str, Interval]) -> list[Interval]:
        """Follow the operations, in order; return the intervals of what the body yields."""
        yielded: list[Interval] = []
        for op in body:
            if op.name == "scf.yield":
                yielded = [values.get(name, UNKNOWN) for name in op.operands]
                continue
            if op.name == "scf.for":
                results = self._run_loop(op, values)
            elif op.body:
                inner = self.run(op.body, values)
                results = [_union(inner) if inner else UNKNOWN] * len(op.results)
            else:
                results = [self._checked(op, name, _evaluate(op, values, self.ids)) for name in op.results]
            for name, interval in zip(op.results, results, strict=True):
                values[name] = UNKNOWN if name in self.data else interval
        return yielded

    def _checked(self, op: Op, name: str, interval: Interval) -> Interval:
        width = WIDTH.search(op.text)
        fits = -(2**31) <= interval[0] <= interval[1] < 2**31
        if not width or width[1] != "32" or name not in self.watched - self.data or fits:
            return interval
        self.found.append(f"{name} = {op.name}{op.text} in {interval}")
        return UNKNOWN

    def _run_loop(self, loop: Op, values: dict[str, Interval]) -> list[Interval]:
        """Follow a loop whose carried integers change by as much in each step; return what holds of each result."""
        counter, start, end, step = LOOP.search(loop.text).groups()  # type: ignore[union-attr]
        lowest, highest = values.get(start, UNKNOWN)[0], values.get(end, UNKNOWN)[1]
        trips = max(0, -(-(highest - lowest) // max(1, values.get(step, (1, 1))[0])))
        values[counter] = (lowest, max(lowest, highest - 1))
        before = {inside: values.get(given, UNKNOWN) for inside, given in _carried(loop.text)}
        values.update(before)
        # What the first step finds counts once, in the whole.
        once = _Follower(self.ids, set(), self.data).run(loop.body, dict(values))
        for (inside, first), after in zip(before.items(), once, strict=True):
            ends = [(first[i], after[i], first[i] + (after[i] - first[i]) * trips) for i in (0, 1)]
            values[inside] = UNKNOWN if inside in self.data else (min(ends[0]), max(ends[1]))
        self.run(loop.body, values)
        return [values[inside] for inside in before]


def _union(intervals: list[Interval]) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _evaluate(op: Op, values: dict[str, Interval], ids: list[Interval]) -> Interval:
    if op.name == "arith.constant":
        number = re.search(r"(?:dense<)?(-?\d+)>? :", op.text)
        return (int(number[1]), int(number[1])) if number else (0, 1) if "true" in op.text else UNKNOWN
    if op.name == "tt.make_range":
        end, start = (int(re.search(rf"{word} = (\d+)", op.text)[1]) for word in ("end", "start"))  # type: ignore[index]
        return start, end - 1
    if op.name == "tt.get_program_id":
        return ids["xyz".index(op.text.split()[0])]
    if op.name == "tt.get_num_programs":
        high = ids["xyz".index(op.text.split()[0])][1] + 1
        return high, high
    if op.name == "tt.load":
        return UNKNOWN
    given = [values.get(name, UNKNOWN) for name in op.operands]
    if len(given) == 2 and (combined := _combined(op.name, *given)) is not None:
        return combined
    if op.name == "arith.select":
        return _union(given[1:])
    if op.name == "arith.cmpi" or not given:
        return (0, 1)
    # Casts, shapes, reductions to a largest or a smallest.
    return _union(given)


def _combined(name: str, a: Interval, b: Interval) -> Interval | None:
    """The interval of an operation with two integers; None where it is not one of those that are followed."""
    if name == "arith.addi":
        return a[0] + b[0], a[1] + b[1]
    if name == "arith.subi":
        return a[0] - b[1], a[1] - b[0]
    if name in ("arith.muli", "arith.shli"):
        right = b if name == "arith.muli" else (1 << max(0, min(b[0], 63)), 1 << max(0, min(b[1], 63)))
        products = [x * y for x in a for y in right]
        return min(products), max(products)
    if name in ("arith.divsi", "arith.divui", "arith.ceildivsi") and b[0] > 0:
        return a[0] // b[1] if a[0] >= 0 else a[0] // b[0], -(-a[1] // b[0])
    if name in ("arith.remsi", "arith.remui") and b[0] > 0 and a[0] >= 0:
        return 0, min(a[1], b[1] - 1)
    if name in ("arith.minsi", "arith.minui"):
        return min(a[0], b[0]), min(a[1], b[1])
    if name in ("arith.maxsi", "arith.maxui"):
        return max(a[0], b[0]), max(a[1], b[1])
    if name == "arith.andi" and a[0] >= 0 and b[0] >= 0:
        return 0, min(a[1], b[1])
    if name in ("arith.shrsi", "arith.shrui") and a[0] >= 0 and b[0] >= 0:
        return a[0] >> min(b[1], 63), a[1] >> min(b[0], 63)
    return None


def read_and_written_without_barrier(ttir: str) -> list[str]:
    """The pointers by which a kernel reads and writes while nothing makes its threads wait for one another.

    What one thread wrote another one may only read after a barrier: one in the kernel, and where a loop holds both, in
    the outermost such loop.
    """
    root = parse(ttir)
    made_from = sources(root)
    pointers = set(re.findall(r"(%\w+): !tt\.ptr", ttir))
    found: set[str] = set()

    def look(region: Op) -> None:
        inside = every(region)
        read, written = (
            {p for op in inside if op.name == name for p in closure({op.operands[0]}, made_from) & pointers}
            for name in ("tt.load", "tt.store")
        )
        if not any("barrier" in op.name for op in inside):
            found.update(read & written)

    def loops(region: Op) -> list[Op]:
        return [loop for op in region.body for loop in ([op] if op.name == "scf.for" else loops(op))]

    for region in (root, *loops(root)):
        look(region)
    return sorted(found)


def precisions(ttir: str) -> set[str]:
    """How products of fp32 operands are computed: "ieee", "tf32", "tf32x3"."""
    dots = [
        line for line in ttir.splitlines() if re.search(r"tt\.dot .*: tensor<[\dx]+xf32> \* tensor<[\dx]+xf32>", line)
    ]
    stated = (re.search(r"inputPrecision = (\w+)", line) for line in dots)
    return {match[1] if match else "ieee" for match in stated}
