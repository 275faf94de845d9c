"""Columns of a table to float32 features, by constants fixed beforehand.

A feature never depends on another row: scaling by the mean of the data, or one-hot over the values that happen to be
present, would leave a trace of every removed row in all that stay, and make exact claims false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.core.errors import BadRecords

if TYPE_CHECKING:
    import pandas as pd

Float = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Number:
    """A numeric column, as (value - mean) / std.

    Attributes:
        name: of the column.
        mean: a constant in the column's unit.
        std: a positive constant in the same unit.
        may_miss: a missing value becomes 0 (so the mean), and a second feature, 1 where it was missing, is added.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    may_miss: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that come of it."""
        return (self.name, f"{self.name} missing") if self.may_miss else (self.name,)

    def encode(self, column: pd.Series[Any], source: str) -> Float:
        """(n, 1) or (n, 2) features."""
        values = numbers(column, self.name, source)
        missing = np.isnan(values)
        if not self.may_miss and missing.any():
            row = int(missing.argmax())
            raise BadRecords(f'row {row} of {source} has no value in column "{self.name}"; fill it or drop the row')
        scaled = (values - self.mean) / self.std
        if not self.may_miss:
            return scaled[:, None]
        return np.stack([np.where(missing, 0.0, scaled), missing.astype(np.float64)], axis=1)


@dataclass(frozen=True)
class OneOf:
    """A column of words out of a fixed list, as one 0/1 feature a word, in the list's order."""

    name: str
    values: tuple[str, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that come of it."""
        return tuple(f"{self.name}={value}" for value in self.values)

    def encode(self, column: pd.Series[Any], source: str) -> Float:
        """(n, values) features, each row with a single 1."""
        places: Float = np.eye(len(self.values))[coded(column, self.name, self.values, source)]
        return places


def encode(
    frame: pd.DataFrame, columns: Sequence[Number | OneOf], source: str
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], tuple[str, ...]]:
    """The table's (n, d) float32 features and their d names; computed in float64.

    Args:
        frame: the table.
        columns: what to make of which column; the others are left out.
        source: what to call the table in an error.

    Raises:
        BadRecords: for a missing value, a word out of its list or a number that is none; names row and column.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        parts = [column.encode(frame[column.name], source).astype(np.float32) for column in columns]
    return np.concatenate(parts, axis=1), tuple(name for column in columns for name in column.features)


def numbers(column: pd.Series[Any], name: str, source: str) -> Float:
    """The column's n values as float64, NaN where one is missing; BadRecords if it holds anything but numbers."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column.dtype) and column.dtype.kind in "biuf":
        values: Float = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values
    if column.dtype.kind not in "OUT" and not pd.api.types.is_string_dtype(column.dtype):
        raise BadRecords(f'column "{name}" of {source} holds {column.dtype}; make it a number first, or leave it out')
    parsed = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = np.isnan(parsed) & column.notna().to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise BadRecords(
            f'column "{name}" of {source} holds text ("{column.iloc[row]}" in row {row}); fix its values with '
            f'categories={{"{name}": [...]}}, leave it out with columns=[...] (both may stand in a JSON file: '
            "--columns FILE), or embed it with datasets.embed"
        )
    return np.asarray(parsed, dtype=np.float64)


def coded(column: pd.Series[Any], name: str, values: Sequence[str], source: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(n,) the place of each value of the column in the list `values`.

    Raises:
        BadRecords: for a value that is not in the list, or a list that names a value twice.
    """
    place = {value: index for index, value in enumerate(values)}
    if len(place) < len(values):
        raise BadRecords(f'the list of values of column "{name}" names one of them twice; give each once')
    missing = column.isna().to_numpy()
    words = column.astype(str).tolist()
    codes = np.array([-1 if gone else place.get(word, -1) for word, gone in zip(words, missing, strict=True)], np.int64)
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        got = "nothing" if missing[row] or not words[row] else f'"{words[row]}"'
        raise BadRecords(
            f'row {row} of {source} has {got} in column "{name}", not one of {", ".join(values)}; '
            "add it to the list or drop the row"
        )
    return codes
