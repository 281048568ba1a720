"""One Hopper multiprocessor that runs machine code in the order of the code, by the control codes of its assembler.

Each instruction carries its stall count, the scoreboards it sets and those it waits for. Four schedulers issue one
instruction a cycle, the oldest warp first; pipes are busy for as long as an instruction occupies them; loads and stores
share the memory bandwidth of one multiprocessor. Addresses are not known: no bank conflicts, no hits in L1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tools.forecast.machine_code import Code, Instruction

CLOCK = 1.755e9
# Cycles from issue to data, idle machine.
LATENCY = {"dram": 560, "l2": 264}
# From the end of one program to the start of the next in its place.
NEXT_PROGRAM = 300
_NEVER = 1e18
_SHARED_WAITS = {"LDS": 27, "LDSM": 29, "STS": 12, "STSM": 12}
_PIPES = ("alu", "fma", "imad", "xu", "uniform", "hgmma", "hmma", "mio")


class Move(NamedTuple):
    """What one warp's load or store moves: as slow as `where`, "dram" or "l2"; bytes through either."""

    where: str
    l2_bytes: float
    dram_bytes: float


class Result(NamedTuple):
    """cycles, instructions issued, and bytes moved."""

    cycles: float
    issued: int
    dram: float
    l2: float


class _Program:
    """What the warps of one program share: how many live, and who waits at the barrier."""

    __slots__ = ("alive", "arrived", "waiting")

    def __init__(self, warps: int) -> None:
        self.alive, self.arrived = warps, 0
        self.waiting: list[_Warp] = []


class _Warp:
    __slots__ = (
        "at",
        "blocked",
        "boards",
        "code",
        "copies",
        "groups",
        "length",
        "moves",
        "multiplied",
        "program",
        "time",
    )

    def __init__(self, program: _Program, code: list[Instruction], moves: list[Move | None], time: float) -> None:
        self.program, self.code, self.moves, self.time = program, code, moves, time
        self.at, self.length = 0, len(code)
        self.boards: list[list[float]] = [[] for _ in range(6)]
        # When each group of asynchronous copies ends, when the newest group does, and when the last product does.
        self.groups: list[float] = []
        self.copies = self.multiplied = 0.0
        self.blocked = False


class _Multiprocessor:
    """Its pipes, its share of the memory, and the programs on it.

    Args:
        queue: for each program the instructions of its warps, and what they move.
        dram, l2: bytes per cycle of this multiprocessor.
    """

    def __init__(self, queue: list[tuple[list[Instruction], list[Move | None]]], warps: int, dram: float, l2: float):
        self.queue, self.warps, self.dram, self.l2 = queue, warps, dram, l2
        self.slots: list[list[_Warp]] = [[] for _ in range(4)]
        self.busy = [dict.fromkeys(_PIPES, 0.0) for _ in range(4)]
        # When DRAM, L2 and shared memory are free again, and when the last thing ended.
        self.dram_free = self.l2_free = self.shared_free = self.last = 0.0
        self.dram_bytes = self.l2_bytes = 0.0
        self.started = self.issued = 0

    def start(self, time: float) -> None:
        """Put the next program on it."""
        code, moves = self.queue[self.started]
        program = _Program(self.warps)
        for number in range(self.warps):
            self.slots[(number + self.started * self.warps) % 4].append(_Warp(program, code, moves, time))
        self.started += 1

    def ready(self, z: _Warp, busy: dict[str, float], now: float) -> float:
        """When the warp may issue its next instruction."""
        if z.blocked:
            return _NEVER
        x, time = z.code[z.at], z.time
        mask, board = x.waits, 0
        while mask:
            if mask & 1 and z.boards[board]:
                time = max(time, max(z.boards[board]))
            mask >>= 1
            board += 1
        if x.op == "DEPBAR":
            if found := re.search(r"SB(\d), (0x[0-9a-f]+|\d+)", x.text):
                allowed = int(found[2], 0)
                z.groups = [end for end in z.groups if end > now]
                if len(z.groups) > allowed:
                    time = max(time, sorted(z.groups)[len(z.groups) - 1 - allowed])
        elif x.op == "WARPGROUP" and "DEPBAR" in x.full:
            time = max(time, z.multiplied)
        if x.pipe not in ("none", "hgmma"):
            time = max(time, busy[x.pipe])
        return time

    def issue(self, z: _Warp, scheduler: int, now: float) -> None:
        """Issue the warp's next instruction."""
        x, busy = z.code[z.at], self.busy[scheduler]
        self.issued += 1
        z.time = now + max(1, x.stall)
        done, operands_read = now + 20, now + 6
        if x.pipe == "mio":
            busy["mio"] = now + 2
            done, operands_read = self.access(z, x, now)
        elif x.pipe == "hgmma":
            # The four warps of a group issue it; the tensor core of each scheduler works on its quarter.
            busy["hgmma"] = z.multiplied = max(z.multiplied, busy["hgmma"], now + 20) + x.cycles
        elif x.pipe != "none":
            busy[x.pipe] = now + x.cycles
            done = now + (33 if x.op == "HMMA" else 18 if x.op == "R2UR" else 30 if x.pipe == "xu" else 12)
        if x.op == "LDGDEPBAR":
            z.groups.append(max(z.copies, now))
            z.copies = 0.0
        elif x.op == "BAR" and "ARV" not in x.full:
            self.arrive(z, now)
        elif x.op in ("MEMBAR", "FENCE"):
            z.time = max(z.time, now + 10)
        if x.sets != 7:
            z.boards[x.sets] = [end for end in z.boards[x.sets] if end > now] + [done]
        if x.reads != 7:
            z.boards[x.reads] = [end for end in z.boards[x.reads] if end > now] + [operands_read]
        z.at += 1
        if z.at >= z.length:
            self.retire(z, scheduler, now)

    def access(self, z: _Warp, x: Instruction, now: float) -> tuple[float, float]:
        """Run a load or store, of whatever memory; when its result is there, and when its operands are read."""
        begin = max(now, self.shared_free)
        self.shared_free = begin + x.cycles
        operands_read = begin + x.cycles + 8
        if x.op in ("ATOM", "RED", "ATOMG"):
            return begin + LATENCY["l2"], operands_read
        if x.op not in ("LDG", "LDGSTS", "STG"):
            waits = _SHARED_WAITS.get(x.op)
            return begin + (waits + x.cycles if waits else 24 if x.op == "SHFL" else 30), operands_read
        move = z.moves[z.at]
        if move is None:
            done = now + 30
        else:
            end = self.l2_free = max(begin, self.l2_free) + move.l2_bytes / self.l2
            self.l2_bytes += move.l2_bytes
            if move.dram_bytes:
                self.dram_free = max(begin, self.dram_free) + move.dram_bytes / self.dram
                self.dram_bytes += move.dram_bytes
                end = max(end, self.dram_free)
            done = end + LATENCY[move.where]
            if x.op == "STG":
                done = operands_read = begin + x.cycles + 10
                self.last = max(self.last, end)
        if x.op == "LDGSTS":
            z.copies = max(z.copies, done)
            done = begin + 20  # the address is read
        return done, operands_read

    def arrive(self, z: _Warp, now: float) -> None:
        """Let a warp arrive at its program's barrier; the last one lets all go."""
        program = z.program
        program.arrived += 1
        if program.arrived < program.alive:
            z.blocked = True
            program.waiting.append(z)
            return
        for other in [*program.waiting, z]:
            other.blocked, other.time = False, now + 12
        program.arrived, program.waiting = 0, []

    def retire(self, z: _Warp, scheduler: int, now: float) -> None:
        """Take a warp that is through away; its program's last one makes room for the next program."""
        self.slots[scheduler].remove(z)
        z.program.alive -= 1
        self.last = max(self.last, now)
        if z.program.alive == 0 and self.started < len(self.queue):
            self.start(now + NEXT_PROGRAM)

    def cycle(self, now: float) -> float:
        """Let each scheduler issue what is ready; the next cycle in which one may."""
        soonest, issued = _NEVER, False
        for scheduler in range(4):
            for z in self.slots[scheduler]:
                time = self.ready(z, self.busy[scheduler], now)
                if time <= now:
                    self.issue(z, scheduler, now)
                    issued = True
                    break
                soonest = min(soonest, time)
        if issued:
            return now + 1
        if soonest >= _NEVER:
            raise RuntimeError(f"Every warp waits at a barrier, in cycle {now}.")
        return max(now + 1, int(soonest + 0.999))


def simulate(
    code: Code,
    paths: Sequence[list[int]],
    warps: int,
    resident: int,
    move: Callable[[Instruction], Move],
    dram: float,
    l2: float,
    max_cycles: int = 3_000_000,
) -> Result:
    """Run programs with the given paths, at most `resident` of them at once, on one multiprocessor.

    Args:
        paths: of `machine_code.trace`, one for each program.
        move: what a load or store of global memory moves.
        dram, l2: bytes per cycle of this multiprocessor.
    Raises:
        RuntimeError: warps wait for each other, or it takes more than max_cycles.
    """
    known: dict[int, tuple[list[Instruction], list[Move | None]]] = {}
    for path in paths:
        if id(path) not in known:
            steps = [code[i if i >= 0 else ~i] for i in path]
            known[id(path)] = (
                steps,
                [
                    move(x) if i >= 0 and x.op in ("LDG", "LDGSTS", "STG") and not x.text.endswith("!PT") else None
                    for i, x in zip(path, steps, strict=True)
                ],
            )
    machine = _Multiprocessor([known[id(path)] for path in paths], warps, dram, l2)
    for _ in range(min(resident, len(paths))):
        machine.start(0.0)
    now = 0.0
    while any(machine.slots):
        now = machine.cycle(now)
        if now > max_cycles:
            raise RuntimeError(f"More than {max_cycles} cycles.")
    cycles = max(now, machine.last, machine.dram_free, machine.l2_free)
    return Result(cycles, machine.issued, machine.dram_bytes, machine.l2_bytes)
