"""Images for training: what a data set is, the digits, and the batches of a run.

The batch of an iteration depends on (seed, iteration) alone: nothing about the order of the data or its augmentation
needs to be kept to go on after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

from ..errors import UserError


@dataclass(frozen=True)
class Images:
    """images: uint8 [N, 3, 32, 32]; labels: int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Train and held-out images of `classes` classes; `flip`: a mirrored image is of the same class."""

    name: str
    classes: int
    train: Images
    test: Images
    flip: bool

    @cached_property
    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel of the training images, in pixel values: float32 [3, 1, 1]."""
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.train.images.unbind(1)]).double()
        values = torch.arange(256, dtype=torch.float64)
        mean = (counts @ values) / counts.sum(1)
        variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
        return mean.float().view(3, 1, 1), variance.sqrt().float().view(3, 1, 1)


def digits() -> Dataset:
    """The 1,797 handwritten digits of 8x8 that scikit-learn ships: 1,437 to train on, 360 held out.

    Each image is enlarged to 32x32 by bilinear interpolation and given three equal channels, since the networks' stem
    reads three. The split is fixed and has the same share of every class on both sides.
    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("--data digits: needs scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    small = torch.from_numpy(source.images).float().unsqueeze(1) * (255 / 16)
    large = interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(source.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=source.target, random_state=0)
    return Dataset("digits", 10, Images(images[train], labels[train]), Images(images[test], labels[test]), flip=False)


class Batches:
    """The batches of one run, float32 on `device`, normalised to zero mean and unit deviation a channel, channels_last.

    batch_size: from 1 to the number of training images.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, padding: int, flip: bool, device: torch.device
    ) -> None:
        self.train, self.test = dataset.train.to(device), dataset.test.to(device)
        self.mean, self.std = (moment.to(device) for moment in dataset.moments)
        self.batch_size, self.seed, self.padding, self.flip = batch_size, seed, padding, flip
        self.per_epoch = len(self.train) // batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def at(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented images [batch_size, 3, 32, 32] and labels of one iteration, from 0.

        An epoch's last batch is left out where it is incomplete.
        """
        epoch, step = divmod(iteration, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.train))
        index = torch.from_numpy(self._order[step * self.batch_size : (step + 1) * self.batch_size])
        index = index.to(self.train.labels.device)
        images = self._normalise(self.train.images[index])
        rng = np.random.default_rng([self.seed, 1, iteration])
        return augment(images, self.padding, self.flip, rng), self.train.labels[index]

    def held_out(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The held-out images, once, in order, not augmented."""
        for images, labels in zip(
            self.test.images.split(self.batch_size), self.test.labels.split(self.batch_size), strict=True
        ):
            yield self._normalise(images).contiguous(memory_format=torch.channels_last), labels

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.std


def augment(x: torch.Tensor, padding: int, flip: bool, rng: np.random.Generator) -> torch.Tensor:
    """Each image of x [N, C, H, W] shifted by up to `padding` pixels each way over a border of zeros (the mean, once
    normalised) and, with `flip`, mirrored in half of the cases. Returns channels_last of the same shape."""
    n, _, height, width = x.shape
    top, left = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=(2, n)))
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.from_numpy(rng.random(n) < 0.5)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :])
    image, rows, columns = (i.to(x.device) for i in index)
    return pad(x, [padding] * 4)[image, :, rows, columns].permute(0, 3, 1, 2)
