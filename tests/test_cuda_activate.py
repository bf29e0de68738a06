"""activate and activate_backward of csrc/cuda on the emulated device; test_cuda.py has the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cuda_toolkit
from test_activate import (  # noqa: F401  (run by pytest)
    SHAPES,
    activation,
    random,
    test_it_is_the_formula,
    test_relu_is_flat_at_zero_and_keeps_nan,
)
from test_cuda import SCHEDULES

pytestmark = pytest.mark.skipif(cuda_toolkit.home() is None, reason=cuda_toolkit.NO_NVCC)


@pytest.fixture
def kernels(emulated: Any) -> Any:
    """Those that the shared tests are of."""
    return emulated


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each type that the kernels have."""
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_schedule_and_every_address_give_the_same_bits(kernels: Any, dtype: torch.dtype, shape) -> None:
    """Nothing depends on which thread or block comes first, nor on which of the tensors are aligned."""
    a, da = activation(random(shape, dtype, seed=0)), random(shape, dtype, seed=2)

    def run() -> tuple[torch.Tensor, ...]:
        return kernels.activate(a), *kernels.activate_backward(da, a, True)

    expected = run()
    for number in range(SCHEDULES):
        kernels.use_schedule(number)
        kernels.offset, kernels.alone = int(number > 0), None if number < 2 else number - 2
        assert all(map(torch.equal, run(), expected)), number


def test_groups_in_teams_are_each_added_once(kernels: Any) -> None:
    """Of many groups the last blocks of teams merge, and then the last team."""
    shape = (1, 4, 70, 256)
    a = activation(torch.ones(shape))
    a.norm[:] = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])[:, None]
    for number in range(SCHEDULES):
        kernels.use_schedule(number, multiprocessors=1 if number % 2 else 1000)
        _, dgamma, dbeta = kernels.activate_backward(torch.ones(shape), a, True)
        assert dgamma.tolist() == dbeta.tolist() == [70 * 256] * 4
