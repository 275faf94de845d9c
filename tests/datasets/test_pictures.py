import gzip
import struct

import numpy as np
import pytest
import torch

from expunge.core.errors import Misuse, UnreadableFile
from expunge.datasets import load_records

RNG = np.random.default_rng(0)
CODES = {"|u1": 0x08, "|i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx(array):
    head = bytes([0, 0, CODES[array.dtype.str], array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def small_mnist(folder, n=5):
    content = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = RNG.integers(0, 256, (n, 6, 4), dtype=np.uint8)
        labels = RNG.integers(0, 3, n, dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        content[part] = images, labels
    return content


def test_idx_folder(tmp_path):
    content = small_mnist(tmp_path)
    for part in ("train", "test"):
        records = load_records(tmp_path, part=part, classes=3)
        assert np.array_equal(records.x.numpy(), content[part][0])
        assert records.x.dtype is torch.uint8
        assert records.y.tolist() == content[part][1].tolist()
        assert records.ids[4] == f"{part}-00004"
        assert records.classes == 3
    assert torch.equal(load_records(tmp_path).x, load_records(tmp_path, part="train").x)


@pytest.mark.parametrize("code", sorted(CODES))
def test_idx_types_come_in_the_order_of_the_machine(tmp_path, code):
    small_mnist(tmp_path)
    images = RNG.integers(0, 100, (5, 2)).astype(code)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    assert np.array_equal(load_records(tmp_path).x.numpy(), images)


def test_torn_and_wrong_idx_files(tmp_path):
    small_mnist(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    with pytest.raises(UnreadableFile, match=r"is torn: it holds 135 bytes, its header says 136; fetch it again"):
        load_records(tmp_path)
    images.write_bytes(b"hello")
    with pytest.raises(UnreadableFile, match="is no IDX file: it begins with 68656c6c"):
        load_records(tmp_path)
    images.write_bytes(gzip.compress(whole)[:-12])
    with pytest.raises(UnreadableFile, match="is a torn gzip file"):
        load_records(tmp_path)
    images.write_bytes(idx(RNG.integers(0, 9, (4, 2), dtype=np.uint8)))
    with pytest.raises(
        UnreadableFile, match=r"images of shape \(4, 2\) and labels of shape \(5,\); they are not of one"
    ):
        load_records(tmp_path)
    images.rename(tmp_path / "train-images.idx3-ubyte")
    images.write_bytes(whole)
    with pytest.raises(UnreadableFile, match="holds more than one file of train images"):
        load_records(tmp_path)
    images.unlink()
    (tmp_path / "train-images.idx3-ubyte").unlink()
    with pytest.raises(UnreadableFile, match=r"holds no train images: train-images-idx3-ubyte or .*\.gz is missing"):
        load_records(tmp_path)
    with pytest.raises(Misuse, match='part must be "train" or "test", got "all"'):
        load_records(tmp_path, part="all")


def rows(n, labels, high):
    marks = RNG.integers(0, high, (n, labels), dtype=np.uint8)
    return marks, RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def write(path, marks, pixels):
    path.write_bytes(np.concatenate([marks, pixels.reshape(len(pixels), -1)], axis=1).tobytes())


def test_cifar10(tmp_path):
    parts = [rows(3, 1, 10) for _ in range(5)]
    for i, part in enumerate(parts):
        write(tmp_path / f"data_batch_{i + 1}.bin", *part)
    test = rows(2, 1, 10)
    write(tmp_path / "test_batch.bin", *test)
    records = load_records(tmp_path)
    assert np.array_equal(records.x.numpy(), np.concatenate([pixels for _, pixels in parts]))
    assert records.x.dtype is torch.uint8
    assert records.y.tolist() == np.concatenate([marks[:, 0] for marks, _ in parts]).tolist()
    assert (records.classes, records.ids[14]) == (10, "cifar10-train-00014")
    assert np.array_equal(load_records(tmp_path, part="test").x.numpy(), test[1])
    with pytest.raises(Misuse, match="CIFAR-10 has one label a row"):
        load_records(tmp_path, label="fine")
    (tmp_path / "data_batch_3.bin").write_bytes(b"x" * 5000)
    with pytest.raises(UnreadableFile, match=r"data_batch_3\.bin is torn: 5,000 bytes are not whole rows of 3,073"):
        load_records(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(UnreadableFile, match=r"data_batch_3\.bin is missing; the part is made of data_batch_1\.bin"):
        load_records(tmp_path)


def test_cifar100(tmp_path):
    marks, pixels = rows(6, 2, 20)
    marks[:, 1] += 70
    write(tmp_path / "train.bin", marks, pixels)
    fine = load_records(tmp_path)
    coarse = load_records(tmp_path, label="coarse")
    assert np.array_equal(fine.x.numpy(), pixels)
    assert (fine.y.tolist(), fine.classes) == (marks[:, 1].tolist(), 100)
    assert (coarse.y.tolist(), coarse.classes) == (marks[:, 0].tolist(), 20)
    assert fine.ids == coarse.ids
    with pytest.raises(Misuse, match='label must be "fine"'):
        load_records(tmp_path, label="y")
    with pytest.raises(UnreadableFile, match=r"test\.bin is missing"):
        load_records(tmp_path, part="test")
    write(tmp_path / "train.bin", marks + 100, pixels)
    with pytest.raises(UnreadableFile, match="above 99: not the binary version"):
        load_records(tmp_path)


@pytest.mark.parametrize(
    ("files", "archive"),
    [(("data_batch_1", "batches.meta"), "cifar-10-binary"), (("train", "test", "meta"), "cifar-100-binary")],
)
def test_the_python_version_of_cifar_is_refused(tmp_path, files, archive):
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(
        UnreadableFile, match=rf"pickles, which are never opened; get the binary one, {archive}\.tar\.gz"
    ):
        load_records(tmp_path)
