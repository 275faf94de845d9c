"""The training rows: what they hold, what they are called, and whose they are."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core import coins
from expunge.core.digest import array_of, digest_rows
from expunge.core.errors import BadRecords, Misuse, UnknownRecord, Unsupported
from expunge.core.rows import CHUNK, DatasetRows, MapDataset, Rows, TensorRows

_READ_TWICE = 16


class Records:
    """The training rows with labels, ids and owners; immutable.

    A row's identity is (owner, content digest): two owners may hold the same row, and both count. Its id is only a
    name, unique in the set. Selections (`take`, `without`, ...) are views that copy no row, so a memory-mapped set may
    be larger than memory.

    Attributes:
        y: (n,) int64 classes, or (n,) or (n, k) float targets.
        ids: the n names, unique.
        owners: the n owners; without any, every row is its own owner.
        classes: number of classes that the task has (not: that happen to be present); None for float targets.
    """

    def __init__(
        self,
        x: Tensor | np.ndarray[Any, np.dtype[Any]],
        y: Tensor | np.ndarray[Any, np.dtype[Any]] | Sequence[int],
        ids: Sequence[str] | None = None,
        owners: Sequence[str] | None = None,
        *,
        classes: int | None = None,
    ) -> None:
        """Check and keep the rows; `x` (n, ...) is not copied and must not be written to afterwards.

        Integer pixels stay as they are until they are batched. Cost: one pass over float rows, to refuse NaN.

        Raises:
            BadRecords: lengths that differ, a repeated id, NaN or infinite values, labels out of range.
        """
        x, y = _tensor(x, "x"), _labels(y)
        _refuse_shape(x)
        self._start(TensorRows(x), y, ids, owners, classes)
        for start in range(0, len(x) if x.is_floating_point() else 0, CHUNK):
            _refuse_non_finite(x[start : start + CHUNK], self.ids, start)

    def _start(
        self,
        base: Rows,
        y: Tensor,
        ids: Sequence[str] | None,
        owners: Sequence[str] | None,
        classes: int | None,
    ) -> None:
        n = len(base)
        self.ids: tuple[str, ...] = tuple(map(str, range(n))) if ids is None else tuple(ids)
        self.owners: tuple[str, ...] = self.ids if owners is None else tuple(owners)
        for name, size in (("labels", len(y)), ("ids", len(self.ids)), ("owners", len(self.owners))):
            if size != n:
                raise BadRecords(f"x has {n:,} rows but there are {size:,} {name}; give one for each row")
        _refuse_other_than_text(self.ids, "ids")
        _refuse_other_than_text(self.owners, "owners")
        _refuse_repeated(self.ids)
        self.y = y
        self.classes = _classes(y, classes)
        self._base = base
        self._rows: Tensor | None = None
        self._known: np.ndarray[Any, np.dtype[np.uint8]] | None = None

    @classmethod
    def from_dataset(
        cls,
        dataset: MapDataset,
        ids: Sequence[str] | None = None,
        owners: Sequence[str] | None = None,
        *,
        classes: int | None = None,
        workers: int = 0,
    ) -> Records:
        """Records whose rows are read from a map-style data set, batch by batch, by a DataLoader.

        Items must be deterministic: random augmentation would make exact claims false, and is refused when one of the
        first 16 items differs when read twice. Cost: one pass over the data set, for labels, NaN and content digests.
        """
        if len(dataset) == 0:
            raise BadRecords("the data set holds no rows; give at least one")
        for item in range(min(len(dataset), _READ_TWICE)):
            if _bytes(dataset[item]) != _bytes(dataset[item]):
                raise BadRecords(
                    f"item {item} differs when read twice; records must be deterministic, so augment in the model"
                )
        base = DatasetRows(dataset, workers)
        labels, digests = [], []
        for start, (x, y) in enumerate(base.read(torch.arange(len(dataset)).split(CHUNK))):
            _refuse_shape(x)
            _refuse_non_finite(x, ids, start * CHUNK)
            labels.append(_labels(y))
            digests.append(digest_rows(array_of(x), array_of(labels[-1])))
        self = cls.__new__(cls)
        self._start(base, torch.cat(labels), ids, owners, classes)
        self._known = np.concatenate(digests)
        return self

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, record_id: object) -> bool:
        return record_id in self._position

    def __repr__(self) -> str:
        kind = "regression" if self.classes is None else f"{self.classes} classes"
        return f"Records({len(self):,} rows of {len(set(self.owners)):,} owners, shape {self.shape}, {kind})"

    @property
    def x(self) -> Tensor:
        """(n, ...) all rows at once: copies them when this is a selection."""
        return self._base.gather(
            torch.arange(len(self)) if self._rows is None else self._rows, whole=self._rows is None
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self._base.shape

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._base.device

    @property
    def streamed(self) -> bool:
        """True if rows come from a map-style data set rather than from one tensor."""
        return isinstance(self._base, DatasetRows)

    def shared(self) -> tuple[Tensor, Tensor]:
        """The one tensor that this set and all its selections read, and the (n,) places of these rows in it.

        Raises:
            Unsupported: for rows that a map-style data set hands out.
        """
        if not isinstance(self._base, TensorRows):
            raise Unsupported("these rows are streamed from a data set; load them into one tensor first")
        return self._base.tensor, torch.arange(len(self)) if self._rows is None else self._rows

    @cached_property
    def _position(self) -> Mapping[str, int]:
        return {record_id: position for position, record_id in enumerate(self.ids)}

    def digests(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(n, 32) SHA-256 of each row's canonical bytes and label; computed once, shared by selections made after."""
        if self._known is None:
            chunks = torch.arange(len(self)).split(CHUNK)
            self._known = np.concatenate([digest_rows(*map(array_of, batch)) for batch in self.batches(chunks)])
        return self._known

    @cached_property
    def keys(self) -> coins.Keys:
        """(n,) 64-bit keys, hashes of (owner, content digest), by which every reading order is sorted."""
        return coins.row_keys(self.owners, self.digests())

    def batches(self, positions: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of positions: the rows (b, ...) as stored, and their labels."""
        return self._base.read_with(positions, self._rows, self.y)

    def positions(self, ids: Iterable[str]) -> list[int]:
        """Positions of the named records.

        Raises:
            UnknownRecord: for an id that the set does not hold.
        """
        known = self._position
        try:
            return [known[record_id] for record_id in ids]
        except KeyError as missing:
            raise UnknownRecord(
                f'record "{missing.args[0]}" is not among the {len(self):,} records; list them with: expunge records'
            ) from None

    def select(self, positions: Sequence[int] | Tensor | np.ndarray[Any, np.dtype[Any]]) -> Records:
        """The rows at these positions, in this order; a view. Misuse for a position that is not there, or a mask."""
        index = torch.as_tensor(positions)
        if index.dtype is torch.bool:
            raise Misuse("positions must be numbers, got a mask of truth values; use mask.nonzero().flatten()")
        index = index.to("cpu", torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            got = f"{int(index.min())} to {int(index.max())}"
            raise Misuse(f"positions must lie in 0 to {len(self) - 1}, got {got}; count from the front")
        chosen = index.tolist()
        view = Records.__new__(Records)
        view.ids = tuple(self.ids[i] for i in chosen)
        view.owners = tuple(self.owners[i] for i in chosen)
        view.y = self.y[index.to(self.y.device)]
        view.classes = self.classes
        view._base = self._base
        view._rows = index if self._rows is None else self._rows[index]
        view._known = None if self._known is None else self._known[index.numpy()]
        if len(view.ids) > 1 and len(set(chosen)) < len(chosen):
            _refuse_repeated(view.ids)
        return view

    def take(self, ids: Iterable[str]) -> Records:
        """The named records, in the order named; UnknownRecord if one is missing."""
        return self.select(self.positions(ids))

    def without(self, ids: Iterable[str]) -> Records:
        """All records but the named ones, in their order; UnknownRecord if one is missing."""
        gone = set(self.positions(ids))
        return self.select([i for i in range(len(self)) if i not in gone])

    def where(self, test: Callable[[str, str], bool]) -> Records:
        """The records for which ``test(id, owner)`` is true."""
        return self.select([i for i, row in enumerate(zip(self.ids, self.owners, strict=True)) if test(*row)])

    def of_owner(self, owner: str) -> Records:
        """All records of one owner; UnknownRecord if there are none."""
        mine = self.where(lambda _, whose: whose == owner)
        if not len(mine):
            raise UnknownRecord(f'owner "{owner}" holds no record here; list owners with: expunge records --owners')
        return mine

    def of_class(self, label: int) -> Records:
        """All records of one class; UnknownRecord if there are none."""
        if self.classes is None:
            raise UnknownRecord("these records have float targets and so no classes; select them by id or owner")
        mine = self.select((self.y == label).nonzero().flatten().cpu())
        if not len(mine):
            raise UnknownRecord(f"class {label} holds no record here; classes run from 0 to {self.classes - 1}")
        return mine

    def split(self, share: float, rng: torch.Generator, *, by_owner: bool = False) -> tuple[Records, Records]:
        """A random `share` of the rows (or of the owners, with all their rows), and the rest."""
        if not 0 < share < 1:
            raise BadRecords(f"share must lie between 0 and 1, got {share}")
        names = self.owners if by_owner else self.ids
        pool = sorted(set(names))
        drawn = torch.randperm(len(pool), generator=coins.child(rng, "split"))[: round(share * len(pool))]
        first = {pool[i] for i in drawn.tolist()}
        inside = [i for i, name in enumerate(names) if name in first]
        outside = [i for i, name in enumerate(names) if name not in first]
        return self.select(inside), self.select(outside)

    def plus(self, other: Records) -> Records:
        """These rows and the other's, copied into one new set; BadRecords if an id stands in both."""
        x, more = self.x, other.x
        alike = (self.shape, self.classes, x.dtype, self.y.dtype) == (
            other.shape,
            other.classes,
            more.dtype,
            other.y.dtype,
        )
        if not alike:
            raise BadRecords(f"cannot join rows of {self} and {other}; shapes, dtypes and classes must agree")
        return Records(
            torch.cat([x, more]),
            torch.cat([self.y, other.y]),
            self.ids + other.ids,
            self.owners + other.owners,
            classes=self.classes,
        )


def _tensor(values: Tensor | np.ndarray[Any, np.dtype[Any]], name: str) -> Tensor:
    if isinstance(values, Tensor):
        if values.is_complex():
            raise BadRecords(f"{name} must be real numbers, got {values.dtype}; use torch.view_as_real")
        return values.detach()
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        got = f"ndarray of {values.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
        raise BadRecords(f"{name} must be a numeric tensor or array, got {got}; convert it first")
    if not values.flags.writeable:  # torch warns of read-only memory; a private map costs nothing and may be written
        # Only a whole map in C order can be mapped again from its offset and shape; a slice of one is copied.
        if isinstance(values, np.memmap) and isinstance(values.base, mmap) and values.flags.c_contiguous:
            values = np.memmap(values.filename, values.dtype, "c", values.offset, values.shape)
        else:
            values = values.copy()
    if min(values.strides, default=0) < 0:  # which torch does not have
        values = values.copy()
    try:
        return torch.from_numpy(values)
    except (TypeError, ValueError):  # long double, other byte order
        raise BadRecords(
            f"{name} must be a numeric tensor or array, got ndarray of {values.dtype.str}; convert it first"
        ) from None


def _refuse_shape(x: Tensor) -> None:
    if x.dim() < 2:
        raise BadRecords(f"x must be (rows, ...), got shape {tuple(x.shape)}; use x.reshape(len(x), -1)")


def _refuse_non_finite(x: Tensor, ids: Sequence[str] | None, start: int) -> None:
    """Refuse rows `x`, the first of which is row `start` of the set."""
    finite = torch.isfinite(x.reshape(len(x), -1)).all(1)
    if not bool(finite.all()):
        row = start + int((~finite).nonzero()[0])
        name = row if ids is None else ids[row]
        raise BadRecords(f'record "{name}" (row {row}) holds NaN or infinity; drop or fill it first')


def _refuse_other_than_text(names: Sequence[object], what: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise BadRecords(f"{what} must be text, got {name!r} of type {type(name).__name__}; use map(str, {what})")


def _bytes(item: tuple[Tensor, Any]) -> list[tuple[str, bytes]]:
    arrays = [array_of(torch.as_tensor(part)) for part in item]
    return [(f"{array.dtype}{array.shape}", array.tobytes()) for array in arrays]


def _labels(values: Tensor | np.ndarray[Any, np.dtype[Any]] | Sequence[int]) -> Tensor:
    try:
        y = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.array(values))
    except (TypeError, ValueError):
        got = np.asarray(values, dtype=object).flat[0]
        raise BadRecords(f"labels must be numbers, got {got!r}; number the classes from 0") from None
    if y.is_floating_point():
        if y.dim() not in (1, 2):
            raise BadRecords(f"float targets must be (n,) or (n, k), got shape {tuple(y.shape)}")
        if not bool(torch.isfinite(y).all()):
            row = int((~torch.isfinite(y.reshape(len(y), -1)).all(1)).nonzero()[0])
            raise BadRecords(f"the target of row {row} is NaN or infinite; drop the row or fill it first")
        return y
    if y.dim() != 1 or y.is_complex():
        raise BadRecords(f"class labels must be one integer a row, got shape {tuple(y.shape)} of {y.dtype}")
    return y.to(torch.int64)


def _classes(y: Tensor, classes: int | None) -> int | None:
    if y.is_floating_point():
        if classes is not None:
            raise BadRecords(f"float targets have no classes, got classes={classes}; convert the labels to integers")
        return None
    if not len(y):
        return classes
    low, high = int(y.min()), int(y.max())
    count = high + 1 if classes is None else classes
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        row = int((y == wrong).nonzero()[0])
        raise BadRecords(f"label {wrong} of row {row} is out of range; labels run from 0 to {max(count, 1) - 1}")
    return count


def _refuse_repeated(ids: Sequence[str]) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    for record_id in ids:
        if record_id in seen:
            raise BadRecords(f'id "{record_id}" stands more than once; ids must be unique, owners may repeat')
        seen.add(record_id)


def seal(*parts: Records, salt: str | None = None) -> str:
    """``salt:digest``, a commitment to the ids, owners and contents of all these rows together, in whatever order.

    With a fresh random salt if none is given. Says nothing of any single row to who does not hold all of them.
    Cost: one sort and one HMAC over all rows' digests, about 0.1 s for 60,000 rows.
    """
    salt = secrets.token_hex(16) if salt is None else salt
    leaves = []
    for part in parts:
        content = part.digests().tobytes()
        for row, (name, owner) in enumerate(zip(part.ids, part.owners, strict=True)):
            leaves.append(content[32 * row : 32 * row + 32] + f"{len(name)}:{name}:{len(owner)}:{owner}".encode())
    return f"{salt}:{hmac.digest(salt.encode(), b''.join(sorted(leaves)), 'sha256').hex()}"
