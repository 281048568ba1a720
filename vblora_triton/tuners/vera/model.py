"""VeRA's model, where PEFT has it."""

from vblora_triton.vera.model import VeraModel

__all__ = ["VeraModel"]
