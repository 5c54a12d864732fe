"""Triton's interpreter, mended and made as strict as a GPU: `prepare()` before a kernel runs.

Mended: tl.dot multiplied bfloat16 as the integers that hold it; float32 became bfloat16 by cutting
off, where hardware rounds to nearest even; with Triton 3.6, a loop over an array of one number
failed with numpy 2.5. Whoever updates Triton: see whether the tests pass without.

Made strict: the interpreter runs one program after the other, each as if it had one thread. On a
GPU the programs of a launch run in any order, and so do the threads of a program between two
barriers. So a kernel fails here where
- it reads or writes beside the tensors that it was given,
- a program reads or writes what another one writes, or one store has two values for an address,
- a program reads or writes what it has itself written or read since the last barrier; but a store
  may replace what a load of the very same addresses has read, since that is the same thread.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def prepare() -> None:
    mend_index()
    mend_bfloat16()
    check_launches()


def mend_index() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def mend_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
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


class Memory:
    """Of one storage: by which program, and when, each of its items was last read and written."""

    def __init__(self, storage, item_size: int):
        num = storage.nbytes() // item_size + 1
        self.start, self.item_size = storage.data_ptr(), item_size
        self.reader, self.writer = np.zeros(num, np.int32), np.zeros(num, np.int32)  # 0: none
        self.read, self.written = np.zeros(num, np.int64), np.zeros(num, np.int64)  # `now`


SEVERAL = -1  # programs that read an item


class Launch:
    """The tensors of a launch, and what its programs read and write there.

    `now` counts loads and stores; `began` is its value at the program's start or last barrier.
    """

    def __init__(self, kernel: str, tensors: list):
        self.kernel, self.program, self.now, self.began = kernel, 0, 0, 1
        self.loads: dict[int, np.ndarray] = {}  # since `began`: `now` -> addresses
        size, memory = {}, {}
        for x in tensors:
            key = x.untyped_storage().data_ptr()
            size[key] = min(size.get(key, 8), x.element_size())
        self.regions = []
        for x in tensors:
            key = x.untyped_storage().data_ptr()
            if key not in memory:
                memory[key] = Memory(x.untyped_storage(), size[key])
            if x.numel():
                last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
                end = x.data_ptr() + (last + 1) * x.element_size()
                self.regions.append((x.data_ptr(), end, memory[key]))

    def start(self, program: int) -> None:
        self.program = program + 1
        self.barrier()

    def barrier(self) -> None:
        self.loads, self.began = {}, self.now + 1

    def fail(self, what: str) -> None:
        raise AssertionError(f"{self.kernel}, program {self.program - 1}, {what}")

    def items(self, addresses, size: int):
        """(memory, indices) of what is touched, for each tensor."""
        for start, end, memory in self.regions:
            inside = (addresses >= start) & (addresses + size <= end)
            if inside.any():
                yield memory, (addresses[inside] - memory.start) // memory.item_size
                addresses = addresses[~inside]
        if len(addresses):
            self.fail("touches memory beside its tensors")

    def load(self, pointers, mask, size: int) -> None:
        self.now += 1
        self.loads[self.now] = pointers
        for memory, i in self.items(pointers[mask].astype(np.int64), size):
            writer, reader = memory.writer[i], memory.reader[i]
            if ((writer != 0) & (writer != self.program)).any():
                self.fail("reads what another program writes")
            if (memory.written[i] >= self.began).any():
                self.fail("reads what it wrote, without a barrier between")
            alone = (reader == 0) | (reader == self.program)
            memory.reader[i] = np.where(alone, self.program, SEVERAL)
            memory.read[i] = self.now

    def store(self, pointers, mask, values, size: int) -> None:
        self.now += 1
        addresses = pointers[mask].astype(np.int64)
        unique, first = np.unique(addresses, return_index=True)
        if len(unique) < len(addresses):
            values = np.broadcast_to(values, pointers.shape)[mask]
            if (values != values[first[np.searchsorted(unique, addresses)]]).any():
                self.fail("has two values for an address in one store")
        for memory, i in self.items(addresses, size):
            for others in (memory.writer[i], memory.reader[i]):
                if ((others != 0) & (others != self.program)).any():
                    self.fail("writes what another program reads or writes")
            if (memory.written[i] >= self.began).any():
                self.fail("writes twice, without a barrier between")
            for then in np.unique(memory.read[i]):
                if then >= self.began and not np.array_equal(self.loads[then], pointers):
                    self.fail("writes what it read, without a barrier between")
            memory.writer[i], memory.written[i] = self.program, self.now


def check_launches() -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, set_grid_idx = executor.__call__, builder.set_grid_idx
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    launch = None

    def checked_call(self, *args, **kwargs):
        nonlocal launch
        found = [x for x in (*args, *kwargs.values()) if hasattr(x, "data_ptr")]
        launch = Launch(self.fn.__name__, found)
        call(self, *args, **kwargs)

    def start(self, x, y, z):
        set_grid_idx(self, x, y, z)
        launch.start((x * self.grid_dim[1] + y) * self.grid_dim[2] + z)

    def load(self, pointers, mask, *others):
        where = np.broadcast_arrays(pointers.data, mask.data)
        kind = interpreter._get_np_dtype(pointers.get_element_ty())
        launch.load(*where, np.dtype(kind).itemsize)
        return masked_load(self, pointers, mask, *others)

    def store(self, pointers, value, mask, *others):
        where = np.broadcast_arrays(pointers.data, mask.data)
        launch.store(*where, value.data, value.data.dtype.itemsize)
        return masked_store(self, pointers, value, mask, *others)

    executor.__call__, builder.set_grid_idx = checked_call, start
    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_barrier = lambda self: launch.barrier()
