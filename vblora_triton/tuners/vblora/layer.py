"""VB-LoRA's layers, where PEFT has them."""

from vblora_triton.vblora.layer import Linear, VBLoRALayer

__all__ = ["Linear", "VBLoRALayer"]
