"""The mask of dropout: Philox with 7 rounds, written again here, and what a fair mask must look like."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.models import DEVICE
from vblora_triton.kernels.dropout import Dropout, drop, keep_mask


@triton.jit
def _mask_kernel(
    Seed_ptr, Out_ptr, first_row, M, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, OFFSET: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_k = tl.program_id(1) * BLOCK_K
    offs_k = start_k + tl.arange(0, BLOCK_K)
    keep = keep_mask(Seed_ptr, tl.cast(first_row, tl.int64) + offs_m, OFFSET + start_k, threshold, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(Out_ptr + offs_m[:, None] * K + offs_k[None, :], keep, mask=mask)


@triton.jit
def _drop_kernel(V_ptr, Keep_ptr, Out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(Out_ptr + offs, drop(tl.load(V_ptr + offs), tl.load(Keep_ptr + offs)))


def mask_of(seed, rows, columns, threshold, first_row=0, first_column=0, block=(64, 256)) -> np.ndarray:
    """What the kernel keeps: (rows, columns) bool."""
    out = torch.empty(rows, columns, dtype=torch.int16, device=DEVICE)
    grid = (triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1]))
    seed = torch.tensor([seed], device=DEVICE)
    _mask_kernel[grid](
        seed, out, first_row, rows, columns, threshold, BLOCK_M=block[0], BLOCK_K=block[1], OFFSET=first_column
    )
    assert ((out == 0) | (out == -1)).all()
    return out.cpu().numpy() != 0


def philox(counter: list[np.ndarray], key: list[int], rounds: int = 7) -> list[np.ndarray]:
    """Philox4x32 of Salmon et al. 2011: four words of a counter and two of a key give four random words."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    for i in range(rounds):
        key0, key1 = (
            np.uint64((word + i * step) % 2**32) for word, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        )
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (b >> high) ^ x1 ^ key0, b & low, (a >> high) ^ x3 ^ key1, a & low
    return [x0, x1, x2, x3]


def expected_mask(seed, rows, columns, threshold, first_row=0, first_column=0) -> np.ndarray:
    m = (first_row + np.arange(rows, dtype=np.uint64))[:, None] + np.zeros((1, columns), np.uint64)
    k = (first_column + np.arange(columns, dtype=np.uint64))[None, :] + np.zeros_like(m)
    counter = [k // np.uint64(8), m & np.uint64(0xFFFFFFFF), m >> np.uint64(32), np.zeros_like(m)]
    words = np.stack(philox(counter, [seed % 2**32, (seed >> 32) % 2**32]))
    word = np.take_along_axis(words, (k.astype(np.int64) % 8 // 2)[None], axis=0)[0]
    return (word >> np.uint64(16) * (k % np.uint64(2)) & np.uint64(0x7FFF)) >= threshold


@pytest.mark.parametrize(
    ("word", "key", "random"),
    [
        (0, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (0xFFFFFFFF, 0xFFFFFFFF, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ],
)
def test_philox_as_written_here_gives_the_published_numbers(word, key, random):
    # From kat_vectors of Random123, the authors' own library: "philox4x32 7".
    found = philox([np.array([word], np.uint64)] * 4, [key] * 2)
    assert " ".join(f"{int(x[0]):08x}" for x in found) == random


@pytest.mark.parametrize("threshold", [0, 1, 3277, 2**14, 2**15 - 1, 2**15])
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 7, -3])
def test_mask_is_that_of_philox(seed, threshold):
    # Sizes that no block divides.
    found = mask_of(seed, 70, 200, threshold, block=(32, 64))
    assert np.array_equal(found, expected_mask(seed, 70, 200, threshold))


@pytest.mark.parametrize("first_row", [2**16 - 9, 2**31 - 9, 2**32 - 9, 2**33 + 1])
def test_rows_far_down_have_masks_of_their_own(first_row):
    found = mask_of(11, 20, 128, 2**14, first_row)
    assert np.array_equal(found, expected_mask(11, 20, 128, 2**14, first_row))


@pytest.mark.parametrize("apart", [1, 2**8, 2**16, 2**24, 2**31, 2**32, 2**33])
def test_no_row_repeats_another(apart):
    rows = [mask_of(3, 16, 256, 2**14, first_row) for first_row in (0, apart, 2 * apart, 3 * apart)]
    every = np.concatenate([part[:1] for part in rows])
    assert len(np.unique(every, axis=0)) == 4
    # Half of the bits of two unlike rows agree, give or take five standard deviations.
    assert all(abs((rows[0] == other).mean() - 0.5) < 2.5 / 64 for other in rows[1:])


def test_no_column_repeats_another():
    columns = [mask_of(3, 256, 16, 2**14, first_column=first) for first in (0, 2**8, 2**16, 2**24, 2**30)]
    assert all(abs((columns[0] == other).mean() - 0.5) < 2.5 / 64 for other in columns[1:])


@pytest.mark.parametrize("block", [(1, 8), (16, 16), (128, 32), (8, 512)], ids=str)
def test_mask_does_not_hang_on_the_tiles(block):
    assert np.array_equal(mask_of(9, 24, 96, 9000, block=block), mask_of(9, 24, 96, 9000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_dropped_is_zero_whatever_it_was_and_the_rest_is_untouched(dtype):
    value = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    value[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    value[4:8] = value[:4]
    keep = torch.ones(64, dtype=torch.int16) * -(torch.arange(64) % 3 != 0).to(torch.int16)
    keep[:8] = torch.tensor([0, 0, 0, 0, -1, -1, -1, -1])
    out = torch.empty(64, dtype=dtype, device=DEVICE)
    _drop_kernel[(1,)](value.to(DEVICE), keep.to(DEVICE), out, N=64)
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    expected = torch.where(keep != 0, value.view(bits), torch.zeros(64, dtype=bits))
    assert torch.equal(out.cpu().view(bits), expected)


def test_the_rate_is_the_nearest_multiple_of_2_to_the_minus_15():
    for p in (0.0, 2**-15, 0.05, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-15, 1.0):
        dropout = Dropout.of(p, None)
        assert abs(dropout.threshold / 2**15 - p) <= 2**-16
        # What is kept, times its scale, is 1 on average.
        assert dropout.scale * (1 - dropout.threshold / 2**15) == pytest.approx(1 if p < 1 else 0, rel=1e-12)


# Statistics of masks of 1024 x 2048 elements. A bound of five standard deviations fails a fair mask once in two million
# times, and the seeds are fixed: a test that passes, passes always.
ROWS, COLUMNS = 1024, 2048


@pytest.fixture(scope="module", params=[(1, 2**14), (2, 3277), (2**50 + 3, 31000)], ids=lambda case: f"p{case[1]}")
def fair(request):
    """A mask as numbers of mean 0 and variance 1, and the probability to be dropped."""
    seed, threshold = request.param
    p = threshold / 2**15
    return (mask_of(seed, ROWS, COLUMNS, threshold) - (1 - p)) / np.sqrt(p * (1 - p)), p


def chi_square_is_fair(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether counts lie as far from what is expected as chance makes them: within five standard deviations."""
    freedom = counts.size - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)


def test_as_many_are_dropped_in_each_row_column_and_diagonal(fair):
    z, _ = fair
    assert abs(z.sum()) < 5 * np.sqrt(z.size)
    diagonals = np.stack([np.roll(z[i], -i) for i in range(ROWS)]).sum(0)
    for sums, n in ((z.sum(1), COLUMNS), (z.sum(0), ROWS), (diagonals, ROWS)):
        assert abs(sums).max() < 5.5 * np.sqrt(n)
        # And they spread as sums of independent elements do: the sum of their squares is a chi-square.
        assert abs((sums**2 / n).sum() - len(sums)) < 5 * np.sqrt(2 * len(sums))


def test_neighbours_are_independent(fair):
    z, _ = fair
    for lag in range(1, 17):
        pairs = (z[lag:], z[:-lag]), (z[:, lag:], z[:, :-lag]), (z[lag:, lag:], z[:-lag, :-lag])
        for a, b in pairs:
            assert abs((a * b).sum()) < 5 * np.sqrt(a.size), lag


def test_of_eight_in_a_row_every_pattern_is_as_frequent_as_it_should_be(fair):
    z, p = fair
    kept = z > 0
    ones = np.array([bin(pattern).count("1") for pattern in range(256)])
    probability = (1 - p) ** ones * p ** (8 - ones)
    powers = 2 ** np.arange(8)
    # The eight that one draw of Philox gives; eight that two give; eight of one column; one of each of eight draws.
    tuples = [kept.reshape(-1, 8), kept[:, 4:-4].reshape(-1, 8), kept.T.reshape(-1, 8)]
    tuples += [kept.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 8)]
    for eights in tuples:
        counts = np.bincount(eights @ powers, minlength=256)
        # Patterns too rare for the test, of which fewer than 10 are expected, count as one.
        common = probability * len(eights) >= 10
        counts = np.append(counts[common], counts[~common].sum())
        expected = np.append(probability[common], max(probability[~common].sum(), 1e-12)) * len(eights)
        assert chi_square_is_fair(counts[expected > 1], expected[expected > 1])


def test_seeds_near_each_other_give_independent_masks():
    p = 0.5
    masks = [mask_of(seed, 256, 1024, 2**14) - p for seed in (0, 1, 2, 3, 2**32, 2**63 - 1, -1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a * b).sum() / (p * p)) < 5 * np.sqrt(a.size)
            # Nor is one the other, moved by a row or a draw of Philox.
            assert abs((a[1:] * b[:-1]).sum() / (p * p)) < 5 * np.sqrt(a.size)
            assert abs((a[:, 8:] * b[:, :-8]).sum() / (p * p)) < 5 * np.sqrt(a.size)
