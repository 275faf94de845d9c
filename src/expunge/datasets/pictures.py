"""Your own folder of pictures in a standard format: IDX files as of MNIST, or the binary version of CIFAR."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.records import Records
from expunge.datasets.carriers import read_bytes
from expunge.datasets.dataset import row_ids
from expunge.datasets.idx import read_idx

_PREFIX = {"train": "train", "test": "(?:t10k|test)"}
_PIXELS = 3 * 32 * 32
_TEN = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_HUNDRED = {"train": ("train.bin",), "test": ("test.bin",)}
_PYTHON_VERSION = ("data_batch_1", "test_batch", "batches.meta")


def is_idx(folder: Path) -> bool:
    """True if the folder holds a file named as images in IDX format."""
    return any(re.search(r"-images[-.]idx\d-ubyte", path.name) for path in folder.iterdir())


def read_idx_folder(folder: Path, part: str, classes: int | None) -> Records:
    """The rows of ``train-images-idx3-ubyte`` (or t10k-, test-; .gz or not) and its labels."""
    images = read_idx(_only(folder, part, "images"))
    labels = read_idx(_only(folder, part, "labels"))
    if images.ndim < 2 or labels.ndim != 1 or labels.dtype.kind not in "iu" or len(images) != len(labels):
        raise UnreadableFile(
            f"{folder} has images of shape {images.shape} and labels of shape {labels.shape}; they are not of one set"
        )
    return Records(
        images, labels.astype(np.int64), [f"{part}-{row:05d}" for row in range(len(images))], classes=classes
    )


def is_cifar(folder: Path) -> bool:
    """True if the folder holds a file named as one of the binary version of CIFAR."""
    names = {name for parts in (_TEN, _HUNDRED) for files in parts.values() for name in files}
    return any((folder / name).exists() for name in names)


def refuse_pickled_cifar(folder: Path) -> None:
    """UnreadableFile if the folder is the python version of CIFAR, which is made of pickles."""
    hundred = all((folder / name).exists() for name in ("train", "test", "meta"))
    if hundred or any((folder / name).exists() for name in _PYTHON_VERSION):
        archive = "cifar-100-binary.tar.gz" if hundred else "cifar-10-binary.tar.gz"
        raise UnreadableFile(
            f"{folder} is the python version of CIFAR: pickles, which are never opened; get the binary one, {archive}"
        )


def read_cifar(folder: Path, part: str, label: str | None) -> Records:
    """The rows of the binary version of CIFAR-10 or CIFAR-100: (n, 3, 32, 32) uint8, red, green, blue."""
    hundred = any((folder / name).exists() for files in _HUNDRED.values() for name in files)
    if hundred:
        if label not in (None, "coarse", "fine"):
            raise Misuse(f'label must be "fine" (100 classes) or "coarse" (20) for CIFAR-100, got "{label}"')
        coarse = label == "coarse"
        rows = _records_of(folder, _HUNDRED[part], 2)
        return _cifar_records(rows, int(not coarse), 2, "cifar100", part, 20 if coarse else 100)
    if label is not None:
        raise Misuse(f'CIFAR-10 has one label a row, so leave out label, got "{label}"')
    return _cifar_records(_records_of(folder, _TEN[part], 1), 0, 1, "cifar10", part, 10)


def _only(folder: Path, part: str, what: str) -> Path:
    pattern = re.compile(rf"(?:.*-)?{_PREFIX[part]}-{what}[-.]idx\d-ubyte(?:\.gz)?")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if not found:
        digits = "idx3" if what == "images" else "idx1"
        name = f"{'train' if part == 'train' else 't10k'}-{what}-{digits}-ubyte"
        raise UnreadableFile(f"{folder} holds no {part} {what}: {name} or {name}.gz is missing")
    if len(found) > 1:
        raise UnreadableFile(
            f"{folder} holds more than one file of {part} {what} ({', '.join(path.name for path in found)}); keep one"
        )
    return found[0]


def _records_of(folder: Path, names: tuple[str, ...], labels: int) -> Tensor:
    """(n, labels + 3072) the bytes of all rows of these files."""
    for name in names:
        if not (folder / name).exists():
            raise UnreadableFile(f"{folder / name} is missing; the part is made of {', '.join(names)}: unpack it again")
    width, parts = labels + _PIXELS, []
    for name in names:
        data = read_bytes(folder / name)
        if not data or len(data) % width:
            raise UnreadableFile(
                f"{folder / name} is torn: {len(data):,} bytes are not whole rows of {width:,}; unpack it again"
            )
        parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, width))
    return torch.cat(parts)


def _cifar_records(rows: Tensor, label: int, labels: int, name: str, part: str, classes: int) -> Records:
    highest = int(rows[:, label].max())
    if highest >= classes:
        raise UnreadableFile(
            f"a row of {name} is labelled {highest}, above {classes - 1}: not the binary version; unpack it again"
        )
    pixels = rows[:, labels:].reshape(-1, 3, 32, 32).contiguous()
    return Records(pixels, rows[:, label].to(torch.int64), row_ids(name, part, len(rows)), classes=classes)
