"""Device functions that the kernels share: mixing tiles of A and B from bank vectors, and products that lose nothing.

The matrix unit multiplies bf16 and adds in fp32. An fp32 value v (of A, B, s or ds) goes in as bf16 terms that add up
to it, v = high + middle + low, 8 bits each:

* Against 16-bit activations, COPIES copies of the rank stand side by side in the columns, one for each term, and are
  added up at the end (`fold`). With 3 TERMS, all 24 bits, there are 4 copies, the last one empty; with 2, 16 bits, 2.
  At r <= 4 the 16 columns that the matrix unit wants anyway hold all three terms. An fp16 activation itself goes in as
  two bf16 terms, which is exact.
* Where both operands are fp32 values, PARTS parts stand side by side along the dimension that is summed, one for each
  product of two terms: 8 with 3 TERMS, 4 with 2.

An infinity has no such terms (inf - inf): it makes its row NaN, where eager PyTorch may keep it infinite.

fp32 activations meet the fp32 values themselves: 1 term, 1 copy, 1 part. R_PAD and P_PAD are the width of a copy and of
a part.
"""

import triton
import triton.language as tl

from .select import select_rows


@triton.jit
def _mix_once(Bank_ptr, Idx_ptr, W_ptr, entry, bank_col, mask_entry, mask_tile, acc, j, VECTOR: tl.constexpr):
    index = tl.load(Idx_ptr + entry + j, mask=mask_entry, other=0)
    weight = tl.load(W_ptr + entry + j, mask=mask_entry, other=0.0)
    vector = tl.load(Bank_ptr + index * VECTOR + bank_col, mask=mask_tile, other=0.0)
    return acc + weight * vector.to(tl.float32)


@triton.jit
def mix(
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    offs_i,
    mask_i,
    start_c,
    C,
    stride_i,
    stride_t,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mix BLOCK_C columns, from start_c on, of rows offs_i of a composed (R, C) matrix: (len(offs_i), BLOCK_C) fp32.

    Column c of row i lies in mixture number i * stride_i + (c // VECTOR) * stride_t; Idx and W hold TOPK entries each.
    """
    offs_c = start_c + tl.arange(0, BLOCK_C)
    mask_tile = mask_i[:, None] & (offs_c < C)[None, :]
    if VECTOR % BLOCK_C == 0:
        # The whole tile lies in one bank vector per row: one index and one weight per row.
        tile = start_c // VECTOR
        entry = ((offs_i * stride_i + tile * stride_t) * TOPK)[:, None]
        bank_col = (offs_c - tile * VECTOR)[None, :]
        # As a tensor: a comparison of two Python numbers is no mask to the interpreter of triton 3.9.
        mask_entry = mask_i[:, None] & (start_c + tl.zeros((1, 1), dtype=tl.int32) < C)
    else:
        tiles = offs_c // VECTOR
        entry = (offs_i[:, None] * stride_i + tiles[None, :] * stride_t) * TOPK
        bank_col = (offs_c - tiles * VECTOR)[None, :]
        mask_entry = mask_tile
    acc = tl.zeros((offs_i.shape[0], BLOCK_C), dtype=tl.float32)
    # Unrolled for the usual few; an inner loop keeps the loads around it from being pipelined.
    if TOPK <= 4:
        for j in tl.static_range(TOPK):
            acc = _mix_once(Bank_ptr, Idx_ptr, W_ptr, entry, bank_col, mask_entry, mask_tile, acc, j, VECTOR)
    else:
        for j in range(TOPK):
            acc = _mix_once(Bank_ptr, Idx_ptr, W_ptr, entry, bank_col, mask_entry, mask_tile, acc, j, VECTOR)
    return acc


@triton.jit
def term(value, which, TERMS: tl.constexpr):
    """Of an fp32 value, bf16 term number `which`: 0 high, 1 middle, 2 low. Where one term is all, the value itself."""
    if TERMS == 1:
        return value
    else:
        high = value.to(tl.bfloat16)
        rest = value - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        terms = tl.where(which == 0, high, middle)
        if TERMS == 3:
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            terms = tl.where(which == 2, low, terms)
        return terms


@triton.jit
def left_term(part):
    """Which term of the left operand stands in a part: parts 0 to 3 pair the first two terms, 4 to 7 add the third."""
    return tl.where(part < 4, part // 2, tl.where(part % 2 == 1, 2, (part - 4) // 2))


@triton.jit
def right_term(part):
    """Which term of the right operand stands in a part; see `left_term`."""
    return tl.where(part < 4, part % 2, tl.where(part % 2 == 1, (part - 5) // 2, 2))


@triton.jit
def dot(activation, operand, acc, INPUT_PRECISION: tl.constexpr):
    """acc + activation @ operand. An fp32 activation meets an fp32 operand, a 16-bit one bf16 terms."""
    if activation.dtype == tl.float32:
        acc = tl.dot(activation, operand, acc, input_precision=INPUT_PRECISION)
    elif activation.dtype == tl.bfloat16:
        acc = tl.dot(activation, operand, acc)
    else:
        high = activation.to(tl.bfloat16)
        low = (activation.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(high, operand, acc)
        acc = tl.dot(low, operand, acc)
    return acc


@triton.jit
def fold(acc, R_PAD: tl.constexpr, COPIES: tl.constexpr):
    """Add up the copies of the rank: (ROWS, COPIES * R_PAD) -> (ROWS, R_PAD)."""
    if COPIES == 1:
        return acc
    else:
        return tl.sum(tl.reshape(acc, (acc.shape[0], COPIES, R_PAD)), axis=1)


@triton.jit
def load_rank_tile(V_ptr, offs_m, mask_m, offs_i, mask_i, R, planes, stride_plane):
    """Add up `planes` planes of an (M, R) fp32 matrix, in order: (len(offs_m), len(offs_i))."""
    v_ptrs = V_ptr + offs_m[:, None] * R + offs_i[None, :]
    mask = mask_m[:, None] & mask_i[None, :]
    v = tl.load(v_ptrs, mask=mask, other=0.0)
    for plane in range(1, planes):
        # In 64 bits: many planes of a large M pass 2^31 elements.
        v += tl.load(v_ptrs + tl.cast(plane, tl.int64) * stride_plane, mask=mask, other=0.0)
    return v


@triton.jit
def keep_mask(Seed_ptr, offs_m, start_k, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of rows offs_m and columns start_k .. start_k + BLOCK_K are kept: (BLOCK_M, BLOCK_K).

    Element (m, k) is kept where its 16 random bits are >= threshold. They are bits 16 * (k % 8) onwards of the 128 that
    Philox gives for the counter (k // 8, m), whatever the tiles: forward and backward see the same mask.
    """
    group = (start_k // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 8), dtype=tl.uint32)
    row = offs_m.to(tl.int64)
    row_low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    row_high = (row >> 32).to(tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = tl.philox(tl.load(Seed_ptr), group[None, :] + zero, row_low, row_high, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, BLOCK_K // 8, 2, 2), the words in order
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (BLOCK_M, BLOCK_K)).to(tl.int32) >= threshold


@triton.jit
def select_tiles(
    Logits_ptr,
    Idx_ptr,
    W_ptr,
    start_c,
    end_c,
    R,
    H,
    stride_row,
    stride_i,
    stride_t,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    K_PAD: tl.constexpr,
    R_SELECT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Select for every row of a composed matrix, in the tiles that hold columns start_c .. end_c; then `mix` may read.

    Programs that share a tile write the same values to the same place; each reads back what it wrote itself.
    """
    offs_i = tl.arange(0, R_SELECT)
    for tile in range(start_c // VECTOR, tl.cdiv(end_c, VECTOR)):
        offs_row = offs_i * stride_i + tile * stride_t
        select_rows(Logits_ptr, Idx_ptr, W_ptr, offs_row, offs_i < R, H, stride_row, TOPK, K_PAD, ONE_BLOCK, BLOCK_H)
    tl.debug_barrier()
