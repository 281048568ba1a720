"""PEFT's refusal to train a VB-LoRA adapter that was loaded from a file with top-k weights only, kept by few looks.

Such logits are infinite. A look makes the host wait for the GPU, so there is one for each parameter, and another when
its memory or its version is another, unless an optimizer of torch has just stepped it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from vblora_triton.ops.modes import TensorState, is_plain

# The parameters, as they were when looked at.
_looked_at = WeakTensorKeyDictionary()
# Those that graphs of torch.compile train, where nobody looks any more.
_in_graphs = WeakTensorKeyDictionary()
_hooks: list[Any] = []


def refuse(layer: Any, adapter: str) -> None:
    """Let PEFT look at an adapter's logits, and raise its RuntimeError, if they may have changed."""
    logits = layer.vblora_logits_A[adapter]
    if torch.compiler.is_compiling():
        if not _is_trainable_in_graphs(logits):
            _look(layer, adapter)
    elif not _is_known(logits):
        _look(layer, adapter)


def forget() -> None:
    """Look at everything anew, and at no optimizer any more."""
    _looked_at.clear()
    _in_graphs.clear()
    while _hooks:
        _hooks.pop().remove()


def _is_known(logits: Tensor) -> bool:
    found = _looked_at.get(logits)
    return found is not None and found.holds(logits) and is_plain(logits)


# Of infinite logits the graph is left for the error, as it is for PEFT's. This is torch.compiler.disable, but for
# importing the compiler at once.
@_disable_dynamo
def _look(layer: Any, adapter: str) -> None:
    logits = layer.vblora_logits_A[adapter]
    with torch.no_grad():
        layer._get_lora_matrices(adapter)
    if is_plain(logits) and not logits.is_inference():
        _remember(logits)


def _is_trainable_in_graphs(logits: Tensor) -> bool:
    """Look at logits while a graph that trains them is made: the compiler calls this, and takes the answer for good."""
    if _is_infinite(logits):
        return False
    _in_graphs[logits] = True
    _remember(logits)
    return True


# torch.compiler.assume_constant_result, likewise.
_is_trainable_in_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_infinite(logits: Tensor) -> bool:
    # Where PEFT looks.
    return bool(logits[0, 0].isinf().any())


def _remember(logits: Tensor) -> None:
    _looked_at[logits] = TensorState.of(logits)
    if not _hooks:
        _hooks[:] = register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # What was written to since the look is looked at after the step, not taken for the optimizer's own.
    for parameter in _looked_at_of(optimizer):
        if _looked_at[parameter].holds(parameter):
            continue
        if parameter in _in_graphs and _is_infinite(parameter):
            raise RuntimeError(
                "Found infinity values in VB-LoRA logits, which were loaded after torch.compile had compiled the "
                "training of them. Ensure training was not resumed from a `save_only_topk_weights` model."
            )
        if parameter not in _in_graphs:
            del _looked_at[parameter]


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for parameter in _looked_at_of(optimizer):
        _looked_at[parameter] = TensorState.of(parameter)


def _looked_at_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p in _looked_at]
