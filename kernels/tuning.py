"""Launch shapes: the fixed defaults of every kernel, per shape class.

A number here that was measured carries its measurement; the others are first choices by arithmetic.
"""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch

# Programs that a launch over a large input should have: two for each multiprocessor of an H100 or H200 (132), so that
# one computes while the other waits for memory.
PROGRAMS = 264


def remembered(choose: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
    """Decorate what chooses a launch's shape, for which every launch asks: it chooses once for the same arguments."""
    chosen = lru_cache(maxsize=1024)(choose)
    return wraps(choose)(lambda *sizes: dict(chosen(*sizes)))


def power_of_2(n: int) -> int:
    """The least power of 2 that is >= n."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    return -(-n // d)


def _splits(dtype: torch.dtype, r: int) -> int:
    """bf16 terms of an fp32 operand of rank r beside activations of `dtype` (split.py).

    Three lose nothing, and fit where the matrix unit would pad; beyond r = 8 their columns would cost registers.
    """
    if dtype == torch.float32:
        return 1
    return 3 if r <= 8 else 2


@remembered
def copies(dtype: torch.dtype, r: int) -> dict[str, int]:
    """Columns in which an operand of rank r meets an activation of `dtype`: at least the 16 of a matrix instruction."""
    splits = _splits(dtype, r)
    count = {1: 1, 2: 2, 3: 4}[splits]
    return {"R_PAD": max(16 // count, power_of_2(r)), "COPIES": count, "SPLITS": splits}


def input_precision() -> str:
    """How fp32 activations are multiplied: as `torch.get_float32_matmul_precision()` says.

    "high" allows tf32 or three bf16 products; three tf32 products cost nothing here, where memory is the limit.
    """
    if torch.version.hip is not None:
        # Triton has no three tf32 products there.
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


@remembered
def select(H: int, topk: int, vector_length: int) -> dict[str, int]:
    block_h = power_of_2(H) if H <= 4096 else 2048
    return {
        "ONE_BLOCK": block_h >= H,
        "BLOCK_ROWS": max(1, 1024 // max(block_h, power_of_2(topk))),
        "BLOCK_H": block_h,
        "BLOCK_C": min(256, power_of_2(vector_length)),
        "num_warps": 8 if block_h >= 2048 else 4,
    }


# Rows up to which A is mixed inside the product with x: few programs read it then, and none twice.
FEW_ROWS = 16
# Rows up to which the base's product comes first, in fp32, and kernels add to it (ops/overlap.py): of more, cuBLAS
# leaves no multiprocessor free. 512 x 4096 elements are 128 blocks of 128 x 128.
FIRST_ROWS = 512


def tile(M: int, dtype: torch.dtype, r: int) -> tuple[int, dict[str, int], int]:
    """Rows, launch options and columns of the tile of an activation that one step of a product works on.

    As large as compiles without spills for sm_80, sm_90, sm_100 and gfx942 (python -m tools.kernels_report).
    """
    if dtype == torch.float32:
        rows, columns, warps, stages = 32, 64, 8, 2
    elif r > 16:
        rows, columns, warps, stages = 32, 64, 8, 1
    elif r > 4 or dtype == torch.float16:
        rows, columns, warps, stages = 64, 64, 4, 2
    else:
        rows, columns, warps, stages = 64, 128, 4, 3
    if M <= FEW_ROWS:
        rows, stages = 16, min(stages, 2)
    return rows, {"num_warps": warps, "num_stages": stages}, columns


def _shares(size: int, block: int, programs: int) -> dict[str, int]:
    """Blocks of each program where about `programs` of them share `size`, and how many programs that makes.

    Blocks and not elements: their number follows M and is not known to the compiler, that their size divides where a
    program starts is.
    """
    each = cdiv(cdiv(size, programs), block)
    return {"blocks_each": each, "PARTIALS": cdiv(size, each * block)}


@remembered
def shrink_fwd(M: int, K: int, dtype: torch.dtype, r: int) -> dict[str, int]:
    """PARTIALS programs share the columns of one block of rows; each takes blocks_each blocks of them.

    One partial from 4096 rows on: whoever reads s adds up its partials again for every block of columns of y.
    """
    rows, options, block_k = tile(M, dtype, r)
    few = M <= FEW_ROWS
    if few:
        # One block of columns for each program, which then waits for memory once.
        block_k, options["num_stages"] = 2 * block_k, 1
    elif dtype != torch.float32 and r <= 16:
        rows, options, block_k = 32, {"num_warps": 4, "num_stages": 4}, 128
    partials = max(1, min(PROGRAMS // 2 // cdiv(M, rows), cdiv(K, block_k if few else 512)))
    return {"BLOCK_M": rows, "BLOCK_K": block_k, **_shares(K, block_k, partials), **options}


@remembered
def expand_fwd(M: int, N: int, dtype: torch.dtype, r: int, adds: bool = False) -> dict[str, int]:
    """A program takes a block of columns of y and blocks_each blocks of rows.

    Args:
        adds: to the base's result.
    """
    rows, options, columns = tile(M, dtype, r)
    # Nothing large is read; what is waited for, of few rows, is partials.
    ahead = 8 if r <= 4 else 1
    if adds and M <= FEW_ROWS and r <= 4:
        # Forecast for q and down of Llama-2-7B, one token: 2.9 and 3.6 us; by 4 warps and 8 partials 4.5 and 8.2.
        ahead, options["num_warps"] = 16, 8
    elif adds and M <= FIRST_ROWS:
        # Of fp32 wider ones take most registers.
        columns = min(columns, 64 if r <= 32 else 32)
    chunks = max(1, min(2 * PROGRAMS // cdiv(N, columns), cdiv(M, rows)))
    return {"AHEAD": ahead, "BLOCK_M": rows, "BLOCK_N": columns, **_shares(M, rows, chunks), **options, "num_stages": 1}


@remembered
def two_products(
    M: int, C: int, dtype: torch.dtype, r: int, of_x: bool = False, adds: bool = False, drops: bool = False
) -> dict[str, int]:
    """Either pass of backward over an (M, C) activation: a program takes a block of columns and blocks_each of rows.

    Args:
        of_x: the pass over x, and not that over dy.
        adds: the pass also reads what it writes, and adds to it.
        drops: with dropout, which takes registers.
    """
    rows, options, columns = tile(M, dtype, r)
    if drops:
        options["num_stages"] = min(options["num_stages"], 2)
    if of_x and 4 < r <= 16 and dtype == torch.bfloat16 and M > FEW_ROWS and not drops:
        # Forecast for q, k and v of Llama-2-7B together, M 4096, r 12: 22 us; by 64 x 64 elements 33, floor 16.
        rows, columns, options = 32, 128, {"num_warps": 4, "num_stages": 3}
    if adds and FEW_ROWS < M <= FIRST_ROWS and r <= 4 and dtype == torch.bfloat16 and not drops:
        # Forecast for down of Llama-2-7B, M 256: 7.1 us; by 64 x 64 elements 10.1.
        rows, columns, options["num_warps"] = 32, 128, 8
    elif adds:
        # More spill on sm_80.
        columns = min(columns, 64)
    if r > 32 and dtype != torch.float32:
        # Two accumulators of so many columns spill.
        columns = 32
    chunks = max(1, min(PROGRAMS // cdiv(C, columns), cdiv(M, rows)))
    return {"BLOCK_M": rows, "BLOCK_C": columns, **_shares(M, rows, chunks), **options}


def blocks_each(blocks: int, r: int) -> int:
    """Blocks of columns that one program of expand's backward takes, adding its ds up in one partial.

    More where the rank is large, so that the partials, (blocks / blocks_each, M, r) fp32, stay small beside dy.
    """
    return max(1, min(blocks, r // 3))


@remembered
def parameter_grads(H: int, vector_length: int, topk: int) -> dict[str, int]:
    """For a bank (H, vector_length); BLOCK_V vectors share a program, more of a large bank, of which few are picked.

    Of the tiles that compile without spills for sm_80, sm_90, sm_100 and gfx942 the forecast's best: 27 us for a block
    of Llama-2-7B, where 8 vectors by 32 columns, 512 entries and 4 partials at once took 51.
    """
    k_pad = power_of_2(topk)
    return {
        "PARTIALS": 8,
        "MATCHES": 8,
        "BLOCK_V": 4 if H <= 512 else 32,
        "BLOCK_E": 2048 if vector_length % 64 else 1024,
        "BLOCK_C": 64,
        "BLOCK_ROW": max(16, min(power_of_2(vector_length), 512 // k_pad)),
        "BLOCK_H": max(16, min(power_of_2(H), 512 // k_pad)),
        "num_warps": 4,
    }


@remembered
def sum_partials(partials: int) -> dict[str, int]:
    """All of up to 32 partials come from memory at once: the first, and AHEAD more."""
    return {"AHEAD": max(1, min(power_of_2(partials), 32) - 1), "BLOCK": 128, "num_warps": 4}


@remembered
def compose(vector_length: int) -> dict[str, int]:
    return {"BLOCK_ROWS": 16, "BLOCK_C": min(128, max(16, power_of_2(vector_length))), "num_warps": 4}


# Rows up to which a product with a projection costs what reading the projection costs, however many terms it is
# multiplied in.
FEW_VERA_ROWS = 64
# Columns of p that have one scale.
PACK_GROUP = 128
# Elements below which p is too small to be worth packing: 2^16 levels are fewer than the error bound asks for now and
# then where few elements have a part in a gradient.
UNPACKED = 2**18


def packed_columns(M: int, r: int) -> int:
    """Columns of 16 bits in which p is kept: r where it is packed, 2 r where it is terms.

    Without a question about M, so that a graph holds for any.
    """
    return r * (1 + torch.sym_min(1, (UNPACKED - 1) // torch.sym_max(M * r, 1)))


def terms() -> int:
    """Terms of A, and of p, where the gradients of VeRA's scales hang on them: 16 bits.

    8 where `torch.get_float32_matmul_precision()` is "medium", which allows as much.
    """
    return 1 if torch.get_float32_matmul_precision() == "medium" else 2


def rank_terms(M: int, dtype: torch.dtype) -> int:
    """Pairs of terms of two fp32 matrices in a product with a result in `dtype`: the high terms, or all but the lowest.

    One for 16 bits, which together round no more than the result itself does; three where they cost nothing.
    """
    return 3 if terms() == 2 and (dtype == torch.float32 or M <= FEW_VERA_ROWS) else 1


def low_rows(r: int) -> int:
    """Rows of A whose low terms count in dx = dp A, in 16 bits.

    With C, dp and A all rounded, dx would be as wrong as is allowed, twice the rounding of dx itself: sqrt(1 + 3). With
    half of A it is sqrt(1 + 2.5), which needs many rows to hold; with all, sqrt(1 + 2).
    """
    if terms() == 1:
        return 0
    return r if r <= 256 else r // 2


@remembered
def pack_rows() -> dict[str, int]:
    return {"BLOCK_M": 16, "BLOCK_P": 256, "BLOCK_S": 8, "num_warps": 4}


@remembered
def drop() -> dict[str, int]:
    return {"BLOCK_M": 16, "BLOCK_K": 256, "num_warps": 4}


@remembered
def scale(r: int) -> dict[str, int]:
    return {"BLOCK_N": 16, "BLOCK_R": min(256, max(16, power_of_2(r))), "num_warps": 4}
