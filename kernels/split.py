"""How fp32 values go through the matrix unit, which multiplies bf16 and adds in fp32, without being rounded to bf16.

An fp32 value v (of A, B, s or ds) goes in as SPLITS bf16 terms of 8 bits each, v = high + middle + low: 3 hold all 24
bits, 2 hold 16.

* Against a 16-bit activation, COPIES copies of the rank stand side by side in the columns of the product, one for each
  term, and `sum_copies` adds up what comes of them: 4 copies for 3 terms, the last one empty, and 2 for 2. At r <= 4
  the 16 columns that the matrix unit wants anyway hold all three terms. An fp16 activation itself goes in as two terms,
  which is exact.
* Where both operands are fp32 values, the left one stands there in its copies, and meets in turn each term of the
  right one: `dot_terms`.

An infinity has no such terms (inf - inf): it makes its row NaN, where eager PyTorch may keep it infinite.

fp32 activations meet the fp32 values themselves: 1 term, 1 copy. R_PAD is how many columns a copy has.
"""

import triton
import triton.language as tl


@triton.jit
def terms(value):
    """The three bf16 terms of an fp32 value."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def term(value, which, SPLITS: tl.constexpr):
    """Of an fp32 value, bf16 term number `which`: 0 high, 1 middle, 2 low. Where one term is all, the value itself."""
    if SPLITS == 1:
        return value
    else:
        high, middle, low = terms(value)
        found = tl.where(which == 0, high, middle)
        if SPLITS == 3:
            found = tl.where(which == 2, low, found)
        return found


@triton.jit
def right_terms(value, SPLITS: tl.constexpr):
    """What `dot_terms` wants of its right operand, an fp32 value."""
    if SPLITS == 1:
        return value, value, value
    else:
        return terms(value)


@triton.jit
def dot_terms(left, high, middle, low, SPLITS: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """left @ right of two fp32 values: left in copies (`term`), right in its terms, the smallest products first."""
    if SPLITS == 1:
        return tl.dot(left, high, input_precision=INPUT_PRECISION)
    else:
        acc = tl.zeros((left.shape[0], high.shape[1]), dtype=tl.float32)
        if SPLITS == 3:
            acc = tl.dot(left, low, acc)
        acc = tl.dot(left, middle, acc)
        return tl.dot(left, high, acc)


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
