"""The main job: fine-tune a causal language model with an adapter, save, reload and merge it, and report."""

from vblora_triton.errors import InputError
from vblora_triton.finetune.options import Options
from vblora_triton.finetune.run import finetune

__all__ = ["InputError", "Options", "finetune"]
