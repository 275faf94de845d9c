"""What rows hold, whatever they are called and however they are stored, to find the same row in two sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expunge.core.records import Records

_AT_ONCE = 2**22
_LEVELS = b"levels"


def contents(records: Records) -> Iterator[tuple[int, list[bytes]]]:
    """Position of each row, and digests of the forms that its values have: two rows are equal if any of theirs agree.

    The forms: the values as a model reads them, in float32; their levels, if all are multiples of 1/255 from 0 to 1 to
    within rounding; and the levels that they are, if all are whole numbers from 0 to 255. So a picture is the same as
    bytes, as levels in any other type, divided by 255 in any precision from float16 up, and in another shape. Labels,
    ids and owners do not matter.

    Rows that differ may pass for equal where one is 255 times the other, or where they differ beyond float32's digits;
    rows whose values were rounded, scaled or changed in any other way are never equal.

    Cost: a pass over the rows, in float64 unless they are bytes, and one to three digests a row.
    """
    at_once = max(1, _AT_ONCE // max(1, torch.Size(records.shape).numel()))
    position = 0
    for x, _ in records.batches(torch.arange(len(records)).split(at_once)):
        for row, found in enumerate(_of_bytes(x) if x.dtype is torch.uint8 else _of_numbers(x)):
            yield position + row, found
        position += len(x)


def _of_bytes(x: Tensor) -> Iterator[list[bytes]]:
    return ([_digest(_LEVELS, row)] for row in x.flatten(1).cpu().numpy())


def _of_numbers(x: Tensor) -> Iterator[list[bytes]]:
    values = x.flatten(1).cpu().double()
    # Half precision keeps 11 bits, of a level divided by 255 and multiplied again all to within an eighth.
    ease = 0.125 if x.dtype is torch.float16 else 1e-3
    forms = [_levels(values * 255, ease), _levels(values, 0.0)]
    for row, seen in enumerate(values.float().add_(0.0).numpy()):  # adding 0 makes -0.0 the 0.0 that it equals
        yield [_digest(b"seen", seen), *(_digest(_LEVELS, form[row]) for form, fits in forms if fits[row])]


def _levels(values: Tensor, ease: float) -> tuple[Any, list[bool]]:
    """Values rounded to bytes, and of which rows all values are bytes, to within `ease`."""
    levels = values.round().clamp(0, 255)
    return levels.to(torch.uint8).numpy(), ((values - levels).abs() <= ease).all(1).tolist()


def _digest(form: bytes, row: Any) -> bytes:
    return hashlib.sha256(form + row.tobytes()).digest()
