"""The configuration of VeRA."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

from vblora_triton.tuner.config import TargetedConfig
from vblora_triton.tuner.fields import check_bool, check_float, check_int
from vblora_triton.tuner.method import FileForm, Method, Option, Part


@dataclass
class VeraConfig(TargetedConfig):
    """How to adapt a model with VeRA (arXiv 2310.11454).

    Two random matrices, A and B, are frozen and shared by all adapted layers; a layer trains one scale for each of the
    `r` directions between them, lambda_d, and one for each of its outputs, lambda_b.

    Args:
        r: rank of the update, at least 1. A direction costs a layer one number, so ranks are far above LoRA's: the
            paper takes 256 to 1024.
        projection_prng_key: the seed that A and B are drawn from. Adapters on one model may have different ones.
        save_projection: write A and B into the adapter's file. Without them the file is far smaller, and whoever reads
            it draws them again from `projection_prng_key`.
        vera_dropout: probability, in [0, 1], that an element of the adapter's input is dropped in training.
        d_initial: what lambda_d starts at; the paper takes 0.1. Not 0, or no gradient flows.
        init_weights: start at lambda_b = 0 and lambda_d = d_initial, where the model is as it was. Otherwise
            lambda_b = 1 and lambda_d is normal, which is of use in tests.

    The other fields are those of `TargetedConfig` and `PeftConfig`.

    Raises:
        ValueError, TypeError: a field that cannot be; the message names it and says what it wants.
    """

    r: int = 256
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    own_fields: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    file_fields: ClassVar[tuple[str, ...]] = ("projection_prng_key", "save_projection")
    origin_fields: ClassVar[tuple[str, ...]] = ("projection_prng_key",)
    type_name: ClassVar[str | None] = "VERA"
    method: ClassVar[Method] = Method(
        title="VeRA",
        # After 100 steps of rank 64 the small model's loss is 2.20 at 1e-1, and 2.29 at 4e-2.
        parts={
            "lambda": Part(
                "learning rate of the scales", ("vera_lambda_b", "vera_lambda_d"), 4e-3, 1e-1, "4e-3, the paper's"
            )
        },
        options={
            # Projections of rank 256 would be a tenth of the small model.
            "r": Option("R", "rank of the update", 256, small=64),
            "projection_prng_key": Option(
                "KEY", "what its two random matrices are drawn from", 0, minimum=0, maximum=2**64 - 1
            ),
        },
        forms=(
            FileForm(label="with projections", fields={"save_projection": True}),
            FileForm(
                "without_projections",
                "without projections",
                "one without projections",
                {"save_projection": False},
                "scales alone, far smaller: the projections are drawn again",
            ),
        ),
        # VeRA's own rank would make it a far larger adapter.
        lora_r=4,
        smaller="a lower --r would make it smaller",
    )

    def check(self) -> None:
        """Check every field, and turn lists of names into sets."""
        check_int("r", self.r)
        check_int("projection_prng_key", self.projection_prng_key, minimum=0)
        if self.projection_prng_key >= 2**64:
            raise ValueError(f"`projection_prng_key` is {self.projection_prng_key}; give an int below 2**64.")
        for name in ("save_projection", "init_weights"):
            check_bool(name, getattr(self, name))
        check_float("vera_dropout", self.vera_dropout, 0.0, 1.0, "a probability from 0 to 1")
        check_float("d_initial", self.d_initial, -math.inf, math.inf, "a finite number")
        if self.d_initial == 0 and self.init_weights:
            raise ValueError(
                "`d_initial` is 0, from which nothing can be learnt: lambda_b starts at 0 too, and each of them gets "
                "its gradient through the other; give a small number such as 0.1."
            )
        super().check()

    def advise(self) -> None:
        """Warn that a file without A and B counts on their being drawn again."""
        if not self.save_projection:
            warnings.warn(
                "`save_projection` is False: A and B will not be in the adapter's file, and whoever reads it must draw "
                "the same ones again from `projection_prng_key`, which counts on torch's random numbers staying as "
                "they are. With save_projection=True the file holds them.",
                # Past __post_init__ and the __init__ that dataclass writes.
                stacklevel=4,
            )
