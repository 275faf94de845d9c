"""Your own folder of .npy arrays: memory-mapped, so that it may be larger than memory."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from expunge.core.errors import BadRecords, Misuse, UnreadableFile
from expunge.core.records import Records
from expunge.core.store import write_atomically
from expunge.datasets.carriers import read_bytes, read_text

_CHUNK = 4096


def read_arrays(folder: Path, classes: int | None) -> Records:
    """The rows of `x.npy` (n, ...), `y.npy`, and if there `ids`, `owners` (.npy or .txt) and `classes.txt`."""
    x, y = _array(folder / "x.npy"), _array(folder / "y.npy")
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf" or not array.dtype.isnative:
            raise UnreadableFile(
                f"{folder / name}.npy holds {array.dtype.str}; save it as plain numbers of this machine's byte order"
            )
    if classes is None and (folder / "classes.txt").exists():
        classes = _count(folder / "classes.txt")
    targets = np.array(y) if y.dtype.kind == "f" else np.array(y, dtype=np.int64)
    return Records(x, targets, _names(folder, "ids"), _names(folder, "owners"), classes=classes)


def save_npy(records: Records, folder: str | Path) -> Path:
    """Write the records as a folder that `load_records` reads back equal; whole or not at all.

    Files: ``x.npy``, ``y.npy``, ``ids.npy``, ``owners.npy``, and ``classes.txt`` if there are classes. Rows are
    written in blocks, so that memory-mapped and streamed records may be larger than memory.

    Args:
        records: what to write; in the dtype that they have.
        folder: a new or empty folder.

    Returns:
        The folder.

    Raises:
        Misuse: if the folder already holds something.
        BadRecords: if numpy has no such dtype (bfloat16) or cannot hold an id (one that ends in NUL).

    Example:
        >>> import tempfile, torch
        >>> records = Records(torch.eye(3), [0, 1, 2], ["a", "b", "c"], ["ann", "ann", "bob"])
        >>> from expunge.datasets import load_records
        >>> load_records(save_npy(records, tempfile.mkdtemp()))
        Records(3 rows of 2 owners, shape (3,), 3 classes)
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Misuse(f"{target} already holds something; give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        _write_rows(records, part / "x.npy")
        _write(part / "y.npy", records.y.cpu().numpy())
        _write(part / "ids.npy", _words(records.ids, "ids"))
        _write(part / "owners.npy", _words(records.owners, "owners"))
        if records.classes is not None:
            write_atomically(part / "classes.txt", f"{records.classes}\n".encode())
        _sync(part)
        os.replace(part, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _array(path: Path) -> np.ndarray[Any, Any]:
    """The array, mapped privately: pages are read when used, and nothing is ever written back."""
    if not path.is_file():
        raise UnreadableFile(f"{path} is missing; a folder of arrays holds x.npy and y.npy")
    try:
        return open_memmap(path, mode="c")
    except (ValueError, OSError, EOFError) as error:
        with path.open("rb") as file:
            start = file.read(6)
        if start[:1] == b"\x80" or "Python objects" in str(error):
            reason = "holds a Python pickle, which is never opened; save it again as an array of numbers"
        elif start != b"\x93NUMPY":
            reason = "is no .npy file; save it with numpy.save"
        else:
            reason = "is torn; save it again"
        raise UnreadableFile(f"{path} {reason}") from None


def _names(folder: Path, name: str) -> list[str] | None:
    array, text = folder / f"{name}.npy", folder / f"{name}.txt"
    if array.exists() and text.exists():
        raise UnreadableFile(f"{folder} holds both {array.name} and {text.name}; keep one")
    if text.exists():
        return read_text(text).removesuffix("\n").split("\n") if read_bytes(text) else []
    if not array.exists():
        return None
    words = _array(array)
    if words.ndim != 1 or words.dtype.kind not in "iuU":
        raise UnreadableFile(
            f"{array} holds {words.dtype.str} of shape {words.shape}; save (n,) text or whole numbers, one for each row"
        )
    return [str(word) for word in words.tolist()]


def _count(path: Path) -> int:
    text = read_text(path).strip()
    if not text.isdecimal():
        raise UnreadableFile(f'{path} must hold the number of classes, got "{text[:40]}"')
    return int(text)


def _write_rows(records: Records, path: Path) -> None:
    first = records.select(list(range(min(1, len(records))))).x
    try:
        dtype = first.cpu().numpy().dtype
    except TypeError:
        raise BadRecords(f"numpy has no {first.dtype}; convert x to float32 first") from None
    rows = open_memmap(path, mode="w+", dtype=dtype, shape=(len(records), *records.shape))
    start = 0
    for x, _ in records.batches(torch.arange(len(records)).split(_CHUNK)):
        rows[start : start + len(x)] = x.cpu().numpy()
        start += len(x)
    rows.flush()


def _words(words: Sequence[str], name: str) -> np.ndarray[Any, np.dtype[np.str_]]:
    array = np.array(words, dtype=np.str_)
    if array.tolist() != list(words):
        raise BadRecords(f"numpy cannot hold {name} that end in a NUL character; rename them")
    return array


def _write(path: Path, array: np.ndarray[Any, Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
