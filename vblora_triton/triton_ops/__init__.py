"""The kernels as PyTorch operators, `torch.ops.vblora_triton.*`: schemas, implementations, fakes, autograd formulas.

`ops` has checked the arguments; nothing here does again. Kernels are imported at the first call, so that importing the
package needs neither triton nor a GPU.
"""

from vblora_triton.triton_ops import compose, linear, selected, vera

__all__ = ["compose", "linear", "selected", "vera"]
