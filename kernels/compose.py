"""Composition: tiles of A and B mixed from bank vectors inside other kernels, and mixtures written out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .split import term


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
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    stride_i,
    stride_t,
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
def _compose_fwd_kernel(
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Out_ptr,
    rows,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mix BLOCK_ROWS rows, BLOCK_C columns of each, and write them in their terms, Out (SPLITS, rows, VECTOR)."""
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < rows
    start_c = tl.program_id(1) * BLOCK_C
    offs_c = start_c + tl.arange(0, BLOCK_C)
    out = mix(
        Bank_ptr, Idx_ptr, W_ptr, offs_row, mask_row, start_c, VECTOR, VECTOR, TOPK, BLOCK_C, stride_i=1, stride_t=0
    )
    out_ptrs = Out_ptr + (offs_row[:, None] * VECTOR + offs_c[None, :])
    mask = mask_row[:, None] & (offs_c < VECTOR)[None, :]
    for i in tl.static_range(SPLITS):
        tl.store(
            out_ptrs + tl.cast(rows, tl.int64) * (i * VECTOR),
            term(out, i, SPLITS).to(Out_ptr.dtype.element_ty),
            mask=mask,
        )


def launch_compose_fwd(vector_bank: Tensor, indices: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = sum_k weights_k vector_bank[indices_k].

    Args:
        vector_bank: (num_vectors, vector_length), contiguous.
        indices, weights: (rows, topk), int32 and fp32, contiguous.
        out: (rows, vector_length), or (terms, rows, vector_length) for the bf16 terms of each mixture (split.py);
            contiguous, written.
    """
    (rows, topk), vector_length = indices.shape, vector_bank.shape[1]
    config = tuning.compose(vector_length)
    launch(
        _compose_fwd_kernel,
        (tuning.cdiv(rows, config["BLOCK_ROWS"]), tuning.cdiv(vector_length, config["BLOCK_C"])),
        Bank_ptr=vector_bank,
        Idx_ptr=indices,
        W_ptr=weights,
        Out_ptr=out,
        rows=rows,
        VECTOR=vector_length,
        TOPK=topk,
        SPLITS=out.shape[0] if out.dim() == 3 else 1,
        **config,
    )


def new_terms(r: int, K: int, vector_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for A (r, K) as products with x of `dtype` read it, (terms, r * K/vector_length, vector_length)."""
    splits = tuning.copies(dtype, r)["SPLITS"]
    terms = torch.float32 if splits == 1 else torch.bfloat16
    return torch.empty((splits, r * K // vector_length, vector_length), dtype=terms, device=device)
