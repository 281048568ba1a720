"""VB-LoRA, where PEFT has it."""

from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vblora.layer import Linear, VBLoRALayer
from vblora_triton.vblora.model import VBLoRAModel

__all__ = ["Linear", "VBLoRAConfig", "VBLoRALayer", "VBLoRAModel"]
