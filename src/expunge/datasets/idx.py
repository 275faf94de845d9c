"""The IDX format of MNIST: a magic number that says type and dimensions, the sizes, then the values, big-endian."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from expunge.core.errors import UnreadableFile
from expunge.datasets.carriers import read_bytes

# Type codes of the format (LeCun, Cortes and Burges, "The MNIST database", section on file formats).
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path, *, md5: str | None = None) -> np.ndarray[Any, Any]:
    """The array in an IDX file, plain or gzipped (told by its first bytes), in the machine's byte order.

    Args:
        path: the file.
        md5: expected digest of the decompressed bytes; guards against a wrong file, not against an adversary.

    Raises:
        UnreadableFile: if the file is missing, torn, not IDX, or not the one expected.
    """
    data = read_bytes(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UnreadableFile(f"{path} is a torn gzip file ({error}); fetch it again") from None
    if md5 is not None:
        got = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if got != md5:
            raise UnreadableFile(f"{path} is not the published file: md5 {got}, expected {md5}; fetch it again")
    return _parse(data, path)


def _parse(data: bytes, path: Path) -> np.ndarray[Any, Any]:
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _TYPES or data[3] == 0:
        raise UnreadableFile(f"{path} is no IDX file: it begins with {data[:4].hex() or 'nothing'}; check the path")
    dtype, start = np.dtype(_TYPES[data[2]]), 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3]))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise UnreadableFile(
            f"{path} is torn: it holds {len(data):,} bytes, its header says {expected:,}; fetch it again"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
