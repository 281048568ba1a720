"""The machine code of a compiled kernel, as nvdisasm lists it, and the path that one warp takes through it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from tools.aot import cuda_tool
from tools.forecast.source import Place

_ROW = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]+) \*/")
_HIGH_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]+) \*/")
_LINE = re.compile(r'//## File "(.*?)", line (\d+)')
_LABEL = re.compile(r"^(\.L_\w+):")
_PREDICATE = re.compile(r"^@(!?U?P\w+)\s+")

_ALU = re.compile(
    "LOP3|IADD3|IADD|SHF|ISETP|LEA|SEL|PRMT|FSETP|FSEL|FMNMX|IMNMX|VIMNMX|VIADD|VIADDMNMX|PLOP3|MOV|F2FP|IABS|SGXT|BMSK|"
    "FLO|POPC|LOP|P2R|R2P|I2FP|ISCADD|VABSDIFF|HADD2|HFMA2|HMUL2|HSET2|HSETP2|HMNMX2"
)
_TRANSCENDENTAL = re.compile("R2UR|F2F|MUFU|I2F|F2I|FRND|S2R|S2UR|REDUX")
_MEMORY = re.compile("LDS|STS|LDSM|STSM|LDG|STG|LDGSTS|SHFL|ATOM|RED|LDC|LDL|STL|ATOMS|ATOMG")


@dataclass(slots=True)
class Instruction:
    """One instruction, decoded.

    op: its name; full: with modifiers. place: of the source. predicate: what guards it. target: of a branch.
    stall: cycles to the warp's next instruction; sets: scoreboard of its result; reads: scoreboard of its operands;
    waits: mask of the scoreboards that it waits for. 7 is no scoreboard.
    pipe, cycles: what it occupies and for how long. bytes: that one warp moves. flops: of its share of a product.
    """

    text: str
    op: str
    full: str
    place: Place | None
    predicate: str | None
    label: str | None
    stall: int
    sets: int
    reads: int
    waits: int
    target: int | None = None
    pipe: str = "none"
    cycles: float = 0
    bytes: int = 0
    flops: int = 0


Code = tuple[Instruction, ...]


@functools.cache
def disassemble(cubin: bytes) -> Code:
    """The instructions of a kernel compiled for NVIDIA."""
    listing = cuda_tool("nvdisasm", cubin, "-g", "-hex", "-c").splitlines()
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    place: Place | None = None
    for number, text in enumerate(listing):
        if found := _LINE.search(text):
            # Compiled code may be cached from another checkout: of the path only the name counts.
            place = Path(found[1]).name, int(found[2])
        elif found := _LABEL.match(text.strip()):
            labels[found[1]] = len(code)
        elif found := _ROW.match(text):
            high = _HIGH_WORD.match(listing[number + 1])
            if high is None:
                raise RuntimeError(f"nvdisasm lists no control word after {text!r}")
            code.append(_decoded(found[2], place, int(high[1], 16) >> 41))
    for x in code:
        x.target = None if x.label is None else labels.get(x.label)
    return tuple(code)


def _decoded(text: str, place: Place | None, control: int) -> Instruction:
    guard, body = _PREDICATE.match(text), _PREDICATE.sub("", text)
    full = body.split()[0]
    label = re.search(r"`\((\.L_\w+)\)", body)
    predicate = guard[1] if guard else None
    x = Instruction(
        text=text,
        op="NOP" if predicate == "!PT" else full.split(".")[0],
        full=full,
        place=place,
        predicate=predicate,
        label=label[1] if label else None,
        stall=control & 15,
        sets=(control >> 5) & 7,
        reads=(control >> 8) & 7,
        waits=(control >> 11) & 63,
    )
    _occupy(x)
    return x


def _occupy(x: Instruction) -> None:
    """Say which pipe of a multiprocessor an instruction occupies, and for how long."""
    op = x.op
    if op == "IMAD":
        x.pipe, x.cycles = "imad", 2
    elif op in ("FFMA", "FADD", "FMUL", "FSWZADD"):
        x.pipe, x.cycles = "fma", 1
    elif _ALU.fullmatch(op):
        x.pipe, x.cycles = "alu", 2
    elif _TRANSCENDENTAL.fullmatch(op):
        x.pipe, x.cycles = "xu", {"R2UR": 2, "F2F": 4}.get(op, 8)
    elif _MEMORY.fullmatch(op):
        x.pipe, x.bytes = "mio", 32 * _width(x.full)
        if op in ("LDSM", "STSM"):
            x.bytes = 128 * (4 if ".4" in x.full else 2 if ".2" in x.full else 1)
        x.cycles = 1 if op in ("SHFL", "LDC") else max(1, x.bytes // 128)
        if op == "LDC":
            x.bytes = 0
    elif op in ("HGMMA", "HMMA"):
        _multiply(x)
    elif op[0] == "U":
        x.pipe, x.cycles = "uniform", 1


def _multiply(x: Instruction) -> None:
    shape = re.search(r"(\d+)x(\d+)x(\d+)", x.full)
    if x.op == "HMMA" or shape is None:
        # m16n8k16, or k8: `.16816`, `.1688`.
        x.pipe, x.cycles, x.flops = "hmma", 8, 2 * 16 * 8 * (16 if ".16816" in x.full else 8)
        return
    m, n, k = (int(size) for size in shape.groups())
    a_is_shared = not re.search(r"HGMMA\S*\s+R\d+,\s*R\d+,", x.text)
    # 2048 multiply-adds a cycle and multiprocessor; operands from shared memory at 128 bytes a cycle.
    operands = ((m * k * 2 if a_is_shared else 0) + n * k * 2) / 128
    # The four warps of a group issue it together.
    x.pipe, x.cycles, x.flops = "hgmma", max(m * n * k / 2048, operands), 2 * m * n * k // 4


def _width(full: str) -> int:
    """Bytes of one thread's load or store."""
    for bits in (128, 64):
        if f".{bits}" in full:
            return bits // 8
    return 2 if ".U16" in full or ".S16" in full else 1 if ".U8" in full else 4


def loops(code: Code) -> list[tuple[int, int]]:
    """(first, last) instruction of every loop: the backward branches, in the order of the code."""
    return [(x.target, i) for i, x in enumerate(code) if x.op == "BRA" and x.target is not None and x.target < i]


def exits_and_branches(code: Code) -> list[int]:
    """The instructions where a program may leave the straight line: forward branches and exits with a condition."""
    return [
        i
        for i, x in enumerate(code)
        if x.predicate is not None and (x.op == "EXIT" or (x.op == "BRA" and x.target is not None and x.target > i))
    ]


def count_loads(code: Code, first: int, last: int) -> int:
    """Loads between two instructions, both included."""
    return sum(x.op == "LDG" for x in code[first : last + 1])


def trace(code: Code, trips: dict[int, int], taken: dict[int, bool], limit: int = 400_000) -> list[int]:
    """The instructions of one warp in the order it runs them; a copy that its mask turns off is written as ~index.

    Args:
        trips: iterations of each loop, by its backward branch.
        taken: branches and exits that are decided; of the others a conditional one is not taken unless it jumps to the
            slow side of a loop.
    """
    ends = {last for _, last in loops(code)}
    taken = dict.fromkeys(_around_empty(code, trips), True) | taken
    left = {last: max(trips[last], 1) - 1 for last in ends}
    path: list[int] = []
    at = 0
    while at < len(code):
        x = code[at]
        path.append(at)
        if len(path) > limit:
            raise RuntimeError(f"One warp runs more than {limit} instructions: {x.place} loops too often.")
        if x.op == "EXIT" and (x.predicate is None or taken.get(at)):
            break
        if at in left:
            if left[at] > 0:
                left[at] -= 1
                at = x.target or 0
                continue
            if _is_unconditional(x):
                # The exit in front of it was taken: where the loop ends the program does.
                break
            left[at] = max(trips[at], 1) - 1
        elif x.op == "BRA" and x.target is not None and _jumps(code, ends, taken, at, x):
            at = x.target
            continue
        at += 1
    return _without_last_copies(code, path)


def _jumps(code: Code, ends: set[int], taken: dict[int, bool], at: int, x: Instruction) -> bool:
    """Say whether a forward branch is taken."""
    if at in taken:
        return taken[at]
    return True if _is_unconditional(x) else x.predicate is not None and _past_loop(code, ends, x)


def _is_unconditional(x: Instruction) -> bool:
    # `BRA UP0, ...` has its condition among its operands.
    return x.predicate is None and not x.text.split("BRA")[1].lstrip().startswith(("U", "!U"))


def _around_empty(code: Code, trips: dict[int, int]) -> list[int]:
    """Branches that jump over the loops that run no time."""
    return [
        i
        for first, last in loops(code)
        if trips[last] == 0
        for i in range(max(0, first - 60), first)
        if code[i].op == "BRA" and code[i].target == last + 1
    ]


def _past_loop(code: Code, ends: set[int], x: Instruction) -> bool:
    """A branch over a few instructions that end in a jump past a loop is taken."""
    target = x.target or 0
    y = code[target - 1]
    jumps = y.op == "BRA" and y.predicate is None and y.target is not None and y.target > target
    return jumps and any(target <= last < (y.target or 0) for last in ends)


def _without_last_copies(code: Code, path: list[int]) -> list[int]:
    """As many copies as were made ahead of a pipelined loop, its last iterations do not make."""
    every = loops(code)
    for first, last in every:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in every):
            continue
        ahead: dict[str, int] = {}
        inside = {code[i].full for i in range(first, last + 1) if code[i].op == "LDGSTS"}
        for i in range(max(0, first - 600), first):
            if code[i].full in inside:
                ahead[code[i].full] = ahead.get(code[i].full, 0) + 1
        for full, count in ahead.items():
            made = [p for p, i in enumerate(path) if first <= i <= last and code[i].full == full]
            for p in made[max(0, len(made) - count) :]:
                path[p] = ~path[p]
    return path
