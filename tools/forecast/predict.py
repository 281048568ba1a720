"""The time of one launch: its programs' paths through the machine code, run on one multiprocessor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tools.aot import Compiled
from tools.forecast import machine_code, multiprocessor
from tools.forecast.machine_code import Code, Instruction
from tools.forecast.multiprocessor import CLOCK, Move
from tools.forecast.program import Found, follow
from tools.forecast.source import Place, UndeclaredError, cdiv, evaluate, sides, text

MULTIPROCESSORS = 132
# Of one multiprocessor: shared memory in bytes, registers, warps, programs.
SHARED, REGISTERS, WARPS, PROGRAMS = 227 * 1024, 65536, 64, 32
# Bytes a cycle that one multiprocessor takes at most.
DRAM_ALONE, L2_ALONE = 40, 64
# µs from one kernel of a CUDA graph to the next: launch and drain.
NODE = 1.3
# Operations per second of the matrix units: dense bf16 of an H100 or H200, as cuBLAS reaches it.
FLOPS = 790e12
# Share of its floor that PyTorch's library reaches in a product, and µs of an operator that moves next to nothing.
LIBRARY, SMALL = 0.85, 1.0
# Programs of one multiprocessor that are simulated, and of one launch that are followed: of more the time is scaled.
SIMULATED, FOLLOWED = 26, 400


@dataclass(frozen=True)
class Launch:
    """A launch: what `kernels.launch` was given, and what was compiled for it.

    activations: the arguments that come from DRAM or go there. owned: those that are the operator's own, given or
    returned; the others are scratch, which stays in L2. beside: it runs on a second stream,
    beside this one of the base's products; 0 for none.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Compiled
    activations: frozenset[str]
    owned: frozenset[str]
    beside: int = 0


@dataclass(frozen=True)
class Operation:
    """A launch of PyTorch's: its name, the bytes that it cannot do without, and the operations of the matrix units."""

    name: str
    bytes: int
    flops: int


@dataclass(frozen=True)
class Rates:
    """Bytes per second over all multiprocessors."""

    dram: float
    l2: float


def predict_operation(call: Operation, rates: Rates) -> dict[str, Any]:
    """As `predict`. A product takes its floor / LIBRARY, all else what its bytes take out of L2, and SMALL at least."""
    parts = {"DRAM": call.bytes / rates.dram * 1e6, "matrix units": call.flops / FLOPS * 1e6}
    if not call.flops:
        parts = {"L2": call.bytes / rates.l2 * 1e6}
    most = max(parts, key=lambda part: parts[part])
    us = parts[most] / LIBRARY if call.flops else max(parts[most], SMALL)
    return {
        "kernel": call.name,
        "us": us + NODE,
        "floor": parts[most] if call.flops else 0.0,
        "binds": most,
        "parts": parts,
    }


def predict(call: Launch, rates: Rates) -> dict[str, Any]:
    """What a launch would take.

    Returns:
        us: its time in µs with the gap to the next kernel; floor: of its bytes and operations; binds: what it waits
        for; parts: µs that each resource is busy; bytes_moved through L2, and bytes of all that it is given; and what
        it uses of a multiprocessor.
    Raises:
        UndeclaredError: the source does not say how often a loop runs.
    """
    compiled, code = call.compiled, machine_code.disassemble(call.compiled.binary)
    warps = call.arguments.get("num_warps", 4)
    registers = cdiv(compiled.registers * 32, 256) * 256 * warps
    resident = max(1, min(REGISTERS // registers, SHARED // (compiled.shared + 1024), WARPS // warps, PROGRAMS))
    shares, found = _followed(call, code)
    queue = max(shares, key=lambda share: sum(map(len, share)))
    keep = max(2 * resident, SIMULATED)
    scale = max(1.0, len(queue) / keep)
    # Fewer programs than multiprocessors: each gets more, up to what one of them can take.
    programs = math.prod(call.grid)
    active = min(MULTIPROCESSORS, programs)
    dram, l2 = min(rates.dram / active / CLOCK, DRAM_ALONE), min(rates.l2 / active / CLOCK, L2_ALONE)
    of_all = programs / sum(map(len, shares))
    move = _traffic(call, found, code, [path for share in shares for path in share], of_all * warps)
    result = multiprocessor.simulate(code, queue[:keep], warps, resident, move, dram, l2)
    us = scale / CLOCK * 1e6  # of a cycle
    flops = warps * of_all * sum(code[i].flops for share in shares for path in share for i in path)
    stream = sum(_bytes(call.arguments[name]) for name in call.owned) / rates.dram * 1e6
    parts = {
        "DRAM": result.dram / dram * us,
        "L2": result.l2 / l2 * us,
        # A multiprocessor that is kept busy issues in about two of three cycles.
        "issue": result.issued / 4 * us / 0.65,
        "matrix units": flops / FLOPS * 1e6,
    }
    most = max(parts, key=lambda part: parts[part])
    return {
        "kernel": compiled.kernel,
        "grid": list(call.grid),
        "warps": warps,
        "resident": resident,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "instructions": round(result.issued / warps / len(queue[:keep])),
        "us": result.cycles * us + NODE,
        "floor": max(stream, parts["matrix units"]),
        "binds": most if result.cycles * us < 1.35 * parts[most] else f"latency, then {most}",
        "parts": parts,
        "bytes_moved": parts["L2"] * rates.l2 / 1e6,
        "bytes": sum(_bytes(value) for value in call.arguments.values() if isinstance(value, Tensor)),
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _followed(call: Launch, code: Code) -> tuple[list[list[list[int]]], Found]:
    """The paths of the programs on each multiprocessor, in their order, and what a program does.

    Programs are dealt to multiprocessors in turn. Of a large launch a few multiprocessors stand for all.
    """
    programs = math.prod(call.grid)
    known: dict[str, list[int]] = {}
    shares: list[list[list[int]]] = []
    for first in range(0, min(programs, MULTIPROCESSORS), min(33, cdiv(programs, FOLLOWED))):
        numbers = range(first, programs, MULTIPROCESSORS)
        share: list[list[int]] = []
        for number in numbers[: 4 * SIMULATED]:
            found = follow(call.kernel, call.grid, call.arguments, _number(number, call.grid))
            key = repr((found.trips, found.conditions))
            if key not in known:
                known[key] = machine_code.trace(code, _trips(code, call, found), _decided(code, call, found))
            share.append(known[key])
        # Those that were not followed are as those that were.
        shares.append(list(itertools.islice(itertools.cycle(share), len(numbers))))
    return shares, found


def _number(program: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The number of a program in each dimension; the first one runs fastest."""
    numbers = []
    for size in grid:
        numbers.append(program % size)
        program //= size
    return tuple(numbers)


def _trips(code: Code, call: Launch, found: Found) -> dict[int, int]:
    """Iterations of each loop of the machine code, by its backward branch.

    Raises:
        UndeclaredError: the source does not say, or has the loop in other places than the code.
    """
    every = machine_code.loops(code)
    counts: dict[int, int] = {}
    for place in dict.fromkeys(code[last].place for _, last in every):
        said = found.trips.get(place, []) if place else []
        places = _places(code, every, place)
        # All the same, or one for each place; the compiler leaves out places that iterate zero times.
        for values in (said if len(set(said)) > 1 else said[:1] * len(places), [value for value in said if value]):
            if len(values) == len(places) and None not in values:
                break
        else:
            file, number = place or ("?", 0)
            raise UndeclaredError(
                f"{call.compiled.kernel}: how often the loop at {file}:{number} runs is not clear: it is in the code "
                f"{len(places)} times, and the source says {said}.\n    {text(call.kernel, place)}\n"
                "Declare it at the end of the line: `# trips: cdiv(K, BLOCK_K)`, over what is known there."
            )
        for loops, value in zip(places, values, strict=True):
            counts |= _shared_out(code, loops, value or 0)
    return counts


def _places(code: Code, every: list[tuple[int, int]], place: Place | None) -> list[list[tuple[int, int]]]:
    """The loops of one source line, those of one place together: an unrolled loop and those for what it leaves over."""
    places: list[list[tuple[int, int]]] = []
    previous: tuple[tuple[int, int], int, int] | None = None
    for first, last in sorted(loop for loop in every if code[loop[1]].place == place):
        around = min((b - a, a) for a, b in [*every, (-1, len(code))] if a < first and last < b)
        loads = machine_code.count_loads(code, first, last)
        # What is left over is close behind, in the same loop, and loads less at once.
        if previous and around == previous[0] and first - previous[1] < 140 and 0 < loads < previous[2]:
            places[-1].append((first, last))
        else:
            places.append([(first, last)])
        previous = around, last, loads
    return places


def _shared_out(code: Code, place: list[tuple[int, int]], trips: int) -> dict[int, int]:
    """The iterations of each loop of a place: an unrolled one has as many loads more as it takes iterations at once."""
    single = min(machine_code.count_loads(code, *loop) for loop in place)
    counts = {}
    for number, (first, last) in enumerate(place):
        step = max(1, round(machine_code.count_loads(code, first, last) / single)) if single else 1
        counts[last] = trips // step
        trips -= counts[last] * step
        if number + 1 < len(place) and single:
            # Between them some iterations stand in a straight line.
            straight = machine_code.count_loads(code, last + 1, place[number + 1][0] - 1) // single
            if 0 < straight <= trips:
                trips -= straight
    return counts


def _decided(code: Code, call: Launch, found: Found) -> dict[int, bool]:
    """The branches and exits of the code that an `if` of the source decides, and whether they are taken."""
    taken = {}
    for i in machine_code.exits_and_branches(code):
        place = code[i].place
        holds = set(found.conditions.get(place, [None])) if place else {None}
        if len(holds) != 1 or None in holds or place is None:
            continue
        (is_true,) = holds
        body, orelse = sides(call.kernel, place)
        # What follows is one of the two sides.
        behind = (code[j].place for j in range(i + 1, min(len(code), i + 40)))
        inside = next((p for p in behind if p and p[0] == place[0] and p[1] in {*body, *orelse}), None)
        falls_into_body = inside is None or inside[1] in body
        is_exit = code[i].op == "EXIT"
        taken[i] = bool(is_true) if is_exit or not falls_into_body else not is_true
    return taken


def _traffic(
    call: Launch, found: Found, code: Code, paths: list[list[int]], each: float
) -> Callable[[Instruction], Move]:
    """What each load and store moves. A byte of an activation comes from DRAM once, however many programs load it.

    Args:
        paths: of programs that stand for all.
        each: warps of the launch that take each of these paths.
    """
    moved: dict[tuple[str, str], float] = {}
    for path in paths:
        for i in path:
            x = code[i if i >= 0 else ~i]
            if i >= 0 and x.op in ("LDG", "LDGSTS", "STG") and (name := _tensor(call, found, x)):
                key = name, x.op[:2]
                moved[key] = moved.get(key, 0.0) + x.bytes * each

    def move(x: Instruction) -> Move:
        name, l2 = _tensor(call, found, x), float(x.bytes)
        # Copies to shared memory go past L1.
        if x.place in found.l2 and x.op != "LDGSTS":
            expression, names = found.l2[x.place]
            l2 = min(l2, float(evaluate(expression, names | {"bytes": x.bytes})))
        if name not in call.activations:
            return Move("l2", l2, 0.0)
        share = min(1.0, _bytes(call.arguments[name]) / moved[name, x.op[:2]])
        return Move("dram" if share >= 0.5 else "l2", l2, l2 * share)

    return move


def _tensor(call: Launch, found: Found, x: Instruction) -> str | None:
    """The argument that a load or store touches; of several that it may, the largest."""
    names = found.tensors.get(x.place, set()) if x.place else set()
    return max(sorted(names), key=lambda name: _bytes(call.arguments[name]), default=None)
