"""Small trainers, and when two states are the same."""

import torch

from fused_preact.train import settings
from fused_preact.train.loop import Trainer


def trainer(dataset, **given):
    given = {"model": "resnet20", "data": "digits", "batch_size": 8, "iterations": 6, "threads": 1, **given}
    return Trainer(settings.resolve(given, len(dataset.train), dataset.flip), dataset)


def same(a, b):
    """Whether two nested states hold the same tensors, bit for bit, and the same values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
