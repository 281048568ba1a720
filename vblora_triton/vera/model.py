"""VeRA on a whole model: one pair of frozen projections per adapter, shared by all its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vblora_triton.tuner.layer import linear_features
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.targets import LORA_TARGETS, find_targets
from vblora_triton.vera.config import VeraConfig
from vblora_triton.vera.contents import VeraContents
from vblora_triton.vera.files import VeraFiles
from vblora_triton.vera.layer import Linear, VeraLayer
from vblora_triton.vera.projection import ProjectionDict, draw_projections

# Where VeRA adapts other layers by default than LoRA does.
VERA_TARGETS: dict[str, list[str] | str] = LORA_TARGETS | {"phi": ["q_proj", "v_proj"]}


class VeraModel(VeraFiles, VeraContents, BaseTuner):
    """A model with VeRA adapters (arXiv 2310.11454).

    vera_A, vera_B: ProjectionDict, adapter -> frozen (r, max_in) and (max_out, r), which all layers read. Each adapter
        has the pair that its own key, rank and targets give, or that its file holds, whatever others are on the model.

    Args:
        model: the model to adapt, in place.
        peft_config: a VeraConfig, or {adapter_name: VeraConfig}.
        adapter_name, low_cpu_mem_usage, autocast_adapter_dtype: see `BaseTuner`. A and B are float32 in any case.
    Raises:
        ValueError, TypeError: the adapter does not fit the model, which is then as it was.
    """

    prefix = "vera_"
    config_class = VeraConfig
    tuner_layer_cls = VeraLayer
    linear_cls = Linear
    target_module_mapping = VERA_TARGETS

    def _find_dim(self, config: VeraConfig) -> tuple[int, int]:
        """Return the largest out_features and the largest in_features of the layers that an adapter adapts."""
        sizes = [linear_features(module) or (0, 0) for module in find_targets(config, self.model).values()]
        return max(out for _, out in sizes), max(size for size, _ in sizes)

    def _init_vera_A_vera_B(self, config: VeraConfig, adapter_name: str) -> None:
        """Draw an adapter's projections, on the device where the model begins."""
        max_out, max_in = self._find_dim(config)
        device = next(self.model.parameters()).device
        if "meta" in (device.type, torch.get_default_device().type):
            # A loader will bring them.
            A, B = (torch.empty(shape, device="meta") for shape in ((config.r, max_in), (max_out, config.r)))
        else:
            A, B = draw_projections(config.projection_prng_key, config.r, max_in, max_out)
        self.vera_A.set(adapter_name, A.to(A.device if A.is_meta else device), config.save_projection)
        self.vera_B.set(adapter_name, B.to(B.device if B.is_meta else device), config.save_projection)

    def _pre_injection_hook(self, model: nn.Module, config: VeraConfig, adapter_name: str) -> None:
        """Make the places for projections, if there are none, and draw this adapter's, once."""
        if "vera_A" not in self._modules:
            self.vera_A, self.vera_B = ProjectionDict(), ProjectionDict()
        self._init_vera_A_vera_B(config, adapter_name)

    @classmethod
    def layer_arguments(cls, config: VeraConfig) -> dict[str, Any]:
        """Return what a layer has to know of an adapter's configuration, by the names of its arguments."""
        return {"r": config.r, "config": config}
