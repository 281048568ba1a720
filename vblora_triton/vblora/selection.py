"""What frozen logits select, kept from one evaluation to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from vblora_triton import ops
from vblora_triton.ops.modes import TensorState, is_plain


class SelectionCache:
    """What the frozen logits of each adapter select, as long as they stay as they are; evaluation selects once.

    Logits that are trained are never remembered: fused optimizers write to them without counting a version. A change of
    frozen ones counts when their version does, as for `copy_` and `load_state_dict`, or when they get other memory. A
    write through `.data` does not: call `train()` or `eval()` of the layer or the model after it.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[TensorState, TensorState, tuple[int, int], ops.Selection]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Copies and pickles start empty.
        return SelectionCache, ()

    def get(self, adapter: str, logits_A: Tensor, logits_B: Tensor, topk: int, backend: str) -> ops.Selection | None:
        """Return the adapter's selection, made now if it has changed; None where it may not be remembered."""
        logits = (logits_A, logits_B)
        if any(t.requires_grad or t.is_inference() for t in logits) or not is_plain(*logits):
            self._known.pop(adapter, None)
            return None
        if logits_A.is_cuda and torch.cuda.is_current_stream_capturing():
            # What a graph captures it must compute itself, each time that it is replayed; by the same two steps, whose
            # kernels the calls before have compiled.
            return ops.select(logits_A, logits_B, topk, backend=backend)
        # On another stream the kernel that selects may not have run yet.
        stream = torch.cuda.current_stream(logits_A.device).cuda_stream if logits_A.is_cuda else 0
        known = self._known.get(adapter)
        if known is None or not (known[0].holds(logits_A) and known[1].holds(logits_B) and known[2] == (topk, stream)):
            selection = ops.select(logits_A, logits_B, topk, backend=backend)
            known = (TensorState.of(logits_A), TensorState.of(logits_B), (topk, stream), selection)
            self._known[adapter] = known
        return known[3]

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
