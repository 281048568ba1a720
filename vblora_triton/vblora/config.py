"""The configuration of VB-LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vblora_triton.tuner.config import TargetedConfig
from vblora_triton.tuner.fields import check_bool, check_float, check_int
from vblora_triton.tuner.method import FileForm, Method, Option, Part

# The command's choice of a `vector_length`. A short one makes as many logits as a layer has weights.
LONGEST, SHORTEST = 256, 16


def longest_vector(layers: Mapping[str, tuple[int, int]]) -> int:
    """Return the longest `vector_length`, from 16 to 256, that divides the sizes of all layers; ValueError if none."""
    common = math.gcd(*(size for sizes in layers.values() for size in sizes))
    length = max(b for b in range(1, LONGEST + 1) if common % b == 0)
    if length < SHORTEST:
        raise ValueError(
            f"No vector_length of at least {SHORTEST} divides every targeted layer (their sizes have only {common} in "
            "common); leave some out with --target-modules, or insist with --vector-length."
        )
    return length


@dataclass
class VBLoRAConfig(TargetedConfig):
    """How to adapt a model with VB-LoRA (arXiv 2405.15179).

    Each row of A and B is a mixture of `topk` vectors from one bank, shared by all adapted layers.

    Args:
        r: rank of the update, at least 1.
        num_vectors: vectors in the bank, at least `topk`.
        vector_length: length of a vector; must divide in_features and out_features of every adapted layer.
        topk: vectors mixed into each piece of A and B. The size of a top-k file grows with it.
        save_only_topk_weights: save the selected indices and their weights instead of the logits. Such files are far
            smaller and serve inference and merging, not further training.
        vblora_dropout: probability, in [0, 1], that an element of the adapter's input is dropped in training.
        init_vector_bank_bound: the bank starts uniform in [-bound, bound]; more than 0, or no gradient flows.
        init_logits_std: the logits start normal with this standard deviation.

    The other fields are those of `TargetedConfig` and `PeftConfig`.

    Raises:
        ValueError, TypeError: a field that cannot be; the message names it and says what it wants.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    type_name: ClassVar[str | None] = "VBLORA"
    fixed_fields: ClassVar[tuple[str, ...]] = ("topk",)
    method: ClassVar[Method] = Method(
        title="VB-LoRA",
        # The small model's loss falls by 17 % in 250 steps with its own rates, by 8 % with the paper's.
        parts={
            "vector_bank": Part(
                "learning rate of the vector bank", ("vblora_vector_bank",), 1e-3, 1e-2, "1e-3, the paper's"
            ),
            "logits": Part(
                "learning rate of the logits", ("vblora_logits_A", "vblora_logits_B"), 1e-2, 1e-1, "1e-2, the paper's"
            ),
        },
        options={
            "r": Option("R", "rank of the update", 4),
            # Of the small model, a bank of 256 would outweigh its logits.
            "num_vectors": Option("H", "vectors in the shared bank", 256, small=64),
            "vector_length": Option(
                "B",
                "length of a vector; must divide the inputs and outputs of every targeted layer",
                1,
                fit=longest_vector,
                default_help=f"the longest that does, at most {LONGEST}",
            ),
            "topk": Option("K", "vectors mixed into each piece of the matrices, at most H", 2),
        },
        forms=(
            FileForm(label="full logits", fields={"save_only_topk_weights": False}),
            FileForm(
                "topk",
                "top-k only",
                "top-k file",
                {"save_only_topk_weights": True},
                "selected vectors and their weights alone, far smaller: to use and to merge",
            ),
        ),
        smaller="a lower --num-vectors or a longer --vector-length would make it smaller",
    )

    def check(self) -> None:
        """Check every field, and turn lists of names into sets."""
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_int(name, getattr(self, name))
        if self.topk > self.num_vectors:
            raise ValueError(
                f"`topk` is {self.topk}, but the bank has `num_vectors` = {self.num_vectors} to choose "
                f"from; give a `topk` from 1 to {self.num_vectors}."
            )
        check_float("vblora_dropout", self.vblora_dropout, 0.0, 1.0, "a probability from 0 to 1")
        check_bool("save_only_topk_weights", self.save_only_topk_weights)
        positive = math.ulp(0.0)
        check_float("init_vector_bank_bound", self.init_vector_bank_bound, positive, math.inf, "a number above 0")
        check_float("init_logits_std", self.init_logits_std, 0.0, math.inf, "a number of at least 0")
        super().check()
