"""The forms in which a row may lie about: bytes of every number type, decimal text, lines of a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.digest import array_of

Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_INTEGERS = {"uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
FEW = 8  # numbers in a row
_SHORTEST_TEXT = 23  # characters: below this, the fast look for numbers in text may not see the row


def raw(x: Tensor) -> Array:
    """(n, bytes) the rows as stored."""
    return _as_bytes(array_of(x))


def byte_forms(x: Tensor) -> Iterator[tuple[str, Array]]:
    """(name, (n, bytes) uint8) of every form of the (n, ...) rows: little-endian, then big-endian."""
    yield "raw bytes", raw(x)
    if x.element_size() > 1:
        yield "raw bytes big-endian", _as_bytes(array_of(x).byteswap())
    if x.ndim == 4 and x.shape[1] == 3:
        yield "raw bytes", raw(x.permute(0, 2, 3, 1))  # the colours of a pixel side by side
    for name, values in number_forms(x):
        array = array_of(values)
        yield name, _as_bytes(array)
        if array.itemsize > 1:
            yield f"{name} big-endian", _as_bytes(array.byteswap())


def number_forms(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, (n, ...)) the rows as numbers of other types; pixels also divided by 255, in each way that rounds."""
    for name, dtype in _FLOATS.items():
        if dtype is not x.dtype:
            yield name, x.to(dtype)
        if x.dtype is torch.uint8:
            for values in _divided(x, dtype):
                yield f"{name} / 255", values
    if not x.is_floating_point() and x.dtype is not torch.bool and x.numel():
        low, high = int(x.min()), int(x.max())
        for name, dtype in _INTEGERS.items():
            if dtype is not x.dtype and torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
                yield name, x.to(dtype)
    pixels = None if x.dtype is torch.uint8 else pixels_of(x)
    if pixels is not None and x.is_floating_point():
        for values in pixels:
            yield "uint8", values


def _divided(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for way in (dtype, torch.float32, torch.float64):
        yield (x.to(way) * (1 / 255)).to(dtype)
        yield (x.to(way) / 255).to(dtype)


def pixels_of(x: Tensor) -> list[Tensor] | None:
    """The rows as uint8 pixels, in each way that rounds; None if they are no pixels."""
    if x.dtype is torch.uint8:
        return [x]
    if not x.numel() or x.dtype is torch.bool or float(x.min()) < 0:
        return None
    high = float(x.max())
    if x.is_floating_point() and high <= 1:
        scaled = x.double() * 255
        return [scaled.round().to(torch.uint8), scaled.to(torch.uint8)]
    whole = not x.is_floating_point() or bool((x == x.round()).all())
    return [x.to(torch.uint8)] if high <= 255 and whole else None


def pictures(x: Tensor) -> Array | None:
    """(n, planes, height, width) uint8 pictures that the rows are, with each way of rounding as rows of their own.

    None if the rows have no shape of a picture: (h, w), (1, h, w), (3, h, w), or flat of square length from 36 on.
    """
    pixels = pixels_of(x)
    if pixels is None:
        return None
    side = math.isqrt(math.prod(x.shape[1:]))
    shape = tuple(x.shape[1:])
    if len(shape) == 1 and side * side == shape[0] and side >= 6:
        shape = (1, side, side)
    elif len(shape) == 2:
        shape = (1, *shape)
    elif len(shape) == 3 and shape[2] in (1, 3) and shape[0] not in (1, 3):
        pixels, shape = [one.permute(0, 3, 1, 2) for one in pixels], (shape[2], shape[0], shape[1])
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[2] < 4:
        return None
    return np.concatenate([array_of(one.reshape(len(x), *shape)) for one in pixels])


def texts(x: Tensor) -> Iterator[tuple[str, list[bytes]]]:
    """(name, n texts): the numbers of each row in decimal, each with one comma before and after it.

    As Python, numpy, pandas and JavaScript write them in full: 0.0, 0. and 0. A text too short to be told from
    others is empty.
    """
    flat = x.reshape(len(x), -1)
    if flat.dtype is torch.uint8:
        yield from _texts_of_pixels(flat.tolist())
        return
    for name, values in _decimal_values(flat):
        whole = all(word.lstrip("-").isdigit() for word in values[0]) and name == "decimal text"
        for ending in _endings(whole):
            yield name, [_joined(row, ending) for row in values]


def _decimal_values(flat: Tensor) -> Iterator[tuple[str, list[list[str]]]]:
    if not flat.is_floating_point():
        yield "decimal text", [list(map(str, row)) for row in flat.to(torch.int64).tolist()]
    else:
        yield "decimal text", _words(flat.double().numpy())
        if flat.dtype is not torch.float64:
            yield "decimal text", _words(flat.float().numpy())


def short_texts(x: Tensor) -> list[set[bytes]]:
    """For each row of few numbers, which `texts` leaves out: its decimals, as tables and JSON join them.

    A set is empty if the row is long, or too plain to be told from other numbers: under 8 digits in all, or of whole
    numbers only.
    """
    found: list[set[bytes]] = [set() for _ in range(len(x))]
    if math.prod(x.shape[1:]) > FEW or x.dtype is torch.uint8:
        return found
    for _, values in _decimal_values(x.reshape(len(x), -1)):
        for place, words in enumerate(values):
            if len(words) < 2 or sum(map(str.isdigit, "".join(words))) < 8 or not any("." in word for word in words):
                continue
            for ending in ("", ".0"):
                ended = [word if "." in word or "e" in word else word + ending for word in words]
                found[place] |= {between.join(ended).encode() for between in (",", ", ", ";", "\t", " ")}
    return found


def _texts_of_pixels(rows: list[list[int]]) -> Iterator[tuple[str, list[bytes]]]:
    """The same of rows of one byte a value, by tables of all 256."""
    level = torch.arange(256, dtype=torch.uint8)
    single = (level.float() * (1 / 255)).numpy()
    divided = (level.float() / 255).double().numpy()
    tables = (single, single.astype(np.float64), divided, level.double().numpy() / 255)
    named = [("decimal text", list(map(str, range(256))))]
    named += [("decimal text / 255", _words(table[None])[0]) for table in tables]
    for name, words in named:
        for ending in _endings(name == "decimal text"):
            ended = [word if "." in word or "e" in word else word + ending for word in words]
            yield name, [_framed(",".join(map(ended.__getitem__, row)), len(row)) for row in rows]


def _endings(whole: bool) -> tuple[str, ...]:
    return ("", ".0") if whole else ("", ".0", ".")


def _words(values: Array) -> list[list[str]]:
    """Shortest decimals that give the same number back, without the .0 of whole ones."""
    write: Callable[[Any], str] = repr if values.dtype == np.float64 else str
    return [[write(v).removesuffix(".0") for v in (row.tolist() if write is repr else row)] for row in values]


def _joined(words: list[str], ending: str) -> bytes:
    return _framed(",".join(word if "." in word or "e" in word else word + ending for word in words), len(words))


def _framed(text: str, values: int) -> bytes:
    return f",{text},".encode() if values >= 4 and len(text) >= _SHORTEST_TEXT else b""


def _as_bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
