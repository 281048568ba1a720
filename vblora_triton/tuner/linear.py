"""What the linear layer of every method does around its own update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from transformers.pytorch_utils import Conv1D

from vblora_triton import ops
from vblora_triton.integrations import quantization
from vblora_triton.ops import modes
from vblora_triton.ops.reference import DequantizedLinear
from vblora_triton.tuner.layer import BaseTunerLayer


def frozen_linear(base_layer: Any, x: Tensor) -> ops.FrozenLinear | None:
    """Return the weight and bias of a base layer where calling it is nothing but their product with x; else None.

    It is in no subclass (quantised layers are some), without a replaced forward (offloading), hooks (ZeRO-3),
    training, and autocast to another dtype; whether the op may compute it, `dispatch.owns_base` says. Of a quantised
    layer, and many rows, the weight is dequantised, and again for backward.
    """
    if (
        "forward" in vars(base_layer)
        or base_layer._forward_hooks
        or base_layer._forward_pre_hooks
        or base_layer._backward_hooks
        or base_layer._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    ):
        return None
    if modes.is_autocast(x):
        return None
    # Of the parameters, which are found sooner than attributes; some wrappers keep them elsewhere.
    parameters = base_layer._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    kind = type(base_layer)
    if (kind is nn.Linear or kind is Conv1D) and type(weight) in (Tensor, nn.Parameter):
        return ops.FrozenLinear(weight.T if kind is Conv1D else weight, bias)
    if not modes.is_plain(x, bias) or x.device != weight.device:
        return None
    made = quantization.product_weight(base_layer, x)
    return None if made is None else DequantizedLinear(made(), None if bias is None else bias.to(x.dtype), made)


def held(container: Any, adapter: str) -> Tensor:
    """Return container[adapter] of an nn.ParameterDict, by a tenth of the way that nn.Module's attributes take."""
    try:
        return container._parameters[adapter]
    except KeyError:
        # Some wrappers keep parameters elsewhere.
        return container[adapter]


class AdaptedLinear(nn.Linear, BaseTunerLayer):
    """nn.Linear, or transformers' Conv1D, with adapters that each add an update to its result.

    y = base_layer(x) + sum_active update(x)

    A method's layer says what the update is: `_add_update`, and `_delta` for the weight.

    owns_base: `_add_update` may be given a FrozenLinear in the place of the base layer's result.
    """

    owns_base: ClassVar[bool] = False

    def _add_update(self, adapter: str, x: Tensor, base: Any) -> Tensor:
        """Return the base layer's result, given or to be computed (`owns_base`), with an adapter's update added."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Call the base layer and add the updates of the active adapters that are not merged.

        Args:
            x: (*batch, in_features).
        Returns:
            (*batch, out_features), in the dtype of the base layer's result.
        """
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        # nn.Module's attributes are found by a longer way, which few rows notice.
        base_layer: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        adapters = [name for name in self.active_adapters if name in self.r and name not in self.merged_adapters]
        own = self.owns_base and adapters and not (args or kwargs)
        base = frozen_linear(base_layer, x) if own else None
        y: Any = base_layer(x, *args, **kwargs) if base is None else base
        for adapter in adapters:
            y = self._add_update(adapter, x, y)
        return y

    def _delta(self, adapter: str) -> Tensor:
        """Return what the adapter adds to a weight (out_features, in_features), float32."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter adds to the base weight, float32, stored as that is."""
        # Under autocast the product would be rounded to 16 bits.
        with torch.autocast(self.base_device.type, enabled=False):
            delta = self._delta(adapter)
        return delta.T if self.fan_in_fan_out else delta

    def _dropout_p(self, adapter: str) -> float:
        """Return the probability of dropout in force: of an nn.Dropout in training, and of an nn.Identity none."""
        dropout: nn.Module = self._modules[self.dropout_name]._modules[adapter]  # type: ignore[union-attr, assignment]
        return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0

    # nn.Module comes before BaseTunerLayer: what replaces its methods is here.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        quantization.check_cast(self, fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_loadable(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"{type(self).__module__.split('.')[-2]}.{super().__repr__()}"
