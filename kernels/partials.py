"""Partial sums: what several programs share of one sum goes to fp32 partials, which are added up in order.

So results are bitwise equal from run to run, as they would not be with atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch


@triton.jit
def load_partials(V_ptr, offs, mask, partials, stride_p):
    """The elements at V_ptr + offs of all `partials` partials of V, added up in order; 0 outside `mask`.

    v = ((v[0] + v[1]) + v[2]) + ... V_ptr is one pointer, or a block of pointers with offs 0: what a kernel keeps in
    registers from partial to partial.
    """
    v = tl.load(V_ptr + offs, mask=mask, other=0)
    for partial in range(1, partials):
        # In 64 bits: the partials of a large M together pass 2^31 elements.
        v += tl.load(V_ptr + tl.cast(partial, tl.int64) * stride_p + offs, mask=mask, other=0)
    return v


@triton.jit
def load_partials_at_once(V_ptr, offs, mask, partials, stride_p, AHEAD: tl.constexpr):
    """As `load_partials`, and of the same bits, but AHEAD + 1 loads are under way at once, which takes registers."""
    v = tl.load(V_ptr + offs, mask=mask, other=0)
    for start_p in range(1, partials, AHEAD):
        for j in tl.static_range(AHEAD):
            # Steps of the pointer, in 64 bits too.
            V_ptr += stride_p
            v += tl.load(V_ptr + offs, mask=mask & (start_p + j < partials), other=0)
    return v


@triton.jit
def load_rank_tile(V_ptr, offs_m, mask_m, offs_i, mask_i, stride_m, partials, stride_p, AHEAD: tl.constexpr):
    """Rows offs_m, columns offs_i of an (M, R) matrix, added up over its partials: (len(offs_m), len(offs_i))."""
    mask = mask_m[:, None] & mask_i[None, :]
    return load_partials_at_once(V_ptr, offs_m[:, None] * stride_m + offs_i[None, :], mask, partials, stride_p, AHEAD)


@triton.jit(do_not_specialize=["numel", "partials", "stride_p"])
def _sum_partials_kernel(
    V_ptr, Out_ptr, numel, R, partials, stride_p, stride_om, AHEAD: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    total = load_partials_at_once(V_ptr, offs, mask, partials, stride_p, AHEAD)
    tl.store(Out_ptr + (offs // R * stride_om + offs % R), total, mask=mask)


def launch_sum_partials(partials: Tensor, total: Tensor | None = None) -> Tensor:
    """Add up the partials of a (partials, M, r) fp32 tensor, in order.

    Args:
        total: (M, r) fp32, its columns contiguous, written. Without it one partial alone is returned as it is.
    """
    if total is None:
        if partials.shape[0] == 1:
            return partials[0]
        total = torch.empty_like(partials[0])
    config = tuning.sum_partials(partials.shape[0])
    launch(
        _sum_partials_kernel,
        (tuning.cdiv(total.numel(), config["BLOCK"]),),
        V_ptr=partials,
        Out_ptr=total,
        numel=total.numel(),
        R=total.shape[1],
        partials=partials.shape[0],
        stride_p=partials.stride(0),
        stride_om=total.stride(0),
        **config,
    )
    return total
