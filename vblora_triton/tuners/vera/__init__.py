"""VeRA, where PEFT has it."""

from vblora_triton.vera.config import VeraConfig
from vblora_triton.vera.layer import Linear, VeraLayer
from vblora_triton.vera.model import VeraModel

__all__ = ["Linear", "VeraConfig", "VeraLayer", "VeraModel"]
