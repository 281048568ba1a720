"""Gradients of the parameters: from dA and dB to the logits and the bank, in one launch, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .partials import load_partials_at_once


@triton.jit
def _logits_grad_row(
    D_ptr,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    DLogits_ptr,
    row,
    H,
    partials,
    stride_dp,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dlogits[row, index_k] = w_k (g_k - sum_j w_j g_j), g_k = d . bank[index_k]; zero elsewhere.

    d, (VECTOR), is this row of dA or dB: the gradient of its mixture.
    """
    K_PAD: tl.constexpr = triton.next_power_of_2(TOPK)
    offs_k = tl.arange(0, K_PAD)
    mask_k = offs_k < TOPK
    index = tl.load(Idx_ptr + row * TOPK + offs_k, mask=mask_k, other=0)
    weight = tl.load(W_ptr + row * TOPK + offs_k, mask=mask_k, other=0.0)
    g = tl.zeros((K_PAD,), dtype=tl.float32)
    for start_c in range(0, VECTOR, BLOCK_ROW):
        offs_c = start_c + tl.arange(0, BLOCK_ROW)
        mask_c = offs_c < VECTOR
        d = load_partials_at_once(D_ptr, row * VECTOR + offs_c, mask_c, partials, stride_dp, AHEAD)
        v_ptrs = Bank_ptr + index[:, None] * VECTOR + offs_c[None, :]
        v = tl.load(v_ptrs, mask=mask_k[:, None] & mask_c[None, :], other=0.0).to(tl.float32)  # (K_PAD, BLOCK_ROW)
        g += tl.sum(v * d[None, :], axis=1)
    dlogits = weight * (g - tl.sum(weight * g, axis=0))
    for start_h in range(0, H, BLOCK_H):
        offs_h = start_h + tl.arange(0, BLOCK_H)
        chosen = (offs_h[:, None] == index[None, :]) & mask_k[None, :]
        dense = tl.sum(tl.where(chosen, dlogits[None, :], 0.0), axis=1)
        tl.store(DLogits_ptr + row * H + offs_h, dense.to(DLogits_ptr.dtype.element_ty), mask=offs_h < H)


@triton.jit
def _sum_rows(D_ptr, row, offs_c, mask_row, mask_c, partials, stride_dp, VECTOR: tl.constexpr, PARTIALS: tl.constexpr):
    """d[row, offs_c], added up over its partials, PARTIALS of them at once: (len(row), len(offs_c))."""
    offs = (row.to(tl.int64) * VECTOR)[:, None] + offs_c[None, :]
    mask = mask_row[:, None] & mask_c[None, :]
    d = tl.zeros((row.shape[0], offs_c.shape[0]), dtype=tl.float32)
    for start_p in range(0, partials, PARTIALS):
        partial = start_p + tl.arange(0, PARTIALS)
        d_ptrs = D_ptr + (partial.to(tl.int64) * stride_dp)[:, None, None] + offs[None, :, :]
        d += tl.sum(tl.load(d_ptrs, mask=(partial < partials)[:, None, None] & mask[None, :, :], other=0.0), axis=0)
    return d


@triton.jit
def _bank_grad_tile(
    DA_ptr,
    DB_ptr,
    IdxA_ptr,
    WA_ptr,
    IdxB_ptr,
    WB_ptr,
    start_v,
    offs_c,
    H,
    entries_A,
    entries_B,
    partials_A,
    partials_B,
    stride_Ap,
    stride_Bp,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    PARTIALS: tl.constexpr,
    MATCHES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The columns offs_c of dbank's vectors from start_v on: (BLOCK_V, len(offs_c)).

    Entry e of a selection, (rows, TOPK), is a row and a vector that it picked. Those of logits_A come first, then those
    of logits_B. Of BLOCK_E entries at a time the ones that picked a vector of this tile are numbered, and their
    weight d[row] added up, MATCHES at a time. The order is that of the entries, and the compiler's within one time
    and for partials: the same at every run.
    """
    offs_v = start_v + tl.arange(0, BLOCK_V)
    offs_j = tl.arange(0, MATCHES)
    mask_c = offs_c < VECTOR
    entries = entries_A + entries_B
    acc = tl.zeros((BLOCK_V, offs_c.shape[0]), dtype=tl.float32)
    for start_e in range(0, entries, BLOCK_E):
        offs_e = start_e + tl.arange(0, BLOCK_E)
        is_B = (offs_e >= entries_A) & (offs_e < entries)
        # Where there is no entry, a vector of no tile.
        index_A = tl.load(IdxA_ptr + offs_e, mask=offs_e < entries_A, other=-BLOCK_V)
        index_B = tl.load(IdxB_ptr + (offs_e - entries_A), mask=is_B, other=-BLOCK_V)
        match = tl.maximum(index_A, index_B) // BLOCK_V == start_v // BLOCK_V
        number = tl.where(match, tl.cumsum(match.to(tl.int32), axis=0), 0)
        found = tl.max(number, axis=0)
        for first in range(1, found + 1, MATCHES):  # trips: cdiv(min(BLOCK_E, entries) * BLOCK_V, H * MATCHES)
            chosen = number[None, :] == (first + offs_j)[:, None]  # (MATCHES, BLOCK_E)
            entry = tl.max(tl.where(chosen, offs_e[None, :], -1), axis=1)
            mask_A = (entry >= 0) & (entry < entries_A)
            mask_B = entry >= entries_A
            entry_B = entry - entries_A
            vector = tl.load(IdxA_ptr + entry, mask=mask_A, other=0) + tl.load(IdxB_ptr + entry_B, mask=mask_B, other=0)
            weight = tl.load(WA_ptr + entry, mask=mask_A, other=0.0) + tl.load(WB_ptr + entry_B, mask=mask_B, other=0.0)
            d = _sum_rows(DA_ptr, entry // TOPK, offs_c, mask_A, mask_c, partials_A, stride_Ap, VECTOR, PARTIALS)
            d += _sum_rows(DB_ptr, entry_B // TOPK, offs_c, mask_B, mask_c, partials_B, stride_Bp, VECTOR, PARTIALS)
            picks = tl.where(offs_v[:, None] == vector[None, :], weight[None, :], 0.0)  # (BLOCK_V, MATCHES)
            acc += tl.sum(picks[:, :, None] * d[None, :, :], axis=1)
    return acc


@triton.jit(do_not_specialize=["H", "rows_A", "rows_B", "tiles", "programs_A", "partials_A", "partials_B"])
def _parameter_grads_kernel(
    DA_ptr,
    DB_ptr,
    Bank_ptr,
    IdxA_ptr,
    WA_ptr,
    IdxB_ptr,
    WB_ptr,
    DLogitsA_ptr,
    DLogitsB_ptr,
    DBank_ptr,
    H,
    rows_A,
    rows_B,
    tiles,
    programs_A,
    partials_A,
    partials_B,
    stride_Ap,
    stride_Bp,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    PARTIALS: tl.constexpr,
    MATCHES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The gradients of logits_A (rows_A, H), logits_B (rows_B, H) and the bank (H, VECTOR).

    dlogits[row, index_k] = w_k (g_k - sum_j w_j g_j), g_k = d[row] . bank[index_k]; zero elsewhere
    dbank[v] = sum over the rows of both that select v of weight(row -> v) d[row]

    d[row], (VECTOR), is the gradient of the row's mixture: one of dA (partials_A, rows_A, VECTOR) or of dB (partials_B,
    rows_B, VECTOR), whose partials are added up wherever they are read. The first `tiles` programs, which take longest,
    write one tile of dbank each, and read for it the same columns of the rows of dA and dB that picked its vectors.
    programs_A ones after them, rows_A or none of them, write one row of dlogits_A each; the others one of dlogits_B.
    """
    pid = tl.program_id(0)
    if pid < tiles:
        blocks_c = tl.cdiv(VECTOR, BLOCK_C)
        start_v = pid // blocks_c * BLOCK_V
        offs_v = start_v + tl.arange(0, BLOCK_V)
        offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = _bank_grad_tile(
            DA_ptr,
            DB_ptr,
            IdxA_ptr,
            WA_ptr,
            IdxB_ptr,
            WB_ptr,
            start_v=start_v,
            offs_c=offs_c,
            H=H,
            entries_A=rows_A * TOPK,
            entries_B=rows_B * TOPK,
            partials_A=partials_A,
            partials_B=partials_B,
            stride_Ap=stride_Ap,
            stride_Bp=stride_Bp,
            VECTOR=VECTOR,
            TOPK=TOPK,
            PARTIALS=PARTIALS,
            MATCHES=MATCHES,
            BLOCK_V=BLOCK_V,
            BLOCK_E=BLOCK_E,
        )
        dbank_ptrs = DBank_ptr + offs_v[:, None] * VECTOR + offs_c[None, :]
        mask_vc = (offs_v < H)[:, None] & (offs_c < VECTOR)[None, :]
        tl.store(dbank_ptrs, acc.to(DBank_ptr.dtype.element_ty), mask=mask_vc)
    elif pid < tiles + programs_A:
        _logits_grad_row(
            DA_ptr,
            Bank_ptr,
            IdxA_ptr,
            WA_ptr,
            DLogitsA_ptr,
            row=(pid - tiles).to(tl.int64),
            H=H,
            partials=partials_A,
            stride_dp=stride_Ap,
            VECTOR=VECTOR,
            TOPK=TOPK,
            AHEAD=PARTIALS - 1,
            BLOCK_ROW=BLOCK_ROW,
            BLOCK_H=BLOCK_H,
        )
    else:
        _logits_grad_row(
            DB_ptr,
            Bank_ptr,
            IdxB_ptr,
            WB_ptr,
            DLogitsB_ptr,
            row=(pid - tiles - programs_A).to(tl.int64),
            H=H,
            partials=partials_B,
            stride_dp=stride_Bp,
            VECTOR=VECTOR,
            TOPK=TOPK,
            AHEAD=PARTIALS - 1,
            BLOCK_ROW=BLOCK_ROW,
            BLOCK_H=BLOCK_H,
        )


def launch_parameter_grads(
    dA: Tensor | None,
    dB: Tensor | None,
    vector_bank: Tensor,
    selection: tuple[Tensor, Tensor, Tensor, Tensor],
    logits_dtypes: tuple[torch.dtype, torch.dtype],
    *,
    need_logits_A: bool,
    need_logits_B: bool,
    need_bank: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of logits_A, logits_B and the bank; the rows of both may be those of several layers.

    Args:
        dA, dB: (partials, ...), fp32, each partial contiguous: of every row of A, and of B, the gradient of its
            mixture, vector_length elements; None where only the other one is needed, which cannot be when the bank's
            gradient is.
        vector_bank: (num_vectors, vector_length), contiguous.
        selection: indices_A, weights_A, indices_B and weights_B of the rows of both, as of `select.launch_select`.
    Returns:
        The three gradients, (rows, num_vectors) and as vector_bank, in the dtypes of their tensors; None where not
        needed.
    """
    indices_A, weights_A, indices_B, weights_B = selection
    (H, vector_length), topk = vector_bank.shape, indices_A.shape[-1]
    rows_A, rows_B = indices_A.numel() // topk, indices_B.numel() // topk
    device = vector_bank.device
    config = tuning.parameter_grads(H, vector_length, topk)
    dlogits_A = torch.empty((rows_A, H), dtype=logits_dtypes[0], device=device) if need_logits_A else None
    dlogits_B = torch.empty((rows_B, H), dtype=logits_dtypes[1], device=device) if need_logits_B else None
    dbank = torch.empty_like(vector_bank) if need_bank else None
    tiles = need_bank * tuning.cdiv(H, config["BLOCK_V"]) * tuning.cdiv(vector_length, config["BLOCK_C"])
    # Where there is nothing to read or write no program does, but the kernel still wants a pointer.
    absent = weights_A
    launch(
        _parameter_grads_kernel,
        (tiles + need_logits_A * rows_A + need_logits_B * rows_B,),
        DA_ptr=absent if dA is None else dA,
        DB_ptr=absent if dB is None else dB,
        Bank_ptr=vector_bank,
        IdxA_ptr=indices_A,
        WA_ptr=weights_A,
        IdxB_ptr=indices_B,
        WB_ptr=weights_B,
        DLogitsA_ptr=absent if dlogits_A is None else dlogits_A,
        DLogitsB_ptr=absent if dlogits_B is None else dlogits_B,
        DBank_ptr=absent if dbank is None else dbank,
        H=H,
        rows_A=rows_A,
        rows_B=rows_B,
        tiles=tiles,
        programs_A=need_logits_A * rows_A,
        partials_A=0 if dA is None else dA.shape[0],
        partials_B=0 if dB is None else dB.shape[0],
        stride_Ap=0 if dA is None else dA.stride(0),
        stride_Bp=0 if dB is None else dB.stride(0),
        VECTOR=vector_length,
        TOPK=topk,
        **config,
    )
    return dlogits_A, dlogits_B, dbank
