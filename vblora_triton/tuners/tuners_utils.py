"""What the methods share, where PEFT has it."""

from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.model import BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer"]
