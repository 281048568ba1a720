"""The adapter methods of this package: which model class belongs to which configuration."""

from __future__ import annotations

from typing import Any

from vblora_triton.tuner.config import PeftConfig, PeftType
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.vblora.model import VBLoRAModel
from vblora_triton.vera.model import VeraModel

TUNERS: dict[PeftType, type[BaseTuner]] = {PeftType.VBLORA: VBLoRAModel, PeftType.VERA: VeraModel}


def tuner_class(config: Any) -> type[BaseTuner]:
    """Return the model class of a configuration's method.

    Raises:
        TypeError: `config` is no configuration of this package.
        ValueError: its method is not one of this package.
    """
    if not isinstance(config, PeftConfig):
        raise TypeError(
            f"`peft_config` is of type {type(config).__module__}.{type(config).__name__}; give a "
            "vblora_triton configuration, such as vblora_triton.VBLoRAConfig."
        )
    if config.peft_type not in TUNERS:
        raise ValueError(
            f"`peft_type` is {config.peft_type!r}; supported: {', '.join(sorted(kind.value for kind in TUNERS))}."
        )
    return TUNERS[PeftType(config.peft_type)]
