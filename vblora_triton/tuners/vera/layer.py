"""VeRA's layers, where PEFT has them."""

from vblora_triton.vera.layer import Linear, VeraLayer

__all__ = ["Linear", "VeraLayer"]
