"""VeRA's configuration, where PEFT has it."""

from vblora_triton.vera.config import VeraConfig

__all__ = ["VeraConfig"]
