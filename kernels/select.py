"""Top-k selection: which bank vectors each row of logits picks, and with which weights."""

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .split import term


@triton.jit
def _codes(Logits_ptr, offs_row, mask_row, start_h, H, stride_row, BLOCK_H: tl.constexpr):
    """Code each logit as an int64 with the order of selection: the value first, then the lower index; NaN on top.

    The high 32 bits order like the fp32 value, the low ones fall with the index. -0x7FFFFFFFFFFFFFFF is below them all.
    """
    offs_h = start_h + tl.arange(0, BLOCK_H)
    mask = mask_row[:, None] & (offs_h < H)[None, :]
    value = tl.load(Logits_ptr + offs_row[:, None] * stride_row + offs_h[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value == 0.0, 0, order)
    order = tl.where(value != value, 0x7FFFFFFF, order)
    code = (order.to(tl.int64) << 32) | (0x7FFFFFFF - offs_h).to(tl.int64)[None, :]
    return tl.where((offs_h < H)[None, :], code, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _select_rows(
    Logits_ptr,
    Idx_ptr,
    W_ptr,
    offs_row,
    mask_row,
    H,
    stride_row,
    TOPK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Select for the rows offs_row, write TOPK indices and weights of each, and return them: (rows, K_PAD)."""
    offs_row = offs_row.to(tl.int64)
    BLOCK_ROWS: tl.constexpr = offs_row.shape[0]
    K_PAD: tl.constexpr = triton.next_power_of_2(TOPK)
    offs_k = tl.arange(0, K_PAD)
    values = tl.full((BLOCK_ROWS, K_PAD), float("-inf"), dtype=tl.float32)
    indices = tl.zeros((BLOCK_ROWS, K_PAD), dtype=tl.int32)
    previous = tl.full((BLOCK_ROWS,), 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    if ONE_BLOCK:
        codes = _codes(Logits_ptr, offs_row, mask_row, 0, H, stride_row, BLOCK_H)
    for k in range(TOPK):
        best = tl.full((BLOCK_ROWS,), -0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
        if ONE_BLOCK:
            best = tl.max(tl.where(codes < previous[:, None], codes, -0x7FFFFFFFFFFFFFFF), axis=1)
        else:
            for start_h in range(0, H, BLOCK_H):
                block = _codes(Logits_ptr, offs_row, mask_row, start_h, H, stride_row, BLOCK_H)
                best = tl.maximum(best, tl.max(tl.where(block < previous[:, None], block, -0x7FFFFFFFFFFFFFFF), axis=1))
        order = (best >> 32).to(tl.int32)
        value = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
        index = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        values = tl.where(offs_k[None, :] == k, value[:, None], values)
        indices = tl.where(offs_k[None, :] == k, index[:, None], indices)
        previous = best
    exponentials = tl.exp(values - tl.max(values, axis=1)[:, None])
    exponentials = tl.where(offs_k[None, :] < TOPK, exponentials, 0.0)
    weights = exponentials / tl.sum(exponentials, axis=1)[:, None]
    offs_out = offs_row[:, None] * TOPK + offs_k[None, :]
    mask_out = mask_row[:, None] & (offs_k < TOPK)[None, :]
    tl.store(Idx_ptr + offs_out, indices, mask=mask_out)
    tl.store(W_ptr + offs_out, weights, mask=mask_out)
    return indices, weights


@triton.jit
def _mix_rows(
    Bank_ptr,
    Out_ptr,
    indices,
    weights,
    offs_row,
    mask_row,
    stride_term,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mix what has been selected for the rows offs_row, and write it in its terms, Out (SPLITS, rows, VECTOR)."""
    offs_k = tl.arange(0, indices.shape[1])[None, :]
    for start_c in range(0, VECTOR, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)[None, :]
        mask = mask_row[:, None] & (offs_c < VECTOR)
        mixture = tl.zeros((offs_row.shape[0], BLOCK_C), dtype=tl.float32)
        for k in range(TOPK):
            index = tl.sum(tl.where(offs_k == k, indices, 0), axis=1)[:, None]
            weight = tl.sum(tl.where(offs_k == k, weights, 0.0), axis=1)[:, None]
            mixture += weight * tl.load(Bank_ptr + index * VECTOR + offs_c, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = Out_ptr + (offs_row.to(tl.int64)[:, None] * VECTOR + offs_c)
        for i in tl.static_range(SPLITS):
            tl.store(out_ptrs + tl.cast(stride_term, tl.int64) * i, term(mixture, i, SPLITS), mask=mask)


@triton.jit
def _select_kernel(
    LogitsA_ptr,
    LogitsB_ptr,
    Bank_ptr,
    IdxA_ptr,
    WA_ptr,
    IdxB_ptr,
    WB_ptr,
    A_ptr,
    rows_A,
    rows_B,
    H,
    stride_A,
    stride_B,
    stride_term,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs for blocks of rows of logits_A come first, then those for logits_B.

    The first ones also write the mixtures of their rows in their terms, A (SPLITS, rows_A, VECTOR), where it is given.
    """
    pid = tl.program_id(0)
    programs_A = tl.cdiv(rows_A, BLOCK_ROWS)
    offs = tl.arange(0, BLOCK_ROWS)
    if pid < programs_A:
        offs_row = pid * BLOCK_ROWS + offs
        mask = offs_row < rows_A
        indices, weights = _select_rows(
            LogitsA_ptr, IdxA_ptr, WA_ptr, offs_row, mask, H, stride_A, TOPK, ONE_BLOCK, BLOCK_H
        )
        if A_ptr is not None:
            _mix_rows(Bank_ptr, A_ptr, indices, weights, offs_row, mask, stride_term, VECTOR, TOPK, SPLITS, BLOCK_C)
    else:
        offs_row = (pid - programs_A) * BLOCK_ROWS + offs
        _select_rows(LogitsB_ptr, IdxB_ptr, WB_ptr, offs_row, offs_row < rows_B, H, stride_B, TOPK, ONE_BLOCK, BLOCK_H)


def launch_select(
    logits_A: Tensor,
    logits_B: Tensor,
    selection: tuple[Tensor, Tensor, Tensor, Tensor],
    vector_bank: Tensor | None = None,
    A: Tensor | None = None,
) -> None:
    """Select for the rows of both logits in one launch, and mix those of A where it is given.

    Args:
        logits_A, logits_B: (rows_A, num_vectors) and (rows_B, num_vectors), the last dimension contiguous.
        selection: indices_A, weights_A, indices_B, weights_B: as many rows of topk, at most num_vectors, int32 and
            fp32, contiguous; written, the largest logit of a row first.
        vector_bank: (num_vectors, vector_length), contiguous; where A is given.
        A: (terms, rows_A, vector_length), each term contiguous, written: of each mixture its bf16 terms (split.py), or
            in fp32 the mixture.
    """
    (rows_A, H), rows_B, topk = logits_A.shape, logits_B.shape[0], selection[0].shape[-1]
    indices_A, weights_A, indices_B, weights_B = selection
    splits, _, vector_length = (1, 0, 1) if A is None else A.shape
    config = tuning.select(H, topk, vector_length)
    rows = config["BLOCK_ROWS"]
    launch(
        _select_kernel,
        (tuning.cdiv(rows_A, rows) + tuning.cdiv(rows_B, rows),),
        LogitsA_ptr=logits_A,
        LogitsB_ptr=logits_B,
        Bank_ptr=vector_bank,
        IdxA_ptr=indices_A,
        WA_ptr=weights_A,
        IdxB_ptr=indices_B,
        WB_ptr=weights_B,
        A_ptr=A,
        rows_A=rows_A,
        rows_B=rows_B,
        H=H,
        stride_A=logits_A.stride(0),
        stride_B=logits_B.stride(0),
        stride_term=0 if A is None else A.stride(0),
        VECTOR=vector_length,
        TOPK=topk,
        SPLITS=splits,
        **config,
    )
