"""The files of VeRA: the scales, and the projections where they are not to be drawn again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from vblora_triton.tuner.file_keys import AdapterFiles, Shapes
from vblora_triton.tuner.injection import InjectionPlan
from vblora_triton.vera.config import VeraConfig
from vblora_triton.vera.projection import draw_projections

A_KEY, B_KEY = PROJECTION_KEYS = "base_model.vera_A", "base_model.vera_B"


class VeraFiles(AdapterFiles):
    """The files of VeRA: the scales of each layer, and the projections that they share."""

    @classmethod
    def adapter_shapes(cls, plan: InjectionPlan) -> Shapes:
        """Return file key -> shape of the scales of every target and of the projections."""
        r, features = plan.config.r, plan.features()
        shapes: Shapes = {}
        for name, (_, out_features) in features.items():
            shapes[f"base_model.model.{name}.vera_lambda_b"] = (out_features,)
            shapes[f"base_model.model.{name}.vera_lambda_d"] = (r,)
        max_in, max_out = (max(sizes) for sizes in zip(*features.values(), strict=True))
        return shapes | {A_KEY: (r, max_in), B_KEY: (max_out, r)}

    @classmethod
    def pack(cls, config: VeraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn an adapter's tensors into what its file holds: projections only where the config says so.

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
        return {key: tensors[key] for key in kept}

    @classmethod
    def unpack(
        cls, config: VeraConfig, tensors: dict[str, Tensor], expected: Shapes, problems: dict[str, str]
    ) -> tuple[dict[str, Tensor], Shapes, bool]:
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

    def set_form(self: Any, adapter_name: str, tensors: dict[str, Tensor]) -> set[str]:
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


def _is_longer(tensor: Tensor, shape: tuple[int, ...], dim: int) -> bool:
    """Say whether a matrix is of a shape but for having more in one dimension."""
    return tensor.dim() == 2 and tensor.shape[1 - dim] == shape[1 - dim] and tensor.shape[dim] > shape[dim]


def _come_from_key(config: VeraConfig, tensors: dict[str, Tensor]) -> bool:
    """Say whether an adapter's projections are, bit for bit, those that its key gives; without values they may be."""
    A, B = tensors[A_KEY], tensors[B_KEY]
    if A.is_meta:
        return True
    drawn = draw_projections(config.projection_prng_key, config.r, A.shape[1], B.shape[0])
    return all(torch.equal(held.float().cpu(), one) for held, one in zip((A, B), drawn, strict=True))
