"""The public functions: they check their arguments, choose a backend, and call the kernels or plain PyTorch."""

from vblora_triton.ops import triton_compose as _triton_compose  # noqa: F401
from vblora_triton.ops.dispatch import use_backend
from vblora_triton.ops.vblora import (
    Selection,
    compose,
    select,
    vblora_linear,
    vblora_linear_,
    vblora_linear_selected,
    vblora_linear_selected_,
)
from vblora_triton.ops.vera import Projection, vera_linear, vera_linear_, vera_project

__all__ = [
    "Projection",
    "Selection",
    "compose",
    "select",
    "use_backend",
    "vblora_linear",
    "vblora_linear_",
    "vblora_linear_selected",
    "vblora_linear_selected_",
    "vera_linear",
    "vera_linear_",
    "vera_project",
]
