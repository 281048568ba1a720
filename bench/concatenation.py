"""An experiment, `python -m bench --concatenation`: base and VeRA's update as one product of longer rows.

    y = x W^T + p B^T = [x, p] [W, B]^T

with x (M, K), W (N, K), p (M, r) and B (N, r), bf16. The two products read and write y twice; the one reads K + r
columns at once, and wants x and p, W and B side by side in memory: what making x so costs is timed too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.cases import LINEARS
from bench.device import Call, Device


class Row(NamedTuple):
    """µs of y as two products; as one of operands that lie side by side; and as that with x and p copied there."""

    shape: str
    M: int
    r: int
    two: float
    one: float
    copied: float


def compare(device: Device, shapes: Sequence[str], tokens: Sequence[int], ranks: Sequence[int]) -> list[Row]:
    """Time them in turns of ten runs."""
    return [
        Row(shape, M, r, *(device.median_seconds(call) * 1e6 for call in calls(device, shape, M, r)))
        for shape in shapes
        for M in tokens
        for r in ranks
    ]


def calls(device: Device, shape: str, M: int, r: int) -> tuple[Call, Call, Call]:
    """The three ways, each of which returns y."""
    K, N = LINEARS[shape]
    generator = torch.Generator(device.torch_device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        made = torch.empty(size, dtype=torch.float32, device=device.torch_device).normal_(generator=generator)
        return made.to(torch.bfloat16)

    x, weight, p, B = random(M, K), random(N, K), random(M, r), random(N, r)
    xp, wide = torch.cat([x, p], dim=1), torch.cat([weight, B], dim=1)
    into = torch.empty_like(xp)
    return (
        lambda i: torch.mm(x, weight.T).addmm_(p, B.T),
        lambda i: torch.mm(xp, wide.T),
        lambda i: torch.mm(torch.cat([x, p], dim=1, out=into), wide.T),
    )


def show(rows: Sequence[Row]) -> None:
    print(f"{'linear':18} {'tokens':>7} {'r':>5} {'two products':>13} {'one':>9} {'one, x copied':>14}   µs")
    for row in rows:
        print(f"{row.shape:18} {row.M:7} {row.r:5} {row.two:13.1f} {row.one:9.1f} {row.copied:14.1f}")
