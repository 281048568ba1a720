"""Fused Triton kernels for VB-LoRA and VeRA, in adapter layers that interchange with Hugging Face PEFT's."""

__version__ = "0.1.0"
