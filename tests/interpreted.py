"""Triton's interpreter in the tests: how it runs, and which part of the shared suite it runs.

It takes a second for forward and backward of one unit, however small: all of the suite would take most of an hour.
What stays has every kernel, dtype, layout, shortcut and memory mode, and as many draws of a case as for any backend.
Left out are shapes that give the kernels no other work than those that stay, and tests of the Python around the
kernels, which is the same for every backend.
"""

import numpy as np
import pytest
import torch

# Channels and pixels that fill no tile; bias and residual; no padding, and more than the filter needs; strides that
# leave a class of pixels without a tap; every shortcut; running statistics in front and in the middle. test_triton.py
# has shapes of many tiles and parts.
CASES = {
    "one-channel", "odd", "odd-eval", "35-channels-1x1", "stride-2", "stride-2-1x1", "wide-padding",
    "basic-residual", "basic-stride-2", "bottleneck-stride-2", "bottleneck-first", "frozen-second",
}  # fmt: skip
LEFT_OUT = {
    "test_models.py",
    "test_modules.py",
    "test_blocks.py::test_a_block_is_its_layers",
    "test_blocks.py::test_blocks_train_alike_under_autocast",
    "test_blocks.py::test_copies_and_pickles",
    "test_join.py::test_a_stage_is_its_blocks_one_by_one",
    "test_stage.py::test_opcheck",
    "test_stage.py::test_rebuilt_inputs_leave_float32_gradients_as_close_as_eager",
}


def without_overflow_checks() -> None:
    """Integers as on a GPU: not checked for overflow at each sum, which is half of what the interpreter does."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def products_as_on_a_gpu() -> None:
    """Sums of float32 in the order of a GPU, product after product. TF32 cuts operands off to ten bits of mantissa.

    The interpreter's own product is numpy's, whose error is smaller and which knows no TF32.
    """
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime import interpreter

    whole = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, precision, imprecise):
        if a.data.dtype != np.float32:
            return whole(self, a, b, d, precision, imprecise)
        left, right, acc = a.data, b.data, d.data
        if precision == INPUT_PRECISION.TF32:
            left, right = ((v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (left, right))
        left, right = left.astype(np.float64), right.astype(np.float64)
        for k in range(left.shape[1]):
            acc = (left[:, k, None] * right[k] + acc).astype(np.float32)
        return interpreter.TensorHandle(acc, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def memory_as_on_a_gpu() -> None:
    """A launch stays within its tensors, and writes each element of those that it writes to exactly once.

    Else it fails: the interpreter reads and writes anywhere, and runs programs that write to one place in turn. What a
    mask hides is NaN where a load gives no other value: a GPU leaves it undefined, the interpreter makes it zero.
    """
    from triton.runtime import interpreter

    from fused_preact.triton import launch

    load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{name}") for name in ("load", "store"))
    run = launch.run
    tensors: list[torch.Tensor] = []
    written: dict[int, list[np.ndarray]] = {}

    def reached(ptrs, mask):
        """The addresses of an access, and which of the tensors they are all in; None where there are no addresses."""
        at = ptrs.data[mask.data]
        if at.size == 0:
            return at, None
        low, high = at.min(), at.max()
        for i, t in enumerate(tensors):
            if t.data_ptr() <= low and high < t.data_ptr() + t.nbytes:
                return at, i
        raise IndexError("an access outside the tensors of the launch")

    def create_masked_load(self, ptrs, mask, other, *args, **kwargs):
        reached(ptrs, mask)
        if other is None:
            bits = np.full(ptrs.data.shape, -1, f"i{ptrs.get_element_ty().primitive_bitwidth // 8}")
            other = interpreter.TensorHandle(bits, ptrs.get_element_ty())
        return load(self, ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        at, i = reached(ptrs, mask)
        if i is not None:
            written.setdefault(i, []).append(at)
        return store(self, ptrs, value, mask, *args, **kwargs)

    def checked_run(kernel, grid, config, *args, **constants):
        tensors[:] = [t for t in args if isinstance(t, torch.Tensor)]
        written.clear()
        run(kernel, grid, config, *args, **constants)
        for i, parts in written.items():
            t = tensors[i]
            places = np.arange(t.data_ptr(), t.data_ptr() + t.nbytes, t.itemsize, dtype=np.uint64)
            assert np.array_equal(np.sort(np.concatenate(parts)), places), "an element is not written once"

    interpreter.InterpreterBuilder.create_masked_load = create_masked_load
    interpreter.InterpreterBuilder.create_masked_store = create_masked_store
    launch.run = checked_run


def left_out(item: pytest.Item) -> bool:
    """Whether a test of interpreted kernels is not among those that run."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("backend") != "triton":
        return False
    case = parameters.get("name") or getattr(parameters.get("case"), "id", None)
    test = f"{item.path.name}::{item.originalname}"
    return item.path.name in LEFT_OUT or test in LEFT_OUT or (case is not None and case not in CASES)
