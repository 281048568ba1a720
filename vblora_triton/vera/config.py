"""The configuration of VeRA."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

from vblora_triton.tuner.config import (
    PeftConfig,
    PeftType,
    check_bool,
    check_choice,
    check_float,
    check_int,
    check_layers,
    name_list,
    name_set,
)


@dataclass
class VeraConfig(PeftConfig):
    """How to adapt a model with VeRA (arXiv 2310.11454).

    Two random matrices, A and B, are frozen and shared by all adapted layers; a layer trains one scale for each of the
    `r` directions between them, lambda_d, and one for each of its outputs, lambda_b.

    Args:
        r: rank of the update, at least 1. A direction costs a layer one number, so ranks are far above LoRA's: the
            paper takes 256 to 1024.
        target_modules: a list of names (a module matches with its whole name or with the end of it after a dot), a
            regular expression for the whole name, "all-linear" (every linear layer but the output head), or None for
            the usual layers of a known architecture.
        exclude_modules: names or an expression, as above, to leave alone.
        projection_prng_key: the seed that A and B are drawn from. Adapters on one model may have different ones.
        save_projection: write A and B into the adapter's file. Without them the file is far smaller, and whoever reads
            it draws them again from `projection_prng_key`.
        vera_dropout: probability, in [0, 1], that an element of the adapter's input is dropped in training.
        d_initial: what lambda_d starts at; the paper takes 0.1. Not 0, or no gradient flows.
        fan_in_fan_out: the weight is stored (in, out), as in GPT-2's Conv1D. Each layer's type decides; the field is
            set to what was found.
        bias: "none", "all" (every bias of the model is trained) or "vera_only" (those of the adapted layers). Trained
            biases stay in force when the adapter is disabled.
        modules_to_save: names of further modules, for instance a classification head, to train in full and save.
        init_weights: start at lambda_b = 0 and lambda_d = d_initial, where the model is as it was. Otherwise
            lambda_b = 1 and lambda_d is normal, which is of use in tests.
        layers_to_transform: a layer number, or several, to adapt; None for all.
        layers_pattern: name of the list that holds the numbered layers, such as "layers" or "h".

    The common fields (`task_type`, ...) are those of `PeftConfig`.

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
    _peft_type: ClassVar[PeftType | None] = PeftType.VERA

    def check(self) -> None:
        """Check every field, and turn lists of names into sets.

        Raises:
            ValueError, TypeError: see the class.
        """
        check_int("r", self.r)
        check_int("projection_prng_key", self.projection_prng_key, minimum=0)
        if self.projection_prng_key >= 2**64:
            raise ValueError(f"`projection_prng_key` is {self.projection_prng_key}; give an int below 2**64.")
        for name in ("save_projection", "fan_in_fan_out", "init_weights"):
            check_bool(name, getattr(self, name))
        check_float("vera_dropout", self.vera_dropout, 0.0, 1.0, "a probability from 0 to 1")
        check_float("d_initial", self.d_initial, -math.inf, math.inf, "a finite number")
        if self.d_initial == 0 and self.init_weights:
            raise ValueError(
                "`d_initial` is 0, from which nothing can be learnt: lambda_b starts at 0 too, and each of them gets "
                "its gradient through the other; give a small number such as 0.1."
            )
        check_choice("bias", self.bias, ("none", "all", "vera_only"))
        self.target_modules = name_set("target_modules", self.target_modules)
        self.exclude_modules = name_set("exclude_modules", self.exclude_modules)
        self.modules_to_save = name_list("modules_to_save", self.modules_to_save)
        check_layers(self.layers_to_transform, self.layers_pattern, self.target_modules)

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
