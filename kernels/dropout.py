"""Dropout inside the kernels: a mask that is made from a seed wherever it is needed, and never stored."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def keep_mask(Seed_ptr, offs_m, start_k, threshold, BLOCK_K: tl.constexpr):
    """Which elements of rows offs_m and columns start_k .. start_k + BLOCK_K are kept: (len(offs_m), BLOCK_K) int16.

    All 16 bits are set where an element is kept, and none where it is dropped: what `drop` wants. Element (m, k) is
    kept where its 15 random bits are >= threshold. They are bits 16 * (k % 8) onwards of the 128 that Philox gives for
    the counter (k // 8, m), whatever the tiles: forward and backward see the same mask.
    """
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    group = (start_k // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 8), dtype=tl.uint32)
    row = offs_m.to(tl.int64)
    row_low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    row_high = (row >> 32).to(tl.uint32)[:, None] + zero
    # 7 rounds are the fewest that pass every statistical test known (Salmon et al. 2011, "Parallel random numbers: as
    # easy as 1, 2, 3"); tests/kernels/test_dropout.py has our own.
    w0, w1, w2, w3 = tl.philox(tl.load(Seed_ptr), group[None, :] + zero, row_low, row_high, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, BLOCK_K // 8, 2, 2), the words in order
    # Two elements at a time, one in each half of a word: adding 2^15 - threshold to 15 bits sets the 16th where they
    # are >= threshold, and never carries into the other half. Then that bit is spread over its half.
    reached = (words & 0x7FFF7FFF) + tl.cast(0x8000 - threshold, tl.uint32) * 0x10001
    kept = ((reached >> 15) & 0x10001) * 0xFFFF
    return tl.reshape(tl.join(kept.to(tl.int16), (kept >> 16).to(tl.int16)), (BLOCK_M, BLOCK_K))


@triton.jit
def drop(value, keep):
    """`value`, of 16 or 32 bits, where `keep`, of `keep_mask`, is set; 0 elsewhere."""
    # On the bits, and not by a comparison: of two 16-bit elements in one register the compiler masks both at once.
    INTEGER: tl.constexpr = tl.int16 if value.dtype.primitive_bitwidth == 16 else tl.int32
    return (value.to(INTEGER, bitcast=True) & keep.to(INTEGER)).to(value.dtype, bitcast=True)


class Dropout(NamedTuple):
    """Drop an element of x where its 15 random bits are below `threshold`; multiply the others by `scale`.

    Without a `seed` nothing is dropped.
    """

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> "Dropout":
        """With probability p, to the nearest multiple of 2^-15, from an int64 seed of one element; None for none."""
        threshold = round(p * 2**15)
        return cls(seed, threshold, 2**15 / (2**15 - threshold) if threshold < 2**15 else 0.0)
