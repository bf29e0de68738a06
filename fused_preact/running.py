"""The running statistics of the batch norms that a fused call went through."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from . import _extension, backends, checks
from .kernels import MEAN, VARIANCE


def recomputing() -> bool:
    """Whether this forward runs inside a backward, as `torch.utils.checkpoint` repeats it.

    The statistics of the batch have entered the running ones already.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def watched() -> bool:
    """Whether a mode sees each operation, as that of a selective checkpoint does, which keeps what some return."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def copy(t: Tensor | None) -> Tensor | None:
    """A copy that no mode sees: a selective checkpoint would look for it among what its first forward did."""
    with _disable_current_modes():
        return None if t is None else t.clone()


class Update(NamedTuple):
    """Batch norms whose running statistics are updated together: each layer once, all with one momentum."""

    mean: list[Tensor]
    var: list[Tensor]
    counts: list[Tensor]
    units: list[int]  # of which the statistics come
    momentum: float | None  # None, the cumulative average, is of one layer


def updates(norms: Iterable[nn.Module]) -> list[Update]:
    """What a call of these batch norms updates, in order: buffers that are met twice take one batch after the other."""
    found: list[Update] = []
    by_momentum: dict[float | None, Update] = {}
    seen: set[Tensor] = set()
    for i, bn in enumerate(norms):
        if not (bn.training and bn.track_running_stats):
            continue
        own = [t for t in bn._buffers.values() if t is not None]
        if any(t in seen for t in own):
            by_momentum.clear(), seen.clear()
        seen.update(own)
        if bn.momentum is None or bn.momentum not in by_momentum:
            by_momentum[bn.momentum] = Update([], [], [], [], bn.momentum)
            found.append(by_momentum[bn.momentum])
        group, buffers = by_momentum[bn.momentum], bn._buffers
        mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        if count is not None:
            group.counts.append(count)
        if mean is not None:  # then var is there too, or the call is refused
            group.mean.append(mean)
            group.var.append(var)
            group.units.append(i)
    return found


def update(
    mean: list[Tensor],
    var: list[Tensor],
    counts: list[Tensor],
    rows: Sequence[Tensor],
    units: list[int],
    momentum: float | None,
) -> None:
    """Do what nn.BatchNorm2d does in training: counts += 1, and buffer = (1 - momentum)*buffer + momentum*batch.

    Args:
        mean, var: buffers [C] of each batch norm, as many of both; they change in place.
        counts: of batches, one number each, most often int64; may be fewer.
        rows: what the fused call gave, [5, C] for each of its units.
        units: the index in rows of each batch norm.
        momentum: None is the average of all batches, this one included: of one batch norm, and by its count.
    """
    if not (mean or counts):
        return
    checks.constant(mean, var)
    if torch.compiler.is_compiling():  # whether a checkpoint repeats it is known only when the code runs
        with torch.no_grad():
            torch.ops.fused_preact._move_running(mean, var, counts, rows, units, momentum)
    else:
        _move(mean, var, counts, rows, units, momentum)


def _move(mean, var, counts, rows, units, momentum) -> None:
    """`update` as it runs; to compiled code one operator."""
    if recomputing():
        return
    # As nn.BatchNorm2d does, this tells autograd of counts alone: plain layers save mean and var for a backward that in
    # training does not read them, and that would be refused.
    device = (mean or counts)[0].device
    counted = all(t.dtype == torch.int64 and t.device == device and t.numel() == 1 for t in counts)
    if counted and _has_operator(device):
        # An operator of thousands of tensors: each layer costs. no_grad is written in Python: a KeyboardInterrupt that
        # comes while it is entered would leave gradients off for good.
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.fused_preact._update_running.default(mean, var, counts, rows, units, momentum)
        torch.autograd.graph.increment_version(counts)
    else:
        with torch.no_grad():
            _update([t.data for t in mean], [t.data for t in var], counts, rows, units, momentum)


def _has_operator(device: torch.device) -> bool:
    """Whether csrc/running.cpp serves a device."""
    return _extension.unavailable is None if device.type == "cpu" else _serves_cuda(device)


@functools.cache
def _serves_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and backends.cuda_unavailable(device) is None


def _update(mean, var, counts, rows, units, momentum) -> None:
    """Do what the operator does by torch's functions of lists, for devices and counts that it does not serve."""
    if counts:
        torch._foreach_add_(counts, 1)
    weight = 1.0 / counts[0].double().squeeze() if momentum is None and counts else momentum or 0.0
    # Of a type of their own each: checks.py allows a batch norm in float32 among others in 16 bits.
    buffers, wide, batch = mean + var, [], []
    for row, ts in (MEAN, mean), (VARIANCE, var):
        for i, t in zip(units, ts, strict=True):
            wide.append(t.to(torch.promote_types(t.dtype, rows[i].dtype)))
            batch.append(rows[i][row].to(wide[-1].dtype))
    if buffers:
        torch._foreach_mul_(wide, 1 - weight)
        torch._foreach_add_(wide, torch._foreach_mul(batch, weight))
    for buffer, moved in zip(buffers, wide, strict=True):
        if moved is not buffer:
            buffer.copy_(moved)


_library = torch.library.Library("fused_preact", "FRAGMENT")
for _name in "_move_running", *(["_update_running"] if _extension.unavailable is None else []):
    _library.define(
        _name + "(Tensor(a!)[] mean, Tensor(b!)[] var, Tensor(c!)[] counts, Tensor[] rows, int[] units, "
        "float? momentum) -> ()"
    )
    torch.library.register_fake(f"fused_preact::{_name}", lambda *_: None, lib=_library)
_library.impl("_move_running", _move, "CompositeExplicitAutograd")
