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
    start_d,
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

    d, (VECTOR), is what dA or dB has from start_d on: the gradient of this row's mixture.
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
        d = load_partials_at_once(D_ptr, start_d + offs_c, mask_c, partials, stride_dp, AHEAD)
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
def _sum_tiles(D_ptr, start_d, offs_c, mask_d, mask_c, partials, stride_dp, PARTIALS: tl.constexpr):
    """d[start_d, offs_c], added up over its partials, PARTIALS of them at once: (len(start_d), len(offs_c))."""
    offs = start_d[:, None] + offs_c[None, :]
    mask = mask_d[:, None] & mask_c[None, :]
    d = tl.zeros((start_d.shape[0], offs_c.shape[0]), dtype=tl.float32)
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
    K,
    N,
    R,
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
    tiles_A = K // VECTOR
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
            row_A, row_B = entry // TOPK, entry_B // TOPK
            start_A = (row_A // tiles_A).to(tl.int64) * K + row_A % tiles_A * VECTOR
            start_B = (row_B % R).to(tl.int64) * N + row_B // R * VECTOR
            d = _sum_tiles(DA_ptr, start_A, offs_c, mask_A, mask_c, partials_A, stride_Ap, PARTIALS)
            d += _sum_tiles(DB_ptr, start_B, offs_c, mask_B, mask_c, partials_B, stride_Bp, PARTIALS)
            picks = tl.where(offs_v[:, None] == vector[None, :], weight[None, :], 0.0)  # (BLOCK_V, MATCHES)
            acc += tl.sum(picks[:, :, None] * d[None, :, :], axis=1)
    return acc


@triton.jit(do_not_specialize=["H", "R", "rows_A", "rows_B", "partials_A", "partials_B"])
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
    K,
    N,
    R,
    rows_A,
    rows_B,
    partials_A,
    partials_B,
    stride_Ap,
    stride_Bp,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    ADD_TO_BANK: tl.constexpr,
    PARTIALS: tl.constexpr,
    MATCHES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The gradients of logits_A (R, K / VECTOR, H), logits_B (N / VECTOR, R, H) and the bank (H, VECTOR).

    dlogits[row, index_k] = w_k (g_k - sum_j w_j g_j), g_k = d[row] . bank[index_k]; zero elsewhere
    dbank[v] = sum over the rows of both that select v of weight(row -> v) d[row]

    d[row], (VECTOR), is the gradient of the row's mixture: a tile of dA (partials_A, R, K) or of dB (partials_B, R, N),
    whose partials are added up wherever they are read. The first programs, with NEED_A, write one row of dlogits_A
    each; the next ones, with NEED_B, one row of dlogits_B each. The others write one tile of dbank each, and read for
    it the same columns of every tile of dA and dB.
    """
    pid = tl.program_id(0)
    tiles_A = K // VECTOR
    programs_A = 0
    programs_B = 0
    if NEED_A:
        programs_A = rows_A
    if NEED_B:
        programs_B = rows_B
    if pid < programs_A:
        _logits_grad_row(
            DA_ptr,
            Bank_ptr,
            IdxA_ptr,
            WA_ptr,
            DLogitsA_ptr,
            row=pid.to(tl.int64),
            start_d=(pid // tiles_A).to(tl.int64) * K + pid % tiles_A * VECTOR,
            H=H,
            partials=partials_A,
            stride_dp=stride_Ap,
            VECTOR=VECTOR,
            TOPK=TOPK,
            AHEAD=PARTIALS - 1,
            BLOCK_ROW=BLOCK_ROW,
            BLOCK_H=BLOCK_H,
        )
    elif pid < programs_A + programs_B:
        pid_B = pid - programs_A
        _logits_grad_row(
            DB_ptr,
            Bank_ptr,
            IdxB_ptr,
            WB_ptr,
            DLogitsB_ptr,
            row=pid_B.to(tl.int64),
            start_d=(pid_B % R).to(tl.int64) * N + pid_B // R * VECTOR,
            H=H,
            partials=partials_B,
            stride_dp=stride_Bp,
            VECTOR=VECTOR,
            TOPK=TOPK,
            AHEAD=PARTIALS - 1,
            BLOCK_ROW=BLOCK_ROW,
            BLOCK_H=BLOCK_H,
        )
    else:
        tile = pid - programs_A - programs_B
        blocks_c = tl.cdiv(VECTOR, BLOCK_C)
        start_v = tile // blocks_c * BLOCK_V
        offs_v = start_v + tl.arange(0, BLOCK_V)
        offs_c = tile % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
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
            K=K,
            N=N,
            R=R,
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
        if ADD_TO_BANK:
            acc += tl.load(dbank_ptrs, mask=mask_vc, other=0.0).to(tl.float32)
        tl.store(dbank_ptrs, acc.to(DBank_ptr.dtype.element_ty), mask=mask_vc)


def launch_parameter_grads(
    dA: Tensor | None,
    dB: Tensor | None,
    vector_bank: Tensor,
    selection: tuple[Tensor, Tensor, Tensor, Tensor],
    logits_shapes: tuple[torch.Size, torch.Size],
    logits_dtypes: tuple[torch.dtype, torch.dtype],
    *,
    need_logits_A: bool,
    need_logits_B: bool,
    need_bank: bool,
    dbank: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of logits_A, logits_B and the bank.

    Args:
        dA, dB: (partials, r, K) and (partials, r, N), fp32, each partial contiguous; None where only the other one is
            needed, which cannot be when the bank's gradient is.
        vector_bank: (num_vectors, vector_length), contiguous.
        selection: indices_A, weights_A, indices_B and weights_B of the rows of both, as of `select.launch_select`.
        logits_shapes: (r, K/vector_length, num_vectors) and (N/vector_length, r, num_vectors).
        dbank: as vector_bank; the gradient of the bank is added to it, in place, and not returned in memory of its own.
    Returns:
        The three gradients, in the shapes and dtypes of their tensors; None where not needed.
    """
    (r, tiles_A, H), (tiles_B, _, _) = logits_shapes
    indices_A, weights_A, indices_B, weights_B = selection
    vector_length, topk = vector_bank.shape[1], indices_A.shape[-1]
    device = vector_bank.device
    config = tuning.parameter_grads(H, vector_length, topk)
    dlogits_A = torch.empty(logits_shapes[0], dtype=logits_dtypes[0], device=device) if need_logits_A else None
    dlogits_B = torch.empty(logits_shapes[1], dtype=logits_dtypes[1], device=device) if need_logits_B else None
    adds = dbank is not None
    dbank = torch.empty_like(vector_bank) if need_bank and not adds else dbank
    bank_tiles = tuning.cdiv(H, config["BLOCK_V"]) * tuning.cdiv(vector_length, config["BLOCK_C"])
    # Where there is nothing to read or write no program does, but the kernel still wants a pointer.
    absent = weights_A
    launch(
        _parameter_grads_kernel,
        (need_logits_A * r * tiles_A + need_logits_B * r * tiles_B + need_bank * bank_tiles,),
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
        K=tiles_A * vector_length,
        N=tiles_B * vector_length,
        R=r,
        rows_A=r * tiles_A,
        rows_B=r * tiles_B,
        partials_A=0 if dA is None else dA.shape[0],
        partials_B=0 if dB is None else dB.shape[0],
        stride_Ap=0 if dA is None else dA.stride(0),
        stride_Bp=0 if dB is None else dB.stride(0),
        VECTOR=vector_length,
        TOPK=topk,
        NEED_A=need_logits_A,
        NEED_B=need_logits_B,
        ADD_TO_BANK=adds,
        **config,
    )
    return dlogits_A, dlogits_B, dbank
