"""The methods under the paths that they have in PEFT: vblora_triton.tuners.vblora.layer, and so on."""

from vblora_triton.tuners.vblora import VBLoRAConfig, VBLoRAModel
from vblora_triton.tuners.vera import VeraConfig, VeraModel

__all__ = ["VBLoRAConfig", "VBLoRAModel", "VeraConfig", "VeraModel"]
