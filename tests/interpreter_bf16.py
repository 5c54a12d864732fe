"""Mends two faults of Triton 3.9's interpreter in bfloat16: `mend()` before a kernel runs.

tl.dot multiplied the bit patterns as integers, and float32 was cut off where hardware rounds to
nearest even. Whoever updates Triton: see whether test_kernels.py passes without.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    if builder.create_dot.__module__ == __name__:
        return
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(self, x):
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(
            self, widened(self, a), widened(self, b), d, input_precision, max_num_imprecise_acc
        )

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        # NaN stays NaN: rounding could carry it over to zero.
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
