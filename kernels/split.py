"""How fp32 values go through the matrix unit, which multiplies bf16 and adds in fp32, without being rounded to bf16.

An fp32 value v (of A, B, s or ds) goes in as SPLITS bf16 terms of 8 bits each, v = high + middle + low: 3 hold all 24
bits, 2 hold 16.

* Against a 16-bit activation, COPIES copies of the rank stand side by side in the columns of the product, one for each
  term, and `sum_copies` adds up what comes of them: 4 copies for 3 terms, the last one empty, and 2 for 2. At r <= 4
  the 16 columns that the matrix unit wants anyway hold all three terms. An fp16 activation itself goes in as two terms,
  which is exact.
* Where both operands are fp32 values, PAIRS blocks stand side by side along the dimension that is summed, one for each
  product of two terms: 8 for 3 terms and 4 for 2, in the order that `left_term` lists.

An infinity has no such terms (inf - inf): it makes its row NaN, where eager PyTorch may keep it infinite.

fp32 activations meet the fp32 values themselves: 1 term, 1 copy, 1 pair. R_PAD and P_PAD are how many columns a copy
and a pair have.
"""

import triton
import triton.language as tl


@triton.jit
def term(value, which, SPLITS: tl.constexpr):
    """Of an fp32 value, bf16 term number `which`: 0 high, 1 middle, 2 low. Where one term is all, the value itself."""
    if SPLITS == 1:
        return value
    else:
        high = value.to(tl.bfloat16)
        rest = value - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        terms = tl.where(which == 0, high, middle)
        if SPLITS == 3:
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            terms = tl.where(which == 2, low, terms)
        return terms


@triton.jit
def left_term(pair):
    """Number of the left operand's term in a pair; `right_term` is that of the right operand.

    pair    0     1       2       3       4     5     6       7
    left    high  high    middle  middle  high  low   middle  low
    right   high  middle  high    middle  low   high  low     middle

    Two terms have the first four pairs. The ninth pair of three, low with low, lies below the last bit of fp32.
    """
    return tl.where(pair < 4, pair // 2, tl.where(pair % 2 == 1, 2, (pair - 4) // 2))


@triton.jit
def right_term(pair):
    """Number of the right operand's term in a pair; the table is in `left_term`."""
    return tl.where(pair < 4, pair % 2, tl.where(pair % 2 == 1, (pair - 5) // 2, 2))


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
def sum_copies(acc, R_PAD: tl.constexpr, COPIES: tl.constexpr):
    """Add up the copies of the rank: (ROWS, COPIES * R_PAD) -> (ROWS, R_PAD)."""
    if COPIES == 1:
        return acc
    else:
        return tl.sum(tl.reshape(acc, (acc.shape[0], COPIES, R_PAD)), axis=1)
