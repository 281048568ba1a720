"""All the maths. The public functions check their arguments, choose a backend (`dispatch`), and call it.

reference.py defines both methods; cpu.py and the kernels, as operators in triton_vblora.py and triton_vera.py, compute
the same.
"""

from vblora_triton.ops.dispatch import backends_that_run, use_backend
from vblora_triton.ops.reference import FrozenLinear, Selection
from vblora_triton.ops.vblora import (
    compose,
    select,
    selected_entries,
    vblora_linear,
    vblora_linear_selected,
)
from vblora_triton.ops.vera import ProjectedInput, vera_linear, vera_project

__all__ = [
    "FrozenLinear",
    "ProjectedInput",
    "Selection",
    "backends_that_run",
    "compose",
    "select",
    "selected_entries",
    "use_backend",
    "vblora_linear",
    "vblora_linear_selected",
    "vera_linear",
    "vera_project",
]
