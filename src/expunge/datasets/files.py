"""Your own data: one door for tables, folders of arrays and folders of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.records import Records
from expunge.datasets.arrays import read_arrays
from expunge.datasets.pictures import is_cifar, is_idx, read_cifar, read_idx_folder, refuse_pickled_cifar
from expunge.datasets.tables import is_table, read_table

_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npz")


def load_records(
    path: str | Path,
    *,
    id: str | None = None,
    owner: str | None = None,
    label: str | None = None,
    columns: Sequence[str] | None = None,
    scale: Mapping[str, tuple[float, float]] | None = None,
    categories: Mapping[str, Sequence[Any]] | None = None,
    classes: Sequence[Any] | int | None = None,
    regression: bool = False,
    part: str | None = None,
) -> Records:
    """Your own rows from a file or folder; what lies at `path` decides how it is read.

    ===========================================  ====================================================================
    a table, .csv (.gz) or .parquet              `label` required; `id`, `owner`, `columns`, `scale`, `categories`,
                                                 `classes`, `regression`; features become (d,) float32
    a folder with ``x.npy`` and ``y.npy``        `classes` (a number); if there, also ``ids`` and ``owners`` (.npy, or
                                                 .txt with one a line); memory-mapped, dtype kept
    a folder of IDX files (MNIST format)         `part`, `classes` (a number); .gz or plain; dtype kept
    a folder of CIFAR-10 or -100, binary         `part`; for CIFAR-100 `label` is "fine" (default) or "coarse"; uint8
                                                 (3, 32, 32)
    ===========================================  ====================================================================

    Nothing is ever computed over the rows: no mean, no list of the values that happen to be present. Such a statistic
    would keep a trace of every removed row. So constants come from you, and must not come from these rows either.

    Without ids, rows are numbered from 0 (pictures ``train-00017``); the numbers mean the same rows only as long as the
    file stays as it is, so give ids if rows will ever be dropped from it. Without owners, each row is its own owner.

    Args:
        path: file or folder.
        id: column that names each row; no two alike.
        owner: column that says whose row it is.
        label: column to predict.
        columns: which columns are features, in this order; default: all others, in the order of the file.
        scale: column -> (mean, std): the feature is (value - mean) / std.
        categories: column of words -> all its values: one 0/1 feature each, in this order.
        classes: all labels in the order of their numbers (labels that are words), or how many (whole numbers); for
            whole numbers the default is the highest that is present plus 1, which you should rather fix.
        regression: the label is a number to be predicted, not a class.
        part: "train" (default) or "test".

    Raises:
        UnreadableFile: a file is missing, torn, pickled, or not what it seems.
        BadRecords: a column is missing; a row lacks a value, an id or an owner; text where a number should be; a
            repeated id; NaN; a label out of range.
        Misuse: an option that does not go with what lies at `path`.
        Unsupported: Parquet without pyarrow.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "customers.csv")
        >>> _ = path.write_text("customer,age,plan,left\\nann,40,pro,no\\nbob,25,basic,yes\\n")
        >>> load_records(path, id="customer", label="left", classes=["no", "yes"], scale={"age": (40, 15)},
        ...              categories={"plan": ["basic", "pro"]}).x
        tensor([[ 0.,  0.,  1.],
                [-1.,  1.,  0.]])
    """
    place = Path(path)
    if not place.exists():
        raise UnreadableFile(f"there is nothing at {place}; check the path")
    options: dict[str, Any] = {
        "id": id,
        "owner": owner,
        "label": label,
        "columns": columns,
        "scale": scale,
        "categories": categories,
    }
    options |= {"classes": classes, "regression": regression or None, "part": part}
    given = {name for name, value in options.items() if value is not None}
    if place.is_file():
        _refuse_other_file(place)
        _refuse(given, {"part"}, "a table")
        return read_table(
            place,
            id=id,
            owner=owner,
            label=label,
            columns=columns,
            scale=scale or {},
            categories=categories or {},
            classes=classes,
            regression=regression,
        )
    if (place / "x.npy").exists() or (place / "y.npy").exists():
        _refuse(given, set(options) - {"classes"}, "a folder of arrays")
        return read_arrays(place, _number(classes))
    if is_idx(place):
        _refuse(given, set(options) - {"classes", "part"}, "a folder of IDX files")
        return read_idx_folder(place, _part(part), _number(classes))
    if is_cifar(place):
        _refuse(given, set(options) - {"label", "part"}, "a folder of CIFAR")
        return read_cifar(place, _part(part), label)
    refuse_pickled_cifar(place)
    raise UnreadableFile(
        f"{place} holds none of x.npy with y.npy, IDX files (MNIST) or CIFAR *.bin files; check the path"
    )


def _refuse_other_file(path: Path) -> None:
    if is_table(path):
        return
    if path.suffix == ".npy":
        raise UnreadableFile(f"{path} is one array; give the folder that holds it as x.npy, with y.npy")
    if path.suffix in _PICKLES:
        raise UnreadableFile(
            f"{path} is {path.suffix}, which may hold pickles and is never opened; save x.npy and y.npy"
        )
    raise UnreadableFile(f"{path} is no table that can be read; save it as .csv or .parquet")


def _refuse(given: set[str], foreign: set[str], kind: str) -> None:
    for name in sorted(given & foreign):
        raise Misuse(f"{name}= does not go with {kind}; leave it out")


def _number(classes: Sequence[Any] | int | None) -> int | None:
    if classes is None or isinstance(classes, int):
        return classes
    raise Misuse("classes must be a number here, for the labels are whole numbers; a list of words is for tables")


def _part(part: str | None) -> str:
    if part not in (None, "train", "test"):
        raise Misuse(f'part must be "train" or "test", got "{part}"')
    return part or "train"
