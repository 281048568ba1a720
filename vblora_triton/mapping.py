"""Which class belongs to which `peft_type`, under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vblora_triton.methods import tuner_of
from vblora_triton.tuner.config import PeftConfig, PeftType
from vblora_triton.tuner.model import BaseTuner

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {
    PeftType(name): config_class for name, config_class in PeftConfig.known.items()
}
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = {
    kind: tuner_of(config_class) for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()
}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {
    kind: tuner.prefix for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
}


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Make the configuration that a dictionary with `peft_type` describes; see `PeftConfig.from_dict`."""
    return PeftConfig.from_dict(config_dict)
