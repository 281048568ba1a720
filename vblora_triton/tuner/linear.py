"""What the linear layer of every method does around its own update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora_triton import ops
from vblora_triton.integrations import quantization
from vblora_triton.ops import modes
from vblora_triton.ops.reference import DequantizedLinear
from vblora_triton.tuner.layer import BaseTunerLayer


def frozen_linear(base_layer: Any, x: Tensor) -> ops.FrozenLinear | None:
    """Return the weight and bias of a base layer whose product with x the op may compute itself; None for any other.

    It may where calling the module is nothing but that product, and nobody would notice: no subclass (quantised
    layers are some), no replaced forward (offloading), no hooks (ZeRO-3), no training, no autocast to another dtype.
    Of a quantised layer, and many rows, the weight is dequantised, and again for backward.
    """
    everywhere = torch.nn.modules.module
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
    # Of the parameters, which are found sooner than attributes; some wrappers keep them elsewhere.
    parameters = base_layer._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    kind = type(base_layer)
    plain = (kind is nn.Linear or kind is Conv1D) and type(weight) in (Tensor, nn.Parameter)
    if not modes.is_plain(x, weight if plain else None, bias) or modes.is_autocast(x.device.type):
        return None
    if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad) or x.device != weight.device:
        return None
    if plain:
        return ops.FrozenLinear(weight.T if kind is Conv1D else weight, bias)
    made = quantization.product_weight(base_layer, x)
    return None if made is None else DequantizedLinear(made(), None if bias is None else bias.to(x.dtype), made)


def parameter_of(layer: nn.Module, name: str, adapter: str) -> Tensor:
    """Return layer.name[adapter] of an nn.ParameterDict, by a third of the way that nn.Module's attributes take."""
    try:
        return layer._modules[name]._parameters[adapter]  # type: ignore[union-attr, return-value]
    except KeyError:
        # Some wrappers keep parameters elsewhere.
        return getattr(layer, name)[adapter]


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

    def _op_options(self, adapter: str) -> dict[str, Any]:
        """Return what every op takes by keyword, with the probability of an nn.Dropout, or none of an nn.Identity."""
        dropout: nn.Module = self._modules[self.dropout_name]._modules[adapter]  # type: ignore[union-attr, assignment]
        p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        return {"dropout_p": p, "training": dropout.training, "backend": self.backend}

    # nn.Module comes before BaseTunerLayer: what replaces its methods is here.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        quantization.check_cast(self, fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_loadable(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"{type(self).__module__.split('.')[-2]}.{super().__repr__()}"
