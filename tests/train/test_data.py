"""The digits, and the batches of a run."""

import sys

import numpy as np
import pytest
import torch

from fused_preact.errors import UserError
from fused_preact.train.data import Batches, augment, digits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset():
    return digits()


def test_digits_are_all_there(dataset):
    """1,797 images at 32x32 in three equal channels, over the full range of a byte, in ten classes."""
    assert (dataset.name, dataset.classes, dataset.flip) == ("digits", 10, False)
    assert dataset.train.images.shape == (1437, 3, 32, 32)
    assert dataset.test.images.shape == (360, 3, 32, 32)
    for part in (dataset.train, dataset.test):
        assert part.images.dtype == torch.uint8
        assert (part.images == part.images[:, :1]).all()
        assert (part.images.min(), part.images.max()) == (0, 255)
        # A small pixel has the middle of its square of 4x4: what lies outside of all middles is as the nearest.
        assert (part.images[..., :2, :2] == part.images[..., :1, :1]).all()


def test_digits_are_split_by_class_and_apart(dataset):
    """Each class has a fifth of its images held out, none of which is trained on; the split never changes."""
    train, test = (np.bincount(part.labels) for part in (dataset.train, dataset.test))
    assert (np.abs(test - (train + test) / 5) < 1).all()
    rows = {image.numpy().tobytes() for image in dataset.train.images}
    assert not any(image.numpy().tobytes() in rows for image in dataset.test.images)
    again = digits()
    assert torch.equal(again.test.images, dataset.test.images)
    assert torch.equal(again.train.labels, dataset.train.labels)


def test_digits_are_recognisable(dataset):
    """Enlarging keeps image and label together: the nearest training image has the same label nearly always."""
    train, test = (part.images[:, 0].flatten(1).float() for part in (dataset.train, dataset.test))
    nearest = torch.cdist(test, train).argmin(1)
    assert (dataset.train.labels[nearest] == dataset.test.labels).float().mean() > 0.97


def test_missing_scikit_learn(monkeypatch):
    """Without the extra, the message is the command that installs it."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"needs scikit-learn: pip install scikit-learn"):
        digits()


def test_moments(dataset):
    """Mean and deviation are those of the training pixels."""
    mean, std = dataset.moments
    pixels = dataset.train.images.double()
    torch.testing.assert_close(mean.flatten(), pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(std.flatten(), pixels.std((0, 2, 3), correction=0).float())


def test_an_epoch_shows_each_image_once(dataset):
    """The batches of an epoch have no image twice, and the next epoch has another order."""
    batches = Batches(dataset, 100, seed=3, padding=0, flip=False, device=CPU)
    assert batches.per_epoch == 14
    epochs = []
    for epoch in range(2):
        images = torch.cat([batches.at(epoch * 14 + step)[0] for step in range(14)])
        epochs.append([image.numpy().tobytes() for image in images])
    everything = batches._normalise(dataset.train.images)
    different = len({image.numpy().tobytes() for image in everything})
    assert len(set(epochs[0])) >= 1400 - (1437 - different)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_iteration_alone(dataset):
    """A run that starts at iteration 20 sees what one that came there from 0 sees, or came back from a later epoch;
    another seed sees something else.
    """
    make = [Batches(dataset, 100, seed, padding=4, flip=True, device=CPU) for seed in (5, 5, 6)]
    for iteration in range(20):
        make[0].at(iteration)
    make[1].at(30)
    (x, labels), (again, labels_again), (other, _) = (batches.at(20) for batches in make)
    assert torch.equal(x, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(x, other)


def test_no_two_streams_of_random_numbers_are_the_same(dataset, monkeypatch):
    """The order of an epoch, and the shifts of an iteration, for each seed."""
    seeds, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(tuple(seed)) or make(seed))
    for seed in 0, 1:
        batches = Batches(dataset, 700, seed, 4, True, torch.device("cpu"))
        for iteration in range(4):
            batches.at(iteration)
    assert len(seeds) == len(set(seeds)) == 2 * (2 + 4)


def test_batches_are_normalised_and_labelled(dataset):
    """What is trained on is (pixel - mean)/std in channels_last, beside its own label."""
    batches = Batches(dataset, 64, seed=0, padding=0, flip=False, device=CPU)
    mean, std = dataset.moments
    labels_of = {}
    for image, label in zip(dataset.train.images, dataset.train.labels, strict=True):
        labels_of.setdefault(((image.float() - mean) / std).numpy().tobytes(), set()).add(label.item())
    x, labels = batches.at(0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    for image, label in zip(x.contiguous(), labels, strict=True):
        assert label.item() in labels_of[image.numpy().tobytes()]


def test_held_out_images_come_whole_and_in_order(dataset):
    """All 360, the last batch incomplete, unaugmented."""
    batches = Batches(dataset, 128, seed=0, padding=4, flip=True, device=CPU)
    parts = list(batches.held_out())
    assert [len(labels) for _, labels in parts] == [128, 128, 104]
    mean, std = dataset.moments
    assert torch.equal(torch.cat([x for x, _ in parts]), (dataset.test.images.float() - mean) / std)
    assert torch.equal(torch.cat([labels for _, labels in parts]), dataset.test.labels)


def test_augmentation_is_a_shift_and_a_mirror():
    """Each image is one of the crops of its padded self, mirrored or not; all shifts and both sides occur."""
    x = torch.arange(1, 1 + 200 * 2 * 3 * 3, dtype=torch.float32).view(200, 2, 3, 3)
    got = augment(x, 1, True, np.random.default_rng(0))
    assert got.shape == x.shape
    padded = torch.nn.functional.pad(x, [1, 1, 1, 1])
    crops = {(top, left, side): padded[:, :, top : top + 3, left : left + 3].flip(3) if side
             else padded[:, :, top : top + 3, left : left + 3]
             for top in range(3) for left in range(3) for side in (0, 1)}  # fmt: skip
    found = [[key for key, crop in crops.items() if torch.equal(crop[i], got[i])] for i in range(200)]
    assert all(len(keys) == 1 for keys in found)
    assert {keys[0] for keys in found} == set(crops)
