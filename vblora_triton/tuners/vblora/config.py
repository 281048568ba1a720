"""VB-LoRA's configuration, where PEFT has it."""

from vblora_triton.vblora.config import VBLoRAConfig

__all__ = ["VBLoRAConfig"]
