"""Dropout inside the kernels: a mask that is made from a seed wherever it is needed, and never stored."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def keep_mask(Seed_ptr, offs_m, start_k, threshold, BLOCK_K: tl.constexpr):
    """Which elements of rows offs_m and columns start_k .. start_k + BLOCK_K are kept: (len(offs_m), BLOCK_K).

    Element (m, k) is kept where its 16 random bits are >= threshold. They are bits 16 * (k % 8) onwards of the 128 that
    Philox gives for the counter (k // 8, m), whatever the tiles: forward and backward see the same mask.
    """
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    group = (start_k // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 8), dtype=tl.uint32)
    row = offs_m.to(tl.int64)
    row_low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    row_high = (row >> 32).to(tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = tl.philox(tl.load(Seed_ptr), group[None, :] + zero, row_low, row_high, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, BLOCK_K // 8, 2, 2), the words in order
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (BLOCK_M, BLOCK_K)).to(tl.int32) >= threshold


class Dropout(NamedTuple):
    """Drop an element of x where its 16 random bits are below `threshold`; multiply the others by `scale`.

    Without a `seed` nothing is dropped.
    """

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> "Dropout":
        """With probability p, to the nearest multiple of 2^-16, from an int64 seed of one element; None for none."""
        threshold = round(p * 2**16)
        return cls(seed, threshold, 2**16 / (2**16 - threshold) if threshold < 2**16 else 0.0)
