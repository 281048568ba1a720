"""The frozen base's product before our kernels, of few rows, which add to it; and beside them in a CUDA graph.

Of few rows neither product nor kernels fill the GPU, and most of what the kernels take is the way from one to the next.
So what does not wait for the product goes to a second stream:

    select, shrink                   |  y = x W^T               then  y = y + bias + s B^T
    ds = dy B, dB, sums of partials  |  dx = dy W               then  dx = dx + ds A, dA, the parameters' gradients

A fork and a join cost the host more than they save, and are made only where a graph is captured. Outside of one the
same kernels run one after the other: so they are compiled before a capture, and give the same bits. The product is kept
in fp32 until the update is added, unless it is added to the dx of other layers that read the same x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from vblora_triton.kernels.matmul import matmul
from vblora_triton.kernels.tuning import FIRST_ROWS

# (device, stream) -> its second stream. Memory allocated on that is used again in its order; what is queued there
# always waits for the first stream, and so for all who read what was there before.
_seconds: dict[tuple[int, int], torch.cuda.Stream] = {}
_nothing: AbstractContextManager[None] = nullcontext()


def product_after(*_: object) -> AbstractContextManager[None]:
    """In the place of `product_beside`: whoever asks adds the product to what the kernels wrote."""
    return _nothing


def product_beside(
    left: Tensor, right: Tensor, added: Tensor | None = None
) -> AbstractContextManager[Callable[[], Tensor] | None]:
    """Compute left right beside what is launched inside the context, up to the call of what it gives, which returns it.

    That must be called. It is None, as of `product_after`, for many rows, where there is nothing to multiply, and for
    sums in fp16 (`torch.backends.cuda.matmul.allow_fp16_accumulation`), of which cuBLAS gives no fp32.

    Args:
        left, right: (M, K) and (K, N), in one dtype.
        added: (M, N) in that dtype, to which the product is added in place; or None.
    Returns:
        (M, N) in fp32, or `added` itself.
    """
    if (
        left.shape[0] > FIRST_ROWS
        or not (left.numel() and right.numel())
        or (left.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation)
    ):
        return _nothing
    product = partial(_product, left, right, added)
    if _may_fork(left.device):
        return _forked(left.device, product)
    return nullcontext(product)


def _may_fork(device: torch.device) -> bool:
    """Say whether a graph is captured on this device's stream, in memory that is used again in the order of streams.

    So PyTorch's own allocator does; CUDA's gives back what one stream was given without a look at another one's use.
    """
    return (
        device.type == "cuda"
        and torch.cuda.is_current_stream_capturing()
        # That asked the current device.
        and torch.cuda.current_device() == device.index
        and torch.cuda.get_allocator_backend() == "native"
    )


def _product(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    return matmul(left, right) if added is None else added.addmm_(left, right)


@contextmanager
def _forked(device: torch.device, product: Callable[[], Tensor]) -> Iterator[Callable[[], Tensor]]:
    first = torch.cuda.current_stream(device)
    second = _seconds.get((first.device_index, first.cuda_stream))
    if second is None:
        second = _seconds[first.device_index, first.cuda_stream] = torch.cuda.Stream(device)
    second.wait_stream(first)
    with ExitStack() as on_second:
        on_second.enter_context(torch.cuda.stream(second))

        def join() -> Tensor:
            on_second.close()
            found = product()
            first.wait_stream(second)
            return found

        yield join
