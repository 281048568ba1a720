"""What the linear layer of every method does around its own update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.ops import modes
from vblora_triton.tuner.layer import BaseTunerLayer


def may_write(base_layer: nn.Module, base: Tensor) -> bool:
    """Say whether the base layer's result is nobody's but ours, so that the update may go into it.

    It is a plain linear's: neither its backward, nor a hook, nor selective checkpointing, nor another tensor that it is
    a view of needs it. (torch makes it a view where there is a bias and x has three dimensions.)
    """
    return (
        type(base_layer) is nn.Linear
        and modes.is_plain(base)
        and "forward" not in vars(base_layer)
        and not base_layer._forward_hooks
        and not torch.nn.modules.module._global_forward_hooks
        and base._base is None
        and base.is_contiguous()
    )


class AdaptedLinear(nn.Linear, BaseTunerLayer):
    """nn.Linear, or transformers' Conv1D, with adapters that each add an update to its result.

    y = base_layer(x) + sum_active update(x)

    A method's layer says what the update is: `_add_update`, and `_delta` for the weight.
    """

    def _add_update(self, adapter: str, x: Tensor, base: Tensor) -> Tensor:
        """Return the base layer's result with an adapter's update added; `may_write` says if into `base` itself."""
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
        y = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.r and adapter not in self.merged_adapters:
                y = self._add_update(adapter, x, y)
        return y

    def _delta(self, adapter: str) -> Tensor:
        """Return what the adapter adds to a weight (out_features, in_features), float32."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter adds to the base weight, float32, stored as that is."""
        # Under autocast the product would be rounded to 16 bits.
        with torch.autocast(self.weight.device.type, enabled=False):
            delta = self._delta(adapter)
        return delta.T if self.fan_in_fan_out else delta

    def _op_options(self, dropout: nn.Module) -> dict[str, Any]:
        """Return what every op takes by keyword, with the probability of an nn.Dropout, or none of an nn.Identity."""
        p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        return {"dropout_p": p, "training": dropout.training, "backend": self.backend}

    def __repr__(self) -> str:
        return f"{type(self).__module__.split('.')[-2]}.{super().__repr__()}"
