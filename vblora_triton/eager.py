"""Both methods on a CPU: plain PyTorch as in `reference`, with gradients written out so that less is made and kept.

VB-LoRA keeps x, s, its selection, A and B^T, and gathers the vectors again in backward; VeRA keeps its projection p
alone, and multiplies by B again. `reference` says what is computed, and takes over where these cannot go: under
compilers and transforms, for second derivatives, and with dropout.
"""

import torch
from torch import Tensor

from vblora_triton import reference
from vblora_triton.products import product
from vblora_triton.triton_ops.register import first_derivative_only


def fits(x: Tensor) -> bool:
    """Say whether x is on the CPU outside of a compiler, which is all that is served here."""
    return x.is_cpu and not torch.compiler.is_compiling()


def select(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """`reference.select` without sorting, but where a tie or a NaN among the first topk + 1 needs it."""
    values, indices = logits.topk(min(topk + 1, logits.shape[-1]), dim=-1)
    if not (values[..., 1:] < values[..., :-1]).all():
        return reference.select(logits, topk)
    return indices[..., :topk].contiguous(), values[..., :topk].softmax(-1)


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that all of these are promoted to."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _add(x: Tensor, base: Tensor | None, update: Tensor, in_place: bool) -> Tensor:
    """base + update, rounded once to the dtype of base, or the update in that of x; into base where `in_place`."""
    if base is None:
        return update.to(x.dtype)
    return base.add_(update) if in_place else (base + update).to(base.dtype)


def vblora_linear(
    x: Tensor,
    base_out: Tensor | None,
    logits_A: Tensor,
    logits_B: Tensor,
    vector_bank: Tensor,
    topk: int,
    in_place: bool = False,
) -> Tensor:
    """`reference.vblora_linear` without dropout; into base_out where `in_place`."""
    return _VBLoRALinear.apply(x, base_out, logits_A, logits_B, vector_bank, vector_bank, topk, in_place)


@torch.no_grad()
def vblora_linear_selected(
    x: Tensor,
    base_out: Tensor | None,
    indices_A: Tensor,
    weights_A: Tensor,
    indices_B: Tensor,
    weights_B: Tensor,
    vector_bank: Tensor,
    in_place: bool = False,
) -> Tensor:
    """`reference.vblora_linear_selected` without dropout and gradients; into base_out where `in_place`."""
    A, B_t = _matrices((indices_A, weights_A), (indices_B, weights_B), vector_bank)
    return _updated(x, base_out, _projected(x, A), B_t, in_place)


def _matrices(
    selected_A: tuple[Tensor, Tensor], selected_B: tuple[Tensor, Tensor], bank: Tensor
) -> tuple[Tensor, Tensor]:
    """A, (r, in), and B^T, (r, out): products of few columns are slow."""
    A, B_t = reference.compose_selected(*selected_A, bank), reference.compose_selected(*selected_B, bank)
    return A.flatten(1), B_t.transpose(0, 1).flatten(1)


def _projected(x: Tensor, A: Tensor) -> Tensor:
    """s = x A^T, (M, r), in the wider dtype."""
    dtype = torch.promote_types(x.dtype, A.dtype)
    return x.reshape(-1, x.shape[-1]).to(dtype) @ A.T.to(dtype)


def _updated(x: Tensor, base_out: Tensor | None, s: Tensor, B_t: Tensor, in_place: bool) -> Tensor:
    """base_out + s B^T."""
    return _add(x, base_out, product(s, B_t.T.to(s.dtype)).view(*x.shape[:-1], B_t.shape[1]), in_place)


class _VBLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base_out, logits_A, logits_B, vector_bank, same_bank, topk, in_place):
        selected_A, selected_B = select(logits_A, topk), select(logits_B, topk)
        A, B_t = _matrices(selected_A, selected_B, vector_bank)
        s = _projected(x, A)
        ctx.save_for_backward(x, s, *selected_A, *selected_B, A, B_t, vector_bank)
        ctx.num_vectors = logits_A.shape[-1]
        if in_place:
            ctx.mark_dirty(base_out)
        return _updated(x, base_out, s, B_t, in_place)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        x, s, indices_A, weights_A, indices_B, weights_B, A, B_t, bank = ctx.saved_tensors
        need_x, need_base, need_A, need_B, need_bank = ctx.needs_input_grad[:5]
        dtype, h = s.dtype, ctx.num_vectors
        dy_rows = dy.reshape(-1, dy.shape[-1]).to(dtype)
        ds = dy_rows @ B_t.T.to(dtype)
        dx = d_logits_A = d_logits_B = d_bank_A = d_bank_B = None
        if need_x:
            dx = _shaped(product(ds, A.T.to(dtype)), x.shape, x.dtype)
        if need_A or need_bank:
            d_rows = product(ds.T, x.reshape(-1, x.shape[-1]).T.to(dtype)).to(bank.dtype).view(*indices_A.shape[:2], -1)
            d_logits_A, d_bank_A = _mixing_grads(d_rows, indices_A, weights_A, bank, h)
        if need_B or need_bank:
            tiles, r = indices_B.shape[:2]
            d_rows = product(s.T, dy_rows.T).to(bank.dtype).view(r, tiles, bank.shape[1]).transpose(0, 1)
            d_logits_B, d_bank_B = _mixing_grads(d_rows, indices_B, weights_B, bank, h)
        return dx, dy if need_base else None, d_logits_A, d_logits_B, d_bank_B, d_bank_A, None, None


def _mixing_grads(
    d_rows: Tensor, indices: Tensor, weights: Tensor, bank: Tensor, num_vectors: int
) -> tuple[Tensor, Tensor]:
    """The gradients of logits and bank: dlogits[index_k] = w_k (g_k - sum_j w_j g_j), g_k = d_rows . bank[index_k]."""
    d_mixed = d_rows.unsqueeze(-2).to(torch.promote_types(weights.dtype, bank.dtype))
    d_weights = (d_mixed * bank[indices]).sum(-1).to(weights.dtype)
    d_logits = torch.zeros((*indices.shape[:-1], num_vectors), dtype=weights.dtype)
    d_logits.scatter_(-1, indices, torch._softmax_backward_data(d_weights, weights, -1, weights.dtype))
    d_vectors = (d_mixed * weights.unsqueeze(-1)).to(bank.dtype)
    return d_logits, torch.zeros_like(bank).index_put_((indices,), d_vectors, accumulate=True)


def _shaped(rows: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Rows in this shape and dtype; no view, so that autograd can add to it in place."""
    return torch.ops.aten._unsafe_view(rows, shape).to(dtype)


def vera_linear(
    x: Tensor,
    base_out: Tensor | None,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    in_place: bool = False,
) -> Tensor:
    """`reference.vera_linear` without dropout; into base_out where `in_place`."""
    return _VeraLinear.apply(x, base_out, lambda_b, lambda_d, A, B, in_place)


class _VeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base_out, lambda_b, lambda_d, A, B, in_place):
        dtype = widest(x, A, lambda_d)
        A, B = A[:, : x.shape[-1]].to(dtype), B[: lambda_b.shape[0]].to(dtype)
        p = product(x.reshape(-1, x.shape[-1]).to(dtype), A)
        ctx.save_for_backward(p, lambda_b, lambda_d, A, B)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        if in_place:
            ctx.mark_dirty(base_out)
        q = product(p * lambda_d, B)
        if in_place and base_out.dtype == dtype == lambda_b.dtype:
            base_out.view(q.shape).addcmul_(q, lambda_b)
            return base_out
        return _add(x, base_out, (lambda_b * q).view(*x.shape[:-1], q.shape[1]), in_place)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        p, lambda_b, lambda_d, A, B = ctx.saved_tensors
        need_x, need_base, need_b, need_d = ctx.needs_input_grad[:4]
        dy_rows = dy.reshape(-1, dy.shape[-1]).to(p.dtype)
        dx = d_lambda_b = d_lambda_d = None
        if need_b:
            d_lambda_b = product(p * lambda_d, B).mul_(dy_rows).sum(0).to(lambda_b.dtype)
        if need_x or need_d:
            du = product(dy_rows, (lambda_b.to(p.dtype)[:, None] * B).T)
            if need_d:
                d_lambda_d = (du * p).sum(0).to(lambda_d.dtype)
            if need_x:
                dx = _shaped(product(du.mul_(lambda_d), A.T), ctx.x_shape, ctx.x_dtype)
        return dx, dy if need_base else None, d_lambda_b, d_lambda_d, None, None, None
