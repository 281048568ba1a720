"""How fast an adapted linear could be: bytes over the copy bandwidth, operations over the rate of matrix products.

Two kinds of floor. `must_take` bounds any program: each input read once, each output written once, each operation done.
`overhead` is what a given plan of kernels costs over the frozen base alone: the model behind the project's choice of
kernels. Shapes are (in, out) of linears; M is the number of tokens; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# No launch of a kernel is over sooner: the gap of one node of a CUDA graph.
LAUNCH = 2e-6
# PEFT's eager launches per linear, and the seconds between them; its forward waits for the device once per linear.
# Fitted, not derived; what is proportional to M below is derived.
PEFT_LAUNCHES = {"fwd": 21, "bwd": 46}
PEFT_GAP = {"fwd": 4e-6, "bwd": 1.7e-6}
# Bytes of an element of bf16, which the plans are computed for.
WIDTH = 2
PLANS = ("module", "owned", "shared")

Shape = tuple[int, int]
# Linears that read the same x: q, k and v; o; gate and up; down.
LLAMA2_7B: tuple[tuple[Shape, ...], ...] = (
    ((4096, 4096),) * 3,
    ((4096, 4096),),
    ((4096, 11008),) * 2,
    ((11008, 4096),),
)


@dataclass(frozen=True)
class Rates:
    """What a chip was measured to do.

    copy: bytes per second, read and written, of a large copy.
    matmul: operations per second of a large product in the activations' dtype.
    matmul_fp32: the same in full float32.
    """

    copy: float
    matmul: float
    matmul_fp32: float


H200 = Rates(copy=4.3e12, matmul=790e12, matmul_fp32=55e12)


def flat(groups: Sequence[Sequence[Shape]]) -> list[Shape]:
    """The linears without their grouping."""
    return [shape for group in groups for shape in group]


def base_time(shapes: Sequence[Shape], M: int, rates: Rates) -> float:
    """The frozen base alone, forward; backward (dx alone) costs the same.

    sum over linears of max(2 M K N / rate, 2 (M K + K N + M N) / copy)
    """
    return sum(max(2 * M * K * N / rates.matmul, WIDTH * (M * K + K * N + M * N) / rates.copy) for K, N in shapes)


def added_by_autograd(K: int, M: int) -> int:
    """Bytes of the addition that autograd makes of an op's own dx to the base's: it reads both and writes a third."""
    return 3 * WIDTH * M * K


class Floor(NamedTuple):
    """What a case cannot do without: operations, bytes, and so seconds."""

    operations: int
    bytes: int
    seconds: float

    def __add__(self, other: Floor) -> Floor:  # type: ignore[override]
        return Floor(*(a + b for a, b in zip(self, other, strict=True)))


def must_take(
    K: int, N: int, M: int, r: int, direction: str, rates: Rates, width: int = 2, frozen: bool = False
) -> Floor:
    """What no program can go below for one adapted linear: in each pass max(operations / rate, bytes / copy).

    Forward reads x and the weight and writes y. Backward also reads dy, the weight and, for the gradient of a trained
    A, x, and writes dx. The parameters of VB-LoRA are too small to count; VeRA's frozen A and B, (r, K) and (N, r) in
    float32, are read in each pass.

    Args:
        r: rank of the update; 0 for the base alone.
        direction: "fwd", or another for forward and backward.
        width: bytes of an element of the activations and the weight.
        frozen: A and B come from memory (VeRA), and their own gradients are not wanted.
    """
    matrices = 4 * r * (K + N) if frozen else 0
    passes = [(2 * M * K * N + 2 * M * r * (K + N), width * (M * K + K * N + M * N) + matrices)]
    if direction != "fwd":
        # ds and dx; the gradients of A and B, or of lambda_b from what VeRA's B made of s, which may have been kept.
        own = 2 * M * r * (K + N) if frozen else 4 * M * r * (K + N)
        x = M * K if r and not frozen else 0
        passes.append((2 * M * K * N + own, width * (M * N + x + K * N + M * K) + matrices))
    seconds = sum(max(operations / rates.matmul, moved / rates.copy) for operations, moved in passes)
    return Floor(sum(operations for operations, _ in passes), sum(moved for _, moved in passes), seconds)


def _launches(group: Sequence[Shape], M: int, direction: str, plan: str, dropout: bool) -> list[int]:
    """Bytes that each kernel of a plan moves for the update of VB-LoRA of linears that read one x."""
    K, outs = group[0][0], [N for _, N in group]
    if direction == "fwd":
        # shrink reads x; expand writes y, and reads the base's where that was made before. The seed is drawn alone.
        expand = [WIDTH * M * N * (2 if plan == "module" else 1) for N in outs]
        return [WIDTH * M * K, *expand, *([0] if dropout else [])]
    # Each dy comes when it comes, in a pass of its own. Then one pass reads x and writes dx, which autograd adds to the
    # base's where that is another.
    added = [added_by_autograd(K, M)] if plan == "module" else []
    return [*(WIDTH * M * N for N in outs), 2 * WIDTH * M * K, *added]


def overhead(
    groups: Sequence[Sequence[Shape]],
    M: int,
    direction: str,
    plan: str,
    rates: Rates,
    *,
    hidden: bool = True,
    dropout: bool = False,
) -> float:
    """Time of the adapted linears over that of the frozen base alone, for VB-LoRA under a plan of kernels.

    1 + sum over kernels of max(LAUNCH, bytes / copy) / base_time

    Backward, the base's time has what autograd adds up where its linears share x.

    Args:
        groups: linears, those that read the same x together.
        direction: "fwd" or "bwd".
        plan: "module" (the base is called as a module: two kernels per linear and direction, and autograd's addition
            of dx), "owned" (the base's product goes on in place where the update was written), "shared" (and linears
            that share x share the kernels that read it, and one dx).
        hidden: the base's product reads y or dx under its own arithmetic; else that costs what its bytes cost.
        dropout: its seed is drawn by a launch of its own for each shrink.
    """
    sums = sum((len(group) - 1) * added_by_autograd(group[0][0], M) for group in groups) / rates.copy
    if direction == "fwd":
        sums = 0.0
    apart = groups if plan == "shared" else [(shape,) for shape in flat(groups)]
    kernels = [moved for group in apart for moved in _launches(group, M, direction, plan, dropout)]
    extra = sum(max(LAUNCH, moved / rates.copy) for moved in kernels)
    if plan == "shared":
        # One dx has no sums.
        extra -= sums
    if plan != "module" and not hidden:
        extra += sum(WIDTH * M * (N if direction == "fwd" else K) for K, N in flat(groups)) / rates.copy
    return 1 + extra / (base_time(flat(groups), M, rates) + sums)


def peft_overhead(shapes: Sequence[Shape], M: int, direction: str, rates: Rates) -> float:
    """The same for PEFT's eager VB-LoRA on bf16 activations with float32 parameters, many tokens.

    Forward, bytes per token: x to float32 (6 K) and read (4 K); the update written (4 N), added to y (10 N), rounded
    (6 N). Backward: dy to float32 (6 N), read twice (8 N), rounded for the base (6 N); dx written (4 K), x read (4 K),
    dx rounded (6 K), added (6 K). And the gaps between its launches.
    """
    per_token = sum(10 * K + 20 * N if direction == "fwd" else 20 * K + 20 * N for K, N in shapes)
    extra = per_token * M / rates.copy + len(shapes) * PEFT_LAUNCHES[direction] * PEFT_GAP[direction]
    return 1 + extra / base_time(shapes, M, rates)


def table(rates: Rates) -> list[dict[str, float]]:
    """The plans side by side on one layer of Llama-2-7B: what is to be expected at these rates."""
    rows = []
    for M in (256, 4096, 16384):
        row: dict[str, float] = {"M": M}
        for direction in ("fwd", "bwd"):
            row[f"peft_{direction}"] = peft_overhead(flat(LLAMA2_7B), M, direction, rates)
            for plan in PLANS:
                row[f"{plan}_{direction}"] = overhead(LLAMA2_7B, M, direction, plan, rates)
        rows.append(row)
    return rows
