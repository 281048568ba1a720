"""bfloat16 under Triton's interpreter, which up to triton 3.7 multiplies it as integers and rounds it towards zero."""

from typing import Any

import numpy as np
import triton.language as tl


def _to_float32(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data).view(np.uint32)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(data), quiet_nan, nearest_even).astype(np.uint16)


def repair_bfloat16() -> None:
    """Give the interpreter a GPU's bfloat16: casts to the nearest even value, products in fp32.

    Call it only where kernels are interpreted; nothing else of triton looks at what it replaces.
    """
    # TODO(triton>3.7): drop what the interpreter has come to do itself; tests/kernels/test_interpreter.py tells.
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_cast, original_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self: Any, source: Any, dst_type: Any) -> Any:
        types = (source.dtype.scalar, dst_type.scalar)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_float32(source.data), dst_type.scalar)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(source.data), dst_type.scalar)
        return original_cast(self, source, dst_type)

    def dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a = TensorHandle(_to_float32(a.data), tl.float32)
            b = TensorHandle(_to_float32(b.data), tl.float32)
        return original_dot(self, a, b, d, *args)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot
