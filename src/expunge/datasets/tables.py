"""Your own table: a CSV or Parquet file with named columns for id, owner and label."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.core.errors import BadRecords, Misuse, UnreadableFile, Unsupported
from expunge.core.records import Records
from expunge.datasets.encode import Number, OneOf, coded, encode, numbers

if TYPE_CHECKING:
    import pandas as pd

CSV, PARQUET = (".csv", ".csv.gz"), (".parquet", ".pq")
_MISSING = ["", "#N/A", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "nan", "null"]


def is_table(path: Path) -> bool:
    """True if the file's name ends as that of a table that can be read."""
    return path.name.lower().endswith(CSV + PARQUET)


def read_table(
    path: Path,
    *,
    id: str | None,
    owner: str | None,
    label: str | None,
    columns: Sequence[str] | None,
    scale: Mapping[str, tuple[float, float]],
    categories: Mapping[str, Sequence[Any]],
    classes: Sequence[Any] | int | None,
    regression: bool,
) -> Records:
    """The rows of a table; the arguments are those of `load_records`."""
    if label is None:
        raise BadRecords(f"which column of {path.name} is the label? give label=")
    words = {name for name in (id, owner, *categories) if name is not None}
    if classes is not None and not isinstance(classes, int):
        words.add(label)
    frame = _read(path, words)
    features = _features(frame, path, (id, owner, label), columns)
    for option, names in (("scale", scale), ("categories", categories)):
        for name in names:
            if name not in features:
                raise BadRecords(f'{option} names "{name}", which is no feature; features are {", ".join(features)}')
    plan = [_column(name, scale, categories) for name in features]
    x, _ = encode(frame, plan, path.name)
    y, count = _targets(frame[label], label, classes, regression, path)
    ids = None if id is None else _names(frame[id], id, path)
    owners = None if owner is None else _names(frame[owner], owner, path)
    return Records(x, y, ids, owners, classes=count)


def _read(path: Path, words: set[str]) -> pd.DataFrame:
    frame = _read_csv(path, words) if path.name.lower().endswith(CSV) else _read_parquet(path)
    if not len(frame):
        raise UnreadableFile(f"{path} holds no rows; give at least one")
    return frame


def _read_csv(path: Path, words: set[str]) -> pd.DataFrame:
    """Columns in `words` stay text as it stands ("007", "NA"); an empty cell of another column is missing."""
    header = _parse_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    for name in header:
        if header.count(name) > 1:
            raise BadRecords(f'{path.name} has two columns "{name}"; rename one')
    missing = {name: _MISSING for name in header if name not in words}
    text = {name: str for name in header if name in words}
    return _parse_csv(path, dtype=text, na_values=missing, keep_default_na=False, low_memory=False)


def _parse_csv(path: Path, **options: Any) -> pd.DataFrame:
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", pd.errors.ParserWarning
            )  # a row longer than the header: values would be lost
            return pd.read_csv(path, encoding="utf-8-sig", index_col=False, **options)
    except (ValueError, OSError, EOFError, zlib.error, pd.errors.ParserWarning) as error:
        raise UnreadableFile(f"{path} is no CSV table in UTF-8 ({_line(error)}); mend it or save it again") from None


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError:
        raise Unsupported(
            "Parquet needs the package pyarrow, which is missing; run: pip install 'expunge[parquet]'"
        ) from None
    except (ValueError, OSError) as error:
        raise UnreadableFile(f"{path} is no Parquet table ({_line(error)}); save it again") from None


def _features(
    frame: pd.DataFrame, path: Path, named: tuple[str | None, ...], columns: Sequence[str] | None
) -> list[str]:
    present = [str(name) for name in frame.columns]
    roles = [name for name in named if name is not None]
    for name in (*roles, *(columns or ())):
        if name not in present:
            raise BadRecords(f'{path.name} has no column "{name}"; its columns are {", ".join(present)}')
    if columns is None:
        features = [name for name in present if name not in roles]
    else:
        features = list(columns)
        for name in features:
            if name in roles or features.count(name) > 1:
                raise BadRecords(f'columns names "{name}", which is id, owner, label or named twice; leave it out')
    if not features:
        raise BadRecords(
            f"{path.name} has no column left for features; it needs at least one besides id, owner and label"
        )
    return features


def _column(
    name: str, scale: Mapping[str, tuple[float, float]], categories: Mapping[str, Sequence[Any]]
) -> Number | OneOf:
    if name in categories:
        if name in scale:
            raise Misuse(f'column "{name}" is in both scale and categories; numbers are scaled, words are one-hot')
        return OneOf(name, _listed(categories[name], f'categories of "{name}"'))
    mean, std = scale.get(name, (0.0, 1.0))
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise Misuse(f'scale of "{name}" must be (mean, std) with std > 0, got ({mean}, {std})')
    return Number(name, mean, std)


def _listed(values: Sequence[Any], what: str) -> tuple[str, ...]:
    if isinstance(values, str) or not len(values):
        raise Misuse(f"{what} must be a list of all values in a fixed order, got {values!r}")
    return tuple(map(str, values))


def _targets(
    column: pd.Series[Any], name: str, classes: Sequence[Any] | int | None, regression: bool, path: Path
) -> tuple[np.ndarray[Any, Any], int | None]:
    if regression and classes is not None:
        raise Misuse("regression=True has float targets and so no classes; leave out one of both")
    if classes is not None and not isinstance(classes, int):
        values = _listed(classes, "classes")
        return coded(column, name, values, path.name), len(values)
    if not regression and not _is_number(column):
        raise BadRecords(
            f'the label column "{name}" of {path.name} holds text ("{column.iloc[0]}" in row 0); '
            "give every label in order, as --classes no,yes or classes=[...]: their order fixes their numbers"
        )
    values_of = numbers(column, name, path.name)
    if np.isnan(values_of).any():
        row = int(np.isnan(values_of).argmax())
        raise BadRecords(f'row {row} of {path.name} has no label in column "{name}"; drop the row or fill it')
    if regression:
        return values_of.astype(np.float32), None
    if column.dtype.kind == "f":
        raise BadRecords(
            f'the label column "{name}" of {path.name} holds decimal numbers; give regression=True for float targets, '
            "or save the labels as whole numbers"
        )
    return values_of.astype(np.int64), classes


def _names(column: pd.Series[Any], name: str, path: Path) -> list[str]:
    missing = column.isna().to_numpy()
    words = [str(value) for value in column.tolist()]
    for row, (word, gone) in enumerate(zip(words, missing, strict=True)):
        if gone or not word:
            raise BadRecords(
                f'row {row} of {path.name} has nothing in column "{name}"; each row needs an id and an owner'
            )
    if column.dtype.kind == "f":
        raise BadRecords(f'column "{name}" of {path.name} holds decimal numbers; save ids as text or whole numbers')
    return words


def _is_number(column: pd.Series[Any]) -> bool:
    return getattr(column.dtype, "kind", "O") in "biuf"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
