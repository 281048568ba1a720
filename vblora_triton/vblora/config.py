"""The configuration of VB-LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from vblora_triton.tuner.config import (
    PeftConfig,
    PeftType,
    check_choice,
    check_float,
    check_int,
    check_layers,
    name_list,
    name_set,
)


@dataclass
class VBLoRAConfig(PeftConfig):
    """How to adapt a model with VB-LoRA (arXiv 2405.15179).

    Each row of A and B is a mixture of `topk` vectors from one bank, shared by all adapted layers.

    Args:
        r: rank of the update, at least 1.
        num_vectors: vectors in the bank, at least `topk`.
        vector_length: length of a vector; must divide in_features and out_features of every adapted layer.
        topk: vectors mixed into each piece of A and B. The size of a top-k file grows with it.
        target_modules: a list of names (a module matches with its whole name or with the end of it after a dot), a
            regular expression for the whole name, "all-linear" (every linear layer but the output head), or None for
            the usual layers of a known architecture.
        exclude_modules: names or an expression, as above, to leave alone.
        save_only_topk_weights: save the selected indices and their weights instead of the logits. Such files are far
            smaller and serve inference and merging, not further training.
        vblora_dropout: probability, in [0, 1], that an element of the adapter's input is dropped in training.
        fan_in_fan_out: the weight is stored (in, out), as in GPT-2's Conv1D. Each layer's type decides; the field is
            set to what was found.
        bias: "none", "all" (every bias of the model is trained) or "vblora_only" (those of the adapted layers).
            Trained biases stay in force when the adapter is disabled.
        modules_to_save: names of further modules, for instance a classification head, to train in full and save.
        init_vector_bank_bound: the bank starts uniform in [-bound, bound]; more than 0, or no gradient flows.
        init_logits_std: the logits start normal with this standard deviation.
        layers_to_transform: a layer number, or several, to adapt; None for all.
        layers_pattern: name of the list that holds the numbered layers, such as "layers" or "h".

    The common fields (`task_type`, ...) are those of `PeftConfig`.

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

    _peft_type: ClassVar[PeftType | None] = PeftType.VBLORA

    def check(self) -> None:
        """Check every field, and turn lists of names into sets.

        Raises:
            ValueError, TypeError: see the class.
        """
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_int(name, getattr(self, name))
        if self.topk > self.num_vectors:
            raise ValueError(
                f"`topk` is {self.topk}, but the bank has `num_vectors` = {self.num_vectors} to choose "
                f"from; give a `topk` from 1 to {self.num_vectors}."
            )
        check_float("vblora_dropout", self.vblora_dropout, 0.0, 1.0, "a probability from 0 to 1")
        positive = math.ulp(0.0)
        check_float("init_vector_bank_bound", self.init_vector_bank_bound, positive, math.inf, "a number above 0")
        check_float("init_logits_std", self.init_logits_std, 0.0, math.inf, "a number of at least 0")
        check_choice("bias", self.bias, ("none", "all", "vblora_only"))
        self.target_modules = name_set("target_modules", self.target_modules)
        self.exclude_modules = name_set("exclude_modules", self.exclude_modules)
        self.modules_to_save = name_list("modules_to_save", self.modules_to_save)
        check_layers(self.layers_to_transform, self.layers_pattern, self.target_modules)
