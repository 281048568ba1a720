"""What computes PEFT's VB-LoRA and VeRA layers in place of their `forward`, and which versions of it that equals."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from vblora_triton import ops
from vblora_triton.ops.modes import is_plain
from vblora_triton.tuner.linear import may_write

Forward = Callable[..., Tensor]

# The sources that the functions below stand for, by `_digest`: those of these versions of peft, all that are between.
KNOWN_PEFT = "0.19.0 to 0.21.2"
_VBLORA_DIGESTS = {
    "forward": {"4ed474b9506b4ae1"},
    "_get_lora_matrices": {"357510e3043b7675"},
    "_get_low_rank_matrix": {"bd50355dd0fee2a9"},
}
# The first is 0.19's, which does not round to the dtype of the base layer's result before that of x.
_VERA_DIGESTS = {"forward": {"5218c0e031287eda", "96967b7f1e065ce3"}}


@dataclass(frozen=True)
class LayerKind:
    """One of PEFT's layers: its class, the class that all layers of its method share, and how to compute it."""

    cls: type
    base: type
    digests: dict[str, set[str]]
    make_forward: Callable[[type, Forward, str], Forward]

    def check(self, forward: Forward) -> None:
        """Check that PEFT computes this layer in a way that is known here.

        Args:
            forward: PEFT's own, which may not be the class's any more.
        Raises:
            TypeError: it does not.
        """
        for name, known in self.digests.items():
            if _digest(forward if name == "forward" else vars(self.cls).get(name)) not in known:
                raise TypeError(
                    f"{self.cls.__module__}.{self.cls.__qualname__}.{name} of peft {import_module('peft').__version__} "
                    f"is not one that patch_peft knows, those of peft {KNOWN_PEFT}; somebody replaced it, or the "
                    "version is another. Nothing was changed: use one of these versions, or PEFT's layers as they are."
                )

    def computes_like(self, cls: type) -> bool:
        """Say whether a class inherits everything that `forward` stands for."""
        return all(getattr(cls, name, None) is vars(self.cls)[name] for name in self.digests)


def layer_kinds() -> list[LayerKind]:
    """PEFT's layers that can be patched.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        vblora, vera = (import_module(f"peft.tuners.{method}.layer") for method in ("vblora", "vera"))
    except ImportError as error:
        raise ImportError("patch_peft() needs peft >= 0.19: pip install 'vblora-triton[peft]'.") from error
    return [
        LayerKind(vblora.Linear, vblora.VBLoRALayer, _VBLORA_DIGESTS, _make_vblora_forward),
        LayerKind(vera.Linear, vera.VeraLayer, _VERA_DIGESTS, _make_vera_forward),
    ]


def _digest(function: Any) -> str | None:
    """A hash of a function's source without blanks and comments, the same for every version of Python."""
    try:
        # Of the function itself: what somebody put around it by functools.wraps shows the source of what it wraps.
        lines = inspect.getsource(getattr(function, "__code__", function)).splitlines()
    except (OSError, TypeError):
        return None
    code = "".join("".join(line.split()) for line in lines if not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _make_vblora_forward(cls: Any, original: Forward, backend: str) -> Forward:
    compose, mix = cls._get_lora_matrices, cls._get_low_rank_matrix

    @functools.wraps(original)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = type(self)
        if own._get_lora_matrices is not compose or own._get_low_rank_matrix is not mix:
            # Somebody's own kind of VB-LoRA, which inherits this method.
            return original(self, x, *args, **kwargs)
        result, adapters = _base_result(self, x, args, kwargs)
        for adapter in adapters:
            if adapter in self.vblora_logits_A:
                result = _add_vblora(self, adapter, x, result, backend)
        return result.to(x.dtype)

    return forward


def _make_vera_forward(cls: Any, original: Forward, backend: str) -> Forward:
    @functools.wraps(original)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result, adapters = _base_result(self, x, args, kwargs)
        # What a layer of bitsandbytes returns must not be written to; since 0.20 the layer knows.
        quantization = getattr(self, "quantization_backend", None)
        if adapters and quantization is not None:
            result = quantization.maybe_clone_base_result(result)
        for adapter in adapters:
            if adapter in self.vera_lambda_d:
                result = _add_vera(self, adapter, x, result, backend)
        return result.to(x.dtype)

    return forward


def _base_result(layer: Any, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, list[str]]:
    """The base layer's result, and the adapters whose updates are still to be added."""
    merged = layer.merged
    if layer.disable_adapters and merged:
        layer.unmerge()
    result = layer.base_layer(x, *args, **kwargs)
    return result, [] if layer.disable_adapters or merged else layer.active_adapters


def _add_vblora(layer: Any, adapter: str, x: Tensor, result: Tensor, backend: str) -> Tensor:
    logits_A, logits_B = layer.vblora_logits_A[adapter], layer.vblora_logits_B[adapter]
    if layer.training:
        topk_refusal.check(layer, adapter)
    # Of a model that is spread over devices, the one bank is elsewhere for some layers.
    bank = layer.vblora_vector_bank[adapter].to(logits_A.device)
    x, dropout = _dropped(layer.vblora_dropout[adapter], x)
    op = ops.vblora_linear_ if may_write(layer.base_layer, result) else ops.vblora_linear
    return op(x, result, logits_A, logits_B, bank, layer.topk[adapter], backend=backend, **dropout)


def _add_vera(layer: Any, adapter: str, x: Tensor, result: Tensor, backend: str) -> Tensor:
    lambda_b, lambda_d = layer.vera_lambda_b[adapter], layer.vera_lambda_d[adapter]
    A, B = layer.vera_A[adapter], layer.vera_B[adapter]
    if A.device != x.device:
        A = A[:, : layer.in_features].to(x.device)
    if B.device != x.device:
        B = B[: layer.out_features].to(x.device)
    if lambda_d.shape[0] != A.shape[0]:
        # A second adapter of rank 1 takes the first one's projections in PEFT, and is spread over their ranks.
        lambda_d = lambda_d.expand(A.shape[0])
    x, dropout = _dropped(layer.vera_dropout[adapter], x)
    op = ops.vera_linear_ if may_write(layer.base_layer, result) else ops.vera_linear
    return op(x, result, lambda_b, lambda_d, A, B, backend=backend, **dropout)


def _dropped(dropout: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The input and the options of an op: the op drops what torch's own layer would, any other layer does it itself."""
    if type(dropout) is nn.Dropout:
        return x, {"dropout_p": dropout.p, "training": dropout.training}
    return dropout(x), {}


class TopkRefusal:
    """PEFT's refusal to train an adapter that was loaded from a file with top-k weights only.

    Such logits are infinite. To look makes the host wait for the GPU, so it is done once for each parameter, and again
    when its memory or its version is another, unless an optimizer of torch has just stepped it.
    """

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []

    # Values cannot be looked at in a graph: torch.compile leaves it here, as it does in PEFT's own layer.
    @torch.compiler.disable
    def check(self, layer: Any, adapter: str) -> None:
        """Let PEFT look at an adapter's logits if they may have changed.

        Raises:
            RuntimeError: PEFT's own; they are infinite.
        """
        logits = layer.vblora_logits_A[adapter]
        known = is_plain(logits) and not logits.is_inference()
        if known and self._seen.get(logits) == _memory_and_version(logits):
            return
        with torch.no_grad():
            layer._get_lora_matrices(adapter)
        if known:
            self._seen[logits] = _memory_and_version(logits)
            if not self._hooks:
                self._hooks = [
                    register_optimizer_step_pre_hook(self._before_step),
                    register_optimizer_step_post_hook(self._after_step),
                ]

    def forget(self, layer: nn.Module | None = None) -> None:
        """Forget what was seen of a layer's parameters, or of all."""
        for parameter in list(self._seen.keys() if layer is None else layer.parameters()):
            self._seen.pop(parameter, None)
        # Not from within the hooks: torch walks over them there.
        if not len(self._seen):
            while self._hooks:
                self._hooks.pop().remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # What was written to since the look is looked at after the step, not taken for the optimizer's own.
        for parameter in self._seen_of(optimizer):
            if self._seen[parameter] != _memory_and_version(parameter):
                del self._seen[parameter]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in self._seen_of(optimizer):
            self._seen[parameter] = _memory_and_version(parameter)

    def _seen_of(self, optimizer: Optimizer) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"] if p in self._seen]


def _memory_and_version(tensor: Tensor) -> tuple[StorageWeakRef, int]:
    # While the weak reference lives, no other storage has its address.
    return StorageWeakRef(tensor.untyped_storage()), tensor._version


topk_refusal = TopkRefusal()
