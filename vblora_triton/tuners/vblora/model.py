"""VB-LoRA's model, where PEFT has it."""

from vblora_triton.vblora.model import VBLoRAModel

__all__ = ["VBLoRAModel"]
