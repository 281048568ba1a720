"""Gradients of the parameters: from dA and dB to the logits and the bank, in one launch, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .select import Selected


@triton.jit
def _load_planes(D_ptr, offs, mask, planes, stride_plane):
    d_ptrs = D_ptr + offs
    d = tl.load(d_ptrs, mask=mask, other=0.0)
    for plane in range(1, planes):
        # In 64 bits: many planes of a large M pass 2^31 elements.
        d += tl.load(d_ptrs + tl.cast(plane, tl.int64) * stride_plane, mask=mask, other=0.0)
    return d


@triton.jit
def _logits_grad_row(
    row,
    D_ptr,
    start_d,
    planes,
    stride_plane,
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    DLogits_ptr,
    H,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dlogits[row, index_k] = w_k (g_k - sum_j w_j g_j), g_k = d . bank[index_k]; zero elsewhere."""
    offs_k = tl.arange(0, K_PAD)
    mask_k = offs_k < TOPK
    index = tl.load(Idx_ptr + row * TOPK + offs_k, mask=mask_k, other=0)
    weight = tl.load(W_ptr + row * TOPK + offs_k, mask=mask_k, other=0.0)
    g = tl.zeros((K_PAD,), dtype=tl.float32)
    for start_c in range(0, VECTOR, BLOCK_ROW):
        offs_c = start_c + tl.arange(0, BLOCK_ROW)
        mask_c = offs_c < VECTOR
        d = _load_planes(D_ptr, start_d + offs_c, mask_c, planes, stride_plane)
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
def _add_rows(
    acc,
    D_ptr,
    rows,
    R,
    C,
    tiles,
    planes,
    stride_plane,
    Idx_ptr,
    W_ptr,
    offs_v,
    offs_c,
    mask_c,
    RANK_FIRST: tl.constexpr,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """acc[v] += sum over the rows e of logits, in order, of weight(e -> v) d[e]: a product with a selection matrix."""
    for start_e in range(0, rows, BLOCK_E):
        offs_e = start_e + tl.arange(0, BLOCK_E)
        mask_e = offs_e < rows
        chosen = tl.zeros((offs_v.shape[0], BLOCK_E), dtype=tl.float32)
        for j in range(TOPK):
            index = tl.load(Idx_ptr + offs_e * TOPK + j, mask=mask_e, other=0)
            weight = tl.load(W_ptr + offs_e * TOPK + j, mask=mask_e, other=0.0)
            chosen += tl.where(offs_v[:, None] == index[None, :], weight[None, :], 0.0)
        if RANK_FIRST:
            start_d = (offs_e // tiles).to(tl.int64) * C + offs_e % tiles * VECTOR
        else:
            start_d = (offs_e % R).to(tl.int64) * C + offs_e // R * VECTOR
        mask = mask_e[:, None] & mask_c[None, :]
        d = _load_planes(D_ptr, start_d[:, None] + offs_c[None, :], mask, planes, stride_plane)
        acc = tl.dot(chosen, d, acc, input_precision="ieee")
    return acc


@triton.jit
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
    planes_A,
    planes_B,
    stride_Ap,
    stride_Bp,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    K_PAD: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # The programs: one for each row of logits_A, one for each row of logits_B, then one for each tile of the bank.
    pid = tl.program_id(0)
    tiles_A = K // VECTOR
    programs_A = 0
    programs_B = 0
    if NEED_A:
        programs_A = rows_A
    if NEED_B:
        programs_B = rows_B
    if pid < programs_A:
        row = pid.to(tl.int64)
        start_d = (pid // tiles_A).to(tl.int64) * K + pid % tiles_A * VECTOR
        _logits_grad_row(
            row, DA_ptr, start_d, planes_A, stride_Ap, Bank_ptr, IdxA_ptr, WA_ptr, DLogitsA_ptr, H,
            VECTOR, TOPK, K_PAD, BLOCK_ROW, BLOCK_H,
        )  # fmt: skip
    elif pid < programs_A + programs_B:
        pid_B = pid - programs_A
        row = pid_B.to(tl.int64)
        start_d = (pid_B % R).to(tl.int64) * N + pid_B // R * VECTOR
        _logits_grad_row(
            row, DB_ptr, start_d, planes_B, stride_Bp, Bank_ptr, IdxB_ptr, WB_ptr, DLogitsB_ptr, H,
            VECTOR, TOPK, K_PAD, BLOCK_ROW, BLOCK_H,
        )  # fmt: skip
    else:
        tile = pid - programs_A - programs_B
        blocks_c = tl.cdiv(VECTOR, BLOCK_C)
        offs_v = tile // blocks_c * BLOCK_V + tl.arange(0, BLOCK_V)
        offs_c = tile % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < VECTOR
        acc = tl.zeros((BLOCK_V, BLOCK_C), dtype=tl.float32)
        acc = _add_rows(
            acc, DA_ptr, rows_A, R, K, tiles_A, planes_A, stride_Ap, IdxA_ptr,
            WA_ptr, offs_v, offs_c, mask_c, True, VECTOR, TOPK, BLOCK_E,
        )  # fmt: skip
        acc = _add_rows(
            acc, DB_ptr, rows_B, R, N, N // VECTOR, planes_B, stride_Bp, IdxB_ptr,
            WB_ptr, offs_v, offs_c, mask_c, False, VECTOR, TOPK, BLOCK_E,
        )  # fmt: skip
        dbank_ptrs = DBank_ptr + offs_v[:, None] * VECTOR + offs_c[None, :]
        mask_vc = (offs_v < H)[:, None] & mask_c[None, :]
        tl.store(dbank_ptrs, acc.to(DBank_ptr.dtype.element_ty), mask=mask_vc)


@triton.jit
def _sum_planes_kernel(V_ptr, Out_ptr, numel, planes, stride_plane, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    tl.store(Out_ptr + offs, _load_planes(V_ptr, offs, mask, planes, stride_plane), mask=mask)


def launch_sum_planes(planes: Tensor) -> Tensor:
    """Add up the planes of a (planes, M, r) fp32 tensor, in order; one plane is returned as it is."""
    if planes.shape[0] == 1:
        return planes[0]
    total = torch.empty_like(planes[0])
    config = tuning.sum_planes()
    launch(
        _sum_planes_kernel,
        (triton.cdiv(total.numel(), config["BLOCK"]),),
        V_ptr=planes,
        Out_ptr=total,
        numel=total.numel(),
        planes=planes.shape[0],
        stride_plane=planes.stride(0),
        **config,
    )
    return total


def launch_parameter_grads(
    dA: Tensor | None,
    dB: Tensor | None,
    vector_bank: Tensor,
    selected_A: Selected,
    selected_B: Selected,
    logits_shapes: tuple[torch.Size, torch.Size],
    logits_dtypes: tuple[torch.dtype, torch.dtype],
    *,
    need_logits_A: bool,
    need_logits_B: bool,
    need_bank: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of logits_A, logits_B and the bank.

    Args:
        dA, dB: (planes, r, K) and (planes, r, N), fp32, contiguous; None where only the other one is needed, which
            cannot be when the bank's gradient is.
        vector_bank: (num_vectors, vector_length), contiguous.
        selected_A, selected_B: of the rows of both, `select.launch_select`.
        logits_shapes: (r, K/vector_length, num_vectors) and (N/vector_length, r, num_vectors).
    Returns:
        The three gradients, in the shapes and dtypes of their tensors; None where not needed.
    """
    (r, tiles_A, H), (tiles_B, _, _) = logits_shapes
    vector_length = vector_bank.shape[1]
    device = vector_bank.device
    config = tuning.parameter_grads(H, vector_length, selected_A.indices.shape[-1])
    dlogits_A = torch.empty(logits_shapes[0], dtype=logits_dtypes[0], device=device) if need_logits_A else None
    dlogits_B = torch.empty(logits_shapes[1], dtype=logits_dtypes[1], device=device) if need_logits_B else None
    dbank = torch.empty_like(vector_bank) if need_bank else None
    bank_tiles = triton.cdiv(H, config["BLOCK_V"]) * triton.cdiv(vector_length, config["BLOCK_C"])
    absent = selected_A.weights
    launch(
        _parameter_grads_kernel,
        (need_logits_A * r * tiles_A + need_logits_B * r * tiles_B + need_bank * bank_tiles,),
        # Where there is nothing to read or write no program does, but the kernel still wants a pointer.
        DA_ptr=absent if dA is None else dA,
        DB_ptr=absent if dB is None else dB,
        Bank_ptr=vector_bank,
        IdxA_ptr=selected_A.indices,
        WA_ptr=selected_A.weights,
        IdxB_ptr=selected_B.indices,
        WB_ptr=selected_B.weights,
        DLogitsA_ptr=absent if dlogits_A is None else dlogits_A,
        DLogitsB_ptr=absent if dlogits_B is None else dlogits_B,
        DBank_ptr=absent if dbank is None else dbank,
        H=H,
        K=tiles_A * vector_length,
        N=tiles_B * vector_length,
        R=r,
        rows_A=r * tiles_A,
        rows_B=r * tiles_B,
        planes_A=0 if dA is None else dA.shape[0],
        planes_B=0 if dB is None else dB.shape[0],
        stride_Ap=0 if dA is None else dA.stride(0),
        stride_Bp=0 if dB is None else dB.stride(0),
        VECTOR=vector_length,
        TOPK=selected_A.indices.shape[-1],
        NEED_A=need_logits_A,
        NEED_B=need_logits_B,
        **config,
    )
    return dlogits_A, dlogits_B, dbank
