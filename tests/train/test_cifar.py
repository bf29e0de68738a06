"""The reader of CIFAR, on small archives in the published formats, with a table of their own checksums.

The published archives are not part of the repository; the table that the reader uses by default holds their checksums.
"""

import hashlib
import io
import pickle
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_preact.errors import UserError
from fused_preact.train import cifar

from .trap import Trap

IMAGES = {"data_batch_1": 7, "data_batch_2": 5, "test_batch": 4, "train": 9, "test": 3}


def python2_pickle(pixels, labels, key):
    """What Python 2 and NumPy 1 wrote: a dict of byte strings, a list of labels and an array of pixels."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(pixels.dtype.str[1:].encode()) + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    items = text(b"data") + array + text(key) + b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + items + b"u."


def binary(pixels, labels, label_bytes):
    """Records of the binary version; the coarse label of CIFAR-100 is one that the reader must not take."""
    columns = [np.full(len(labels), 19)] * (label_bytes - 1) + [labels]
    return np.concatenate([np.stack(columns, 1), pixels], 1).astype(np.uint8).tobytes()


def small(published):
    """Table entry, contents of the files, and images of a small archive in the format of a published one."""
    rng = np.random.default_rng([len(published.file), published.classes])
    batches = {"train": [], "test": []}
    contents, images = {}, {"train": [], "test": []}
    for part in ("train", "test"):
        for batch in getattr(published, part)[:2]:
            count = IMAGES[batch.name.removesuffix(".bin")]
            pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = rng.integers(0, published.classes, count)
            if isinstance(published.labels, int):
                content, md5 = binary(pixels, labels, published.labels), None
            else:
                content = python2_pickle(pixels, labels, published.labels)
                md5 = hashlib.md5(content).hexdigest()
            contents[batch.name] = content
            images[part].append((pixels, labels))
            batches[part].append(cifar.Batch(batch.name, count, md5))
    archive = replace(published, train=tuple(batches["train"]), test=tuple(batches["test"]))
    return archive, contents, images


def pack(archive, contents, folder):
    """Write the archive's .tar.gz into folder. Returns its path and the table entry with its checksum."""
    path = folder / archive.file
    with tarfile.open(path, "w:gz") as tar:
        for name, content in [("readme.html", b"not a batch"), *contents.items()]:
            member = tarfile.TarInfo(f"{archive.folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path, replace(archive, md5=hashlib.md5(path.read_bytes()).hexdigest())


def unpack(archive, contents, folder):
    place = folder / archive.folder
    place.mkdir()
    for name, content in contents.items():
        (place / name).write_bytes(content)
    return place


@pytest.fixture
def python(tmp_path):
    """A small unpacked CIFAR-10 of the python version: table entry, folder."""
    archive, contents, _ = small(cifar.PUBLISHED[0])
    return archive, unpack(archive, contents, tmp_path)


@pytest.mark.parametrize("published", cifar.PUBLISHED, ids=lambda archive: archive.file.removesuffix(".tar.gz"))
@pytest.mark.parametrize("form", ["archive", "archive in a folder", "folder", "folder in a folder"])
def test_every_form_gives_the_same_images(published, form, tmp_path):
    """Pixels, fine labels and order come through from each version, packed or not."""
    archive, contents, images = small(published)
    if form.startswith("archive"):
        path, archive = pack(archive, contents, tmp_path)
    else:
        path = unpack(archive, contents, tmp_path)
    dataset = cifar.read(tmp_path if form.endswith("in a folder") else path, [archive])
    assert (dataset.name, dataset.classes, dataset.flip) == (published.dataset, published.classes, True)
    for part, got in (("train", dataset.train), ("test", dataset.test)):
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*images[part], strict=True))
        assert torch.equal(got.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
        assert torch.equal(got.labels, torch.from_numpy(labels))


def test_published_checksum_is_held_to(tmp_path):
    """By default an archive of a published name is refused unless it is the published one."""
    archive, contents, _ = small(cifar.PUBLISHED[0])
    path, _ = pack(archive, contents, tmp_path)
    with pytest.raises(UserError, match="truncated or altered: expected MD5 c58f30108f718f92721af3b95e74349a"):
        cifar.read(path)


def test_truncated_archive(tmp_path):
    """Half a download is one clear error, not a crash in gzip or tar."""
    archive, contents, _ = small(cifar.PUBLISHED[2])
    path, archive = pack(archive, contents, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cifar-100-python.tar.gz: truncated or altered.*\(1000 bytes\); download"):
        cifar.read(path, [archive])


def test_truncated_batch(python):
    """So is half a file of an unpacked archive."""
    archive, folder = python
    file = folder / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="data_batch_2: truncated or altered: expected MD5"):
        cifar.read(folder, [archive])


def test_missing_batch(python):
    """A file that is not there is named."""
    archive, folder = python
    (folder / "test_batch").unlink()
    with pytest.raises(UserError, match=r"test_batch is missing; get cifar-10-python.tar.gz again"):
        cifar.read(folder, [archive])


@pytest.mark.parametrize("listed", [False, True], ids=["wrong checksum", "matching checksum"])
def test_code_in_a_pickle_does_not_run(listed, python, tmp_path):
    """Neither the checksum nor the unpickler alone lets a foreign object through."""
    archive, folder = python
    content = pickle.dumps({b"data": Trap(tmp_path / "sprung")}, 2)
    (folder / "data_batch_1").write_bytes(content)
    if listed:
        first = replace(archive.train[0], md5=hashlib.md5(content).hexdigest())
        archive = replace(archive, train=(first, *archive.train[1:]))
    with pytest.raises(UserError, match="expected NumPy arrays only" if listed else "truncated or altered"):
        cifar.read(folder, [archive])
    assert not (tmp_path / "sprung").exists()


def test_other_numpy_functions_are_not_called_either(python):
    """Of NumPy a file gets what arrays are made of, and no function that opens files."""
    archive, folder = python
    content = b"cnumpy\nfromfile\n."
    (folder / "data_batch_1").write_bytes(content)
    first = replace(archive.train[0], md5=hashlib.md5(content).hexdigest())
    with pytest.raises(UserError, match=r"asks for numpy.fromfile; expected NumPy arrays only"):
        cifar.read(folder, [replace(archive, train=(first, *archive.train[1:]))])


@pytest.mark.parametrize(
    ("dtype", "size", "labels", "message"),
    [
        ("u1", 3072, [1] * 6, r"7 images of 3072 uint8 pixels and as many labels, got uint8 \[7, 3072\] and \[6\]"),
        ("u1", 3071, [1] * 7, r"7 images of 3072 uint8 pixels and as many labels, got uint8 \[7, 3071\] and \[7\]"),
        ("i1", 3072, [1] * 7, r"7 images of 3072 uint8 pixels and as many labels, got int8 \[7, 3072\] and \[7\]"),
        ("u1", 3072, [1] * 6 + [10], "labels from 0 to 9, got 10"),
        ("u1", 3072, [1] * 6 + [-1], "labels from 0 to 9, got -1"),
    ],
    ids=["labels", "pixels", "type", "large label", "negative label"],
)
def test_a_pickle_of_something_else(dtype, size, labels, message, python):
    """Whatever its checksum, it holds so many images and labels of the classes."""
    archive, folder = python
    content = python2_pickle(np.zeros((7, size), dtype), labels, b"labels")
    (folder / "data_batch_1").write_bytes(content)
    first = replace(archive.train[0], md5=hashlib.md5(content).hexdigest())
    with pytest.raises(UserError, match=f"data_batch_1: expected {message}"):
        cifar.read(folder, [replace(archive, train=(first, *archive.train[1:]))])


def test_a_file_that_cannot_be_read(python, monkeypatch):
    """What the system says is told, with the folder."""
    archive, folder = python

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match=r"cifar-10-batches-py: cannot be read: Permission denied"):
        cifar.read(folder, [archive])


def test_the_labels_of_cifar_100_are_the_hundred_fine_ones():
    """The coarse ones lie beside them."""
    found = {archive.file: (archive.classes, archive.labels) for archive in cifar.PUBLISHED[2:]}
    assert found == {"cifar-100-python.tar.gz": (100, b"fine_labels"), "cifar-100-binary.tar.gz": (100, 2)}


def test_an_archive_beside_what_it_unpacked_to(tmp_path):
    """They are one data set, and what is unpacked is read."""
    archive, contents, images = small(cifar.PUBLISHED[0])
    unpack(archive, contents, tmp_path)
    (tmp_path / archive.file).write_bytes(b"half of a download")
    dataset = cifar.read(tmp_path, [archive])
    assert torch.equal(dataset.test.labels, torch.from_numpy(images["test"][0][1]))


def test_an_archive_beside_half_of_what_it_unpacks_to(tmp_path):
    """The one that is whole is read."""
    archive, contents, images = small(cifar.PUBLISHED[0])
    (unpack(archive, contents, tmp_path) / "data_batch_2").unlink()
    _, archive = pack(archive, contents, tmp_path)
    assert torch.equal(cifar.read(tmp_path, [archive]).test.labels, torch.from_numpy(images["test"][0][1]))


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_file_of_a_common_name_is_no_data_set(name, python):
    """CIFAR-100 has files named `train` and `test`; one of them by itself does not make CIFAR-10 two data sets."""
    archive, folder = python
    (folder / name).write_text("mine")
    assert cifar.read(folder, [archive, cifar.PUBLISHED[2]]).name == "CIFAR-10"


@pytest.mark.parametrize("change", ["truncated", "longer"])
def test_binary_of_a_wrong_size(change, tmp_path):
    """A .bin file has no published checksum: its size must be exact."""
    archive, contents, _ = small(cifar.PUBLISHED[1])
    folder = unpack(archive, contents, tmp_path)
    whole = contents["data_batch_1.bin"]
    (folder / "data_batch_1.bin").write_bytes(whole[:-5] if change == "truncated" else whole + b"1")
    with pytest.raises(UserError, match=rf"data_batch_1.bin: truncated or altered: expected {7 * 3073} bytes"):
        cifar.read(folder, [archive])


def test_binary_label_out_of_range(tmp_path):
    """Nor can a label beyond the classes reach the loss."""
    archive, contents, _ = small(cifar.PUBLISHED[1])
    contents["test_batch.bin"] = b"\x0a" + contents["test_batch.bin"][1:]
    folder = unpack(archive, contents, tmp_path)
    with pytest.raises(UserError, match=r"test_batch.bin: expected labels from 0 to 9, got 10"):
        cifar.read(folder, [archive])


def test_two_data_sets_in_one_folder(tmp_path):
    """The reader does not choose between CIFAR-10 and CIFAR-100."""
    archives = []
    for published in cifar.PUBLISHED[::2]:
        archive, contents, _ = small(published)
        unpack(archive, contents, tmp_path)
        archives.append(archive)
    with pytest.raises(UserError, match=r"holds more than one data set, CIFAR-10 in .*, CIFAR-100 in .*; name one"):
        cifar.read(tmp_path, archives)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or folder; expected `digits` or a CIFAR archive or folder"),
        ("empty", "no CIFAR files here; expected one of cifar-10-python.tar.gz"),
        ("mine.tar.gz", "not the name of a published archive; expected one of cifar-10-python.tar.gz"),
    ],
)
def test_wrong_path(name, message, tmp_path):
    """A path with no CIFAR behind it says what was expected there."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: {message}"):
        cifar.read(tmp_path / name)
