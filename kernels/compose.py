"""Composition on its own: the mixtures that rows of logits select, written out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .select import Selected
from .tiles import mix


@triton.jit
def _compose_fwd_kernel(
    Bank_ptr,
    Idx_ptr,
    W_ptr,
    Out_ptr,
    rows,
    VECTOR: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < rows
    start_c = tl.program_id(1) * BLOCK_C
    offs_c = start_c + tl.arange(0, BLOCK_C)
    out = mix(Bank_ptr, Idx_ptr, W_ptr, offs_row, mask_row, start_c, VECTOR, 1, 0, VECTOR, TOPK, BLOCK_C)
    out_ptrs = Out_ptr + offs_row[:, None] * VECTOR + offs_c[None, :]
    tl.store(out_ptrs, out.to(Out_ptr.dtype.element_ty), mask=mask_row[:, None] & (offs_c < VECTOR)[None, :])


def launch_compose_fwd(vector_bank: Tensor, selected: Selected) -> Tensor:
    """out = sum_k weights_k vector_bank[indices_k].

    Args:
        vector_bank: (num_vectors, vector_length), contiguous.
        selected: of so many rows, `select.launch_select`.
    Returns:
        (rows, vector_length), in the dtype of `vector_bank`.
    """
    rows, vector_length = selected.indices.shape[0], vector_bank.shape[1]
    out = torch.empty((rows, vector_length), dtype=vector_bank.dtype, device=vector_bank.device)
    config = tuning.compose(vector_length)
    launch(
        _compose_fwd_kernel,
        (triton.cdiv(rows, config["BLOCK_ROWS"]), triton.cdiv(vector_length, config["BLOCK_C"])),
        Bank_ptr=vector_bank,
        Idx_ptr=selected.indices,
        W_ptr=selected.weights,
        Out_ptr=out,
        rows=rows,
        VECTOR=vector_length,
        TOPK=selected.indices.shape[-1],
        **config,
    )
    return out
