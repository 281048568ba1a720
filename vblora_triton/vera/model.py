"""VeRA on a whole model: one pair of frozen projections per adapter, shared by all its layers."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.tuner.injection import InjectionPlan, UnsupportedTargetError
from vblora_triton.tuner.layer import linear_features
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.targets import LORA_TARGETS, find_targets
from vblora_triton.vera.config import VeraConfig
from vblora_triton.vera.input_cache import shared_inputs
from vblora_triton.vera.layer import Linear, VeraLayer
from vblora_triton.vera.projection import ProjectionDict, draw_projections

A_KEY, B_KEY = PROJECTION_KEYS = "base_model.vera_A", "base_model.vera_B"

# Where VeRA adapts other layers by default than LoRA does.
VERA_TARGETS: dict[str, list[str] | str] = LORA_TARGETS | {"phi": ["q_proj", "v_proj"]}


class VeraModel(BaseTuner):
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
    method_name = "VeRA"
    config_class = VeraConfig
    tuner_layer_cls = VeraLayer
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

    def _create_and_replace(
        self,
        vera_config: VeraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Give the adapter to one layer: to the adapted layer that is there, or to a new one in the layer's place."""
        if isinstance(target, Linear):
            target.update_layer(adapter_name, self.vera_A, self.vera_B, vera_config.r, config=vera_config)
        else:
            layer = self._create_new_module(vera_config, self.vera_A, self.vera_B, adapter_name, target)
            self._replace_module(current_key, layer)

    @staticmethod
    def _create_new_module(
        vera_config: VeraConfig,
        vera_A: ProjectionDict,
        vera_B: ProjectionDict,
        adapter_name: str,
        target: nn.Module,
        **kwargs: Any,
    ) -> Linear:
        """Make the adapted layer for a linear one; its type decides how its weight is stored.

        Raises:
            UnsupportedTargetError: neither nn.Linear nor Conv1D.
        """
        if linear_features(target) is None:
            raise UnsupportedTargetError(
                f"`target` is a {type(target).__name__}; only nn.Linear and transformers' Conv1D can be adapted."
            )
        return Linear(target, vera_A, vera_B, adapter_name, vera_config, **kwargs)

    def running(self) -> AbstractContextManager[Any]:
        """Return a context in which layers share what they project of one input."""
        return nullcontext() if torch.compiler.is_compiling() else shared_inputs()

    @classmethod
    def adapter_shapes(cls, plan: InjectionPlan) -> dict[str, tuple[int, ...]]:
        """Return file key -> shape of the scales of every target and of the projections."""
        r, features = plan.config.r, plan.features()
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (_, out_features) in features.items():
            shapes[f"base_model.model.{name}.vera_lambda_b"] = (out_features,)
            shapes[f"base_model.model.{name}.vera_lambda_d"] = (r,)
        max_in, max_out = (max(sizes) for sizes in zip(*features.values(), strict=True))
        return shapes | {A_KEY: (r, max_in), B_KEY: (max_out, r)}

    @classmethod
    def pack(cls, config: VeraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn an adapter's tensors into what its file holds: float32, and projections only where the config says so.

        Raises:
            ValueError: projections that the key does not give are to be left out.
        """
        if not config.save_projection and not _come_from_key(config, tensors):
            raise ValueError(
                f"`save_projection` is False, but the projections of this adapter are not those that "
                f"`projection_prng_key` = {config.projection_prng_key} gives: they came from a file. Left out, they "
                "would be lost; set `save_projection` to True in its configuration."
            )
        kept = (key for key in tensors if config.save_projection or key not in PROJECTION_KEYS)
        return {key: tensors[key].float() if _is_own(key) else tensors[key] for key in kept}

    @classmethod
    def unpack(
        cls,
        config: VeraConfig,
        tensors: dict[str, Tensor],
        expected: dict[str, tuple[int, ...]],
        problems: dict[str, str],
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], bool]:
        """Add the projections that a file leaves out, where its configuration says so; cut off what no layer reads."""
        (r, max_in), (max_out, _) = (expected[key] for key in PROJECTION_KEYS)
        if not any(key in tensors for key in PROJECTION_KEYS):
            rest = {key: shape for key, shape in expected.items() if key not in PROJECTION_KEYS}
            if config.save_projection:
                problems[f"missing {A_KEY}, {B_KEY}"] = (
                    "`save_projection` is true, so they should be there; if they were left out on purpose, set it to "
                    f"false to draw them from `projection_prng_key` = {config.projection_prng_key}"
                )
            # Of a size that a broken configuration asks for nothing is drawn: the scales tell.
            if config.save_projection or any(
                key not in tensors or tuple(tensors[key].shape) != shape for key, shape in rest.items()
            ):
                return tensors, rest, False
            drawn = draw_projections(config.projection_prng_key, r, max_in, max_out)
            return tensors | dict(zip(PROJECTION_KEYS, drawn, strict=True)), expected, False
        # PEFT gives a second adapter the projections of the first, which may be larger than this one's layers read.
        cut = {
            key: tensors[key].narrow(dim, 0, expected[key][dim]).clone()
            for key, dim in ((A_KEY, 1), (B_KEY, 0))
            if key in tensors and _is_longer(tensors[key], expected[key], dim)
        }
        return tensors | cut, expected, False

    def set_form(self, adapter_name: str, tensors: dict[str, Tensor]) -> set[str]:
        """Put the projections in place; where the key does not give them, see that they will be saved."""
        config = self.peft_config[adapter_name]
        if not config.save_projection and not _come_from_key(config, tensors):
            warnings.warn(
                f"The file of adapter {adapter_name!r} holds projections that `projection_prng_key` = "
                f"{config.projection_prng_key} does not give. They are used, and `save_projection` is True from now "
                "on, so that they are saved with it.",
                stacklevel=4,
            )
            config.save_projection = True
        device = next(self.model.parameters()).device
        device = torch.device("cpu") if device.type == "meta" else device
        for held, key in ((self.vera_A, A_KEY), (self.vera_B, B_KEY)):
            held.set(adapter_name, tensors[key].to(device), config.save_projection)
        return set(PROJECTION_KEYS)

    @classmethod
    def saved_bytes(cls, config: VeraConfig, key: str, tensor: Tensor) -> int | None:
        """Return how many bytes a tensor takes in the file: of a scale, or of a projection, where those are saved."""
        if key in PROJECTION_KEYS and not config.save_projection:
            return 0
        return tensor.numel() * 4 if _is_own(key) else None


def _is_own(key: str) -> bool:
    return key in PROJECTION_KEYS or key.endswith((".vera_lambda_b", ".vera_lambda_d"))


def _is_longer(tensor: Tensor, shape: tuple[int, ...], dim: int) -> bool:
    """Say whether a matrix is of a shape but for having more in one dimension."""
    return tensor.dim() == 2 and tensor.shape[1 - dim] == shape[1 - dim] and tensor.shape[dim] > shape[dim]


def _come_from_key(config: VeraConfig, tensors: dict[str, Tensor]) -> bool:
    """Say whether an adapter's projections are, bit for bit, those that its key gives."""
    A, B = tensors[A_KEY], tensors[B_KEY]
    drawn = draw_projections(config.projection_prng_key, config.r, A.shape[1], B.shape[0])
    return all(torch.equal(held.float().cpu(), one) for held, one in zip((A, B), drawn, strict=True))
