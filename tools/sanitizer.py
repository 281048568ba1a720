"""Every kernel once on small odd sizes, for compute-sanitizer, which is slow: `python -m tools.sanitizer`."""

import torch

from vblora_triton import ops


def run_vera(M: int, K: int, N: int, r: int, dtype: torch.dtype) -> None:
    x = torch.randn(M, K, device="cuda", dtype=dtype, requires_grad=True)
    base = torch.randn(M, N, device="cuda", dtype=dtype, requires_grad=True)
    lambda_b, lambda_d = (torch.randn(n, device="cuda", requires_grad=True) for n in (N, r))
    A, B = torch.randn(r, K + 3, device="cuda"), torch.randn(N + 5, r, device="cuda")
    for p in (0.0, 0.5):
        y = ops.vera_linear(x, base, lambda_b, lambda_d, A, B, dropout_p=p, training=True, backend="triton")
        y.backward(torch.randn_like(y))
    frozen = ops.FrozenLinear(torch.randn(N, K, device="cuda", dtype=dtype), torch.randn(N, device="cuda", dtype=dtype))
    ops.vera_linear(x, frozen, lambda_b, lambda_d, A, B, backend="triton").sum().backward()


def main() -> None:
    torch.manual_seed(0)
    # Each size once in bf16, one in every dtype: what is compiled takes longer than what runs.
    sizes = ((75, 256, 384, 5, 300, 128, 3), (1, 96, 144, 4, 60, 48, 2), (130, 48, 40, 17, 9, 8, 5))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for M, K, N, r, h, b, k in sizes if dtype == torch.bfloat16 else sizes[:1]:
            x = torch.randn(M, K, device="cuda", dtype=dtype, requires_grad=True)
            base = torch.randn(M, N, device="cuda", dtype=dtype, requires_grad=True)
            logits_A = torch.randn(r, K // b, h, device="cuda", requires_grad=True)
            logits_B = torch.randn(N // b, r, h, device="cuda", requires_grad=True)
            bank = torch.randn(h, b, device="cuda", requires_grad=True)
            for p in (0.0, 0.5):
                y = ops.vblora_linear(
                    x, base, logits_A, logits_B, bank, k, dropout_p=p, training=True, backend="triton"
                )
                y.backward(torch.randn_like(y))
            frozen = ops.FrozenLinear(torch.randn(N, K, device="cuda", dtype=dtype))
            ops.vblora_linear(x, frozen, logits_A, logits_B, bank, k, backend="triton").sum().backward()
            selection = ops.select(logits_A, logits_B, k, backend="triton")
            ops.vblora_linear_selected(x, base, *selection, bank, backend="triton").sum().backward()
            ops.compose(logits_A, bank, k, backend="triton").sum().backward()
            run_vera(M, K, N, 4 * r, dtype)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
