"""Both methods on a CPU: plain PyTorch as in `reference`, with gradients written out so that less is made and kept.

VB-LoRA keeps x, s and its selection, and mixes A and B again in backward; VeRA keeps its projection p and the product
q = (lambda_d p) B^T, but nothing else of their size is made. `reference` says what is computed, and takes over where
these cannot go: under compilers and transforms, for second derivatives, and with dropout.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vblora_triton import reference
from vblora_triton.triton_ops.register import first_derivative_only


def fits(*tensors: Tensor | None) -> bool:
    """Say whether these are ordinary tensors on the CPU in an ordinary call, which is all that is served here."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and all(t is None or t.device.type == "cpu" for t in tensors)
    )


def select(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """`reference.select` without sorting everything."""
    if logits.dtype == torch.float64:
        return reference.select(logits, topk)
    # As whole numbers in the same order, NaN above all and -0 equal to 0; below them the index, the lowest last.
    bits = (logits.float() + 0.0).view(torch.int32)
    order = torch.where(logits.isnan(), 2**31 - 1, bits ^ ((bits >> 31) & (2**31 - 1))).long()
    h = logits.shape[-1]
    keys = order * 2**32 + torch.arange(h - 1, -1, -1, device=logits.device)
    indices = keys.topk(topk, dim=-1).indices
    return indices, logits.gather(-1, indices).softmax(-1)


def _wide(*tensors: Tensor) -> torch.dtype:
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


class _VBLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base_out, logits_A, logits_B, vector_bank, same_bank, topk, in_place):
        selected = (*select(logits_A, topk), *select(logits_B, topk))
        A, B = _mix(*selected, vector_bank, same_bank)
        dtype = _wide(x, A)
        s = x.reshape(-1, x.shape[-1]).to(dtype) @ A.T.to(dtype)
        # Every step as autograd does it for the reference, to the bit: a rounding can turn a later selection.
        update = (s @ B.T.to(dtype)).view(*x.shape[:-1], B.shape[0])
        ctx.save_for_backward(x, s, *selected, vector_bank)
        ctx.shapes = (logits_A.shape, logits_B.shape)
        if in_place:
            ctx.mark_dirty(base_out)
        return _add(x, base_out, update, in_place)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        x, s, indices_A, weights_A, indices_B, weights_B, bank = ctx.saved_tensors
        need_x, need_base, need_A, need_B, need_bank = ctx.needs_input_grad[:5]
        # The gradients of the mixing are autograd's, from a graph of the mixing alone.
        parts = [t.detach().requires_grad_() for t in (weights_A, bank, weights_B, bank)]
        with torch.enable_grad():
            A, B = _mix(indices_A, parts[0], indices_B, parts[2], parts[1], parts[3])
        dy_rows = dy.reshape(-1, dy.shape[-1]).to(s.dtype)
        ds = dy_rows @ B.detach().to(s.dtype)
        dx = (ds @ A.detach().to(s.dtype)).to(x.dtype).view(x.shape) if need_x else None
        d_logits_A = d_logits_B = d_bank_A = d_bank_B = None
        if need_A or need_bank:
            dA = ds.T @ x.reshape(-1, x.shape[-1]).to(s.dtype)
            dw, d_bank_A = torch.autograd.grad(A, parts[:2], dA.to(A.dtype))
            d_logits_A = _logits_grad(indices_A, weights_A, dw, ctx.shapes[0])
        if need_B or need_bank:
            dw, d_bank_B = torch.autograd.grad(B, parts[2:], (dy_rows.T @ s).to(B.dtype))
            d_logits_B = _logits_grad(indices_B, weights_B, dw, ctx.shapes[1])
        # B's share of the bank's gradient first, as the reference's graph has it.
        return dx, dy if need_base else None, d_logits_A, d_logits_B, d_bank_B, d_bank_A, None, None


def _mix(
    indices_A: Tensor, weights_A: Tensor, indices_B: Tensor, weights_B: Tensor, bank_A: Tensor, bank_B: Tensor
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r)."""
    rows_A = reference.compose_selected(indices_A, weights_A, bank_A)
    rows_B = reference.compose_selected(indices_B, weights_B, bank_B)
    return rows_A.flatten(1), rows_B.transpose(1, 2).flatten(0, 1)


def _logits_grad(indices: Tensor, weights: Tensor, d_weights: Tensor, shape: torch.Size) -> Tensor:
    """dlogits[index_k] = w_k (dw_k - sum_j w_j dw_j), and zero elsewhere."""
    grad = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    return torch.zeros(shape, dtype=weights.dtype).scatter_(-1, indices, grad)


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
        dtype = _wide(x, A, lambda_d)
        A, B = A[:, : x.shape[-1]].to(dtype), B[: lambda_b.shape[0]].to(dtype)
        p = x.reshape(-1, x.shape[-1]).to(dtype) @ A.T
        if in_place:
            ctx.mark_dirty(base_out)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        # Made again in backward, q would cost a fifth of all that the adapter does.
        q = (p * lambda_d) @ B.T
        ctx.save_for_backward(p, q, lambda_b, lambda_d, A, B)
        same = base_out is not None and base_out.dtype == dtype == lambda_b.dtype
        if same and in_place:
            base_out.view(-1, q.shape[1]).addcmul_(q, lambda_b)
            return base_out
        update = (lambda_b * q).view(*x.shape[:-1], q.shape[1])
        return _add(x, base_out, update, in_place)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        p, q, lambda_b, lambda_d, A, B = ctx.saved_tensors
        need_x, need_base, need_b, need_d = ctx.needs_input_grad[:4]
        dy_rows = dy.reshape(-1, dy.shape[-1]).to(p.dtype)
        dx = d_lambda_b = d_lambda_d = None
        if need_b:
            d_lambda_b = (dy_rows * q).sum(0).to(lambda_b.dtype)
        if need_x or need_d:
            du = dy_rows @ (lambda_b.to(p.dtype)[:, None] * B)
            if need_d:
                d_lambda_d = (du * p).sum(0).to(lambda_d.dtype)
            if need_x:
                dx = (du.mul_(lambda_d) @ A).to(ctx.x_dtype).view(ctx.x_shape)
        return dx, dy if need_base else None, d_lambda_b, d_lambda_d, None, None, None
