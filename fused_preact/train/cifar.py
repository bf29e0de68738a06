"""CIFAR-10 and CIFAR-100 as published, python or binary version, from the archive or from the folder it unpacks to.

The python version is made of pickles, so a file is opened only after its MD5 has matched the published one, and then by
an unpickler that knows nothing but NumPy arrays. Nothing is written to disk.

Source of the formats and of the archives' checksums: https://www.cs.toronto.edu/~kriz/cifar.html; the checksums of the
files inside the python archives are those torchvision publishes. Nobody publishes any for the `.bin` files, which hold
no code: unpacked, they are held to their exact size and to the range of the labels; packed, to the archive's checksum.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .data import Dataset, Images

PIXELS = 3 * 32 * 32
HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Batch:
    """One file of an archive: its name, how many images it holds, and its published MD5 if there is one."""

    name: str
    images: int
    md5: str | None = None


@dataclass(frozen=True)
class Archive:
    """One published archive. labels: their key in a pickle, or how many bytes they take before a binary image."""

    dataset: str
    classes: int
    file: str
    md5: str
    folder: str
    train: tuple[Batch, ...]
    test: tuple[Batch, ...]
    labels: bytes | int

    @property
    def batches(self) -> tuple[Batch, ...]:
        """All files of the archive, training first."""
        return self.train + self.test


PUBLISHED = (
    Archive(
        "CIFAR-10", 10, "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py",
        train=(
            Batch("data_batch_1", 10000, "c99cafc152244af753f735de768cd75f"),
            Batch("data_batch_2", 10000, "d4bba439e000b95fd0a9bffe97cbabec"),
            Batch("data_batch_3", 10000, "54ebc095f3ab1f0389bbae665268c751"),
            Batch("data_batch_4", 10000, "634d18415352ddfa80567beed471001a"),
            Batch("data_batch_5", 10000, "482c414d41f54cd18b22e5b47cb7c3cb"),
        ),
        test=(Batch("test_batch", 10000, "40351d587109b95175f43aff81a1287e"),),
        labels=b"labels",
    ),
    Archive(
        "CIFAR-10", 10, "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
        train=tuple(Batch(f"data_batch_{i}.bin", 10000) for i in range(1, 6)),
        test=(Batch("test_batch.bin", 10000),),
        labels=1,
    ),
    Archive(
        "CIFAR-100", 100, "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python",
        train=(Batch("train", 50000, "16019d7e3df5f24257cddd939b257f8d"),),
        test=(Batch("test", 10000, "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
        labels=b"fine_labels",
    ),
    Archive(
        "CIFAR-100", 100, "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
        train=(Batch("train.bin", 50000),),
        test=(Batch("test.bin", 10000),),
        labels=2,  # coarse, then fine
    ),
)  # fmt: skip


def read(path: str | Path, archives: Sequence[Archive] = PUBLISHED) -> Dataset:
    """Read a CIFAR data set from an archive, the folder it unpacks to, or a folder that holds either.

    `archives` lists what is accepted, with the checksums it is held to.

    Raises:
        UserError: nothing of the kind is there, a file is missing, or a checksum, a size or a label is wrong.
    """
    archive, place = _locate(Path(path), archives)
    try:
        contents = _from_tar(archive, place) if place.is_file() else _from_folder(archive, place)
    except OSError as error:
        raise UserError(f"--data {place}: cannot be read: {error.strerror or error}") from error
    for batch in archive.batches:
        if batch.name not in contents:
            raise UserError(f"--data {place}: {batch.name} is missing; get {archive.file} again from {HOME}")
        if batch.md5 is not None:
            _verify(f"{place}: {batch.name}", contents[batch.name], batch.md5)
    parts = ([_decode(archive, b, contents[b.name]) for b in part] for part in (archive.train, archive.test))
    train, test = (_join(part) for part in parts)
    return Dataset(archive.dataset, archive.classes, train, test, flip=True)


def _locate(path: Path, archives: Sequence[Archive]) -> tuple[Archive, Path]:
    """The archive that path holds, and its file or folder."""
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder; expected `digits` or a CIFAR archive or folder")
    known = ", ".join(archive.file for archive in archives)
    if path.is_file():
        for archive in archives:
            if path.name == archive.file:
                return archive, path
        raise UserError(f"--data {path}: not the name of a published archive; expected one of {known}")
    places = [(a, place) for a in archives for place in (path, path / a.folder, path / a.file)]
    some, whole = ([(a, place) for a, place in places if _holds(a, place, how)] for how in (any, all))
    found = whole or some
    if not found:
        raise UserError(f"--data {path}: no CIFAR files here; expected one of {known}, unpacked or not, from {HOME}")
    if len({archive.dataset for archive, _ in found}) > 1:
        sets = ", ".join(f"{archive.dataset} in {place}" for archive, place in found)
        raise UserError(f"--data {path}: holds more than one data set, {sets}; name one, or give it its own folder")
    return found[0]


def _holds(archive: Archive, place: Path, how: Callable[[Iterable[bool]], bool]) -> bool:
    """Whether a place is the archive, or a folder of any or all of its files."""
    packed = place.name == archive.file and place.is_file()
    return packed or how((place / batch.name).is_file() for batch in archive.batches)


def _from_folder(archive: Archive, folder: Path) -> dict[str, bytes]:
    files = {batch.name: folder / batch.name for batch in archive.batches}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def _from_tar(archive: Archive, file: Path) -> dict[str, bytes]:
    packed = file.read_bytes()
    _verify(str(file), packed, archive.md5)
    wanted = {f"{archive.folder}/{batch.name}": batch.name for batch in archive.batches}
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        return {wanted[member.name]: tar.extractfile(member).read() for member in tar if member.name in wanted}


def _verify(file: str, content: bytes, expected: str) -> None:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != expected:
        raise UserError(
            f"--data {file}: truncated or altered: expected MD5 {expected}, as published, got {md5} "
            f"({len(content)} bytes); download it again from {HOME}"
        )


def _decode(archive: Archive, batch: Batch, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [images, 3072] and labels [images] of one file."""
    decode = _decode_binary if isinstance(archive.labels, int) else _decode_pickle
    pixels, labels = decode(batch, content, archive.labels)
    if pixels.dtype != np.uint8 or pixels.shape != (batch.images, PIXELS) or labels.shape != (batch.images,):
        raise UserError(
            f"--data: {batch.name}: expected {batch.images} images of {PIXELS} uint8 pixels and as many labels, "
            f"got {pixels.dtype} {list(pixels.shape)} and {list(labels.shape)}"
        )
    wrong = labels[(labels < 0) | (labels >= archive.classes)]
    if wrong.size:
        raise UserError(f"--data: {batch.name}: expected labels from 0 to {archive.classes - 1}, got {wrong[0]}")
    return pixels, labels


def _decode_binary(batch: Batch, content: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    expected = batch.images * (label_bytes + PIXELS)
    if len(content) != expected:
        raise UserError(f"--data: {batch.name}: truncated or altered: expected {expected} bytes, got {len(content)}")
    records = np.frombuffer(content, np.uint8).reshape(batch.images, label_bytes + PIXELS)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _decode_pickle(batch: Batch, content: bytes, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    entries = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return np.asarray(entries[b"data"]), np.asarray(entries[key])


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ARRAY_PARTS:
            raise UserError(f"--data: a CIFAR file asks for {module}.{name}; expected NumPy arrays only")
        return _ARRAY_PARTS[module, name]


_ARRAY_PARTS = {
    # By the name NumPy 1 wrote into the published files; later versions moved the function.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> Images:
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Images(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64)))
