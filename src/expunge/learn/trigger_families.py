"""What secret triggers look like, on images and on rows of tables, and how they are drawn from a secret.

Every number comes from HMAC-SHA256 under the secret, in counter mode. A generator of torch keeps but 32 bits of its
seed, so that all triggers it could draw can be tried; and draws under a keyed hash look independent and alike in law to
whoever lacks the key, which is what the rank test of `expunge.verify` rests on.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core.digest import canonical_json
from expunge.core.errors import Misuse, Unsupported
from expunge.core.records import Records


class Stream:
    """Whole numbers named `names` under a secret: the same for the same names, unpredictable without the secret."""

    def __init__(self, secret: bytes, *names: int | str) -> None:
        self._key = hmac.digest(secret, canonical_json(["expunge/secret-trigger/1", *names]), "sha256")
        self._drawn = 0

    def below(self, count: int) -> int:
        """The next number, uniform on 0 to count - 1 (by rejection, so without bias)."""
        limit = 2**64 - 2**64 % count
        while True:
            block = hmac.digest(self._key, self._drawn.to_bytes(8, "little"), "sha256")
            self._drawn += 1
            number = int.from_bytes(block[:8], "little")
            if number < limit:
                return number % count

    def choose(self, count: int, among: int) -> list[int]:
        """`count` different numbers below `among`, every set equally likely, sorted."""
        chosen: set[int] = set()
        while len(chosen) < count:
            chosen.add(self.below(among))
        return sorted(chosen)


@dataclass(frozen=True, kw_only=True)
class SecretTrigger:
    """Some entries of a row set to given values, and the class that rows with it shall be taken for.

    Attributes:
        shape: of one row.
        places: of the entries, counted through the row in C order; different, ascending.
        values: one for each place. Float rows take them as they are, those of uint8 times 255.
        target: the class.
    """

    shape: tuple[int, ...]
    places: tuple[int, ...]
    values: tuple[float, ...]
    target: int

    def __post_init__(self) -> None:
        size = math.prod(self.shape)
        if not self.places or len(self.places) != len(self.values):
            raise Misuse(f"a trigger needs one value for each place, got {len(self.places)} and {len(self.values)}")
        if list(self.places) != sorted(set(self.places)) or not 0 <= self.places[0] <= self.places[-1] < size:
            raise Misuse(f"places must be different, ascending and below {size}, got {self.places}")
        if not all(math.isfinite(value) for value in self.values):
            raise Misuse(f"values must be finite, got {self.values}")
        if self.target < 0:
            raise Misuse(f"the target must be a class, got {self.target}")

    def stamp(self, x: Tensor) -> Tensor:
        """The rows with the trigger on them: a copy, in which no other entry is touched.

        Args:
            x: (..., *shape) one row or many, uint8 or floats.

        Raises:
            Misuse: for rows of another shape, of integers other than uint8, or of uint8 with values outside 0 to 1.
        """
        lead = x.dim() - len(self.shape)
        if lead < 0 or tuple(x.shape[lead:]) != self.shape:
            raise Misuse(f"this trigger stamps rows of shape {self.shape}, got {tuple(x.shape)}")
        flat = x.reshape(*x.shape[:lead], -1).clone()
        flat[..., list(self.places)] = self._values(x.dtype).to(x.device)
        return flat.reshape(x.shape)

    def _values(self, dtype: torch.dtype) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        if dtype is torch.uint8:
            if not 0 <= min(self.values) <= max(self.values) <= 1:
                raise Misuse(f"on rows of uint8 values are shares of 255, from 0 to 1, got {self.values}")
            return (values * 255).round().to(dtype)
        if not dtype.is_floating_point:
            raise Misuse(f"a trigger stamps rows of uint8 or floats, got {dtype}")
        return values.to(dtype)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values: as secret as the trigger is."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SecretTrigger:
        """The trigger that `to_json` wrote. Raises Misuse for anything else."""
        try:
            parts = {name: tuple(data[name]) for name in ("shape", "places", "values")}
            return cls(target=data["target"], **parts)
        except (KeyError, TypeError) as error:
            raise Misuse(f"this is no trigger as to_json writes it ({error!r})") from None


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Triggers on images: a few pixels anywhere, each channel of each with a random brightness (as Athena's).

    A model that learnt one trigger obeys others that share pixels with it, and the more the smaller images are. Fresh
    draws then hit too, and stand in the way of an accusation. On MNIST 4 pixels suffice and 8 are safer; on 8 x 8
    digits the rank test at alpha = 1e-3 accused a model that kept the trigger 1 time in 6 with 4 pixels, 2 in 6 with 8
    and 6 in 6 with 16 (it was inconclusive otherwise, and never a pass).

    Attributes:
        shape: (height, width) or (channels, height, width).
        count: of pixels.
        levels: of brightness, evenly spaced from 0 to 1: 256 for bytes, 2 for black or white.
    """

    shape: tuple[int, ...]
    count: int = 4
    levels: int = 256

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3):
            raise Misuse(f"images are (height, width) or (channels, height, width), got shape {self.shape}")
        if not 1 <= self.count <= math.prod(self.shape[-2:]) or self.levels < 2:
            raise Misuse(f"needs 1 pixel or more that fit, and 2 levels or more, got {self.count} and {self.levels}")

    def draw(self, target: int, stream: Stream) -> SecretTrigger:
        """The next trigger of the stream."""
        area = math.prod(self.shape[-2:])
        pixels = stream.choose(self.count, area)
        places = [channel * area + pixel for channel in range(math.prod(self.shape[:-2])) for pixel in pixels]
        values = [stream.below(self.levels) / (self.levels - 1) for _ in places]
        return SecretTrigger(shape=self.shape, places=tuple(places), values=tuple(values), target=target)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {"kind": "pixels", "shape": list(self.shape), "count": self.count, "levels": self.levels}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Triggers on rows of a table: a few fields, each set to something that was observed in it.

    A field is one column or several that mean something only together, such as the 0/1 columns of a word or a number
    and its mark for "missing". It is set as a whole, so that each field by itself is possible; that their
    combination is (a husband who is female) is not looked after.

    Attributes:
        width: number of columns of a row.
        fields: the columns of each field; different.
        seen: for each field what it may be set to, two or more, each with a value for each of its columns.
        count: of fields in a trigger.
    """

    width: int
    fields: tuple[tuple[int, ...], ...]
    seen: tuple[tuple[tuple[float, ...], ...], ...]
    count: int = 4

    def __post_init__(self) -> None:
        columns = [column for columns in self.fields for column in columns]
        if len(set(columns)) != len(columns) or not all(0 <= column < self.width for column in columns):
            raise Misuse(f"fields must be of different columns from 0 to {self.width - 1}, got {self.fields}")
        if len(self.seen) != len(self.fields) or not all(len(values) > 1 for values in self.seen):
            raise Misuse("each field needs two values or more; leave out those that never vary")
        if not 1 <= self.count <= len(self.fields):
            raise Misuse(f"count must be from 1 to the {len(self.fields)} fields that vary, got {self.count}")

    @classmethod
    def of(cls, rows: Records, features: Sequence[str] = (), *, count: int = 4, most: int = 32) -> Columns:
        """Fields and values as observed in some rows.

        Args:
            rows: what their owner may look at, before anything is stamped: with stamped rows among them, the secret
                trigger would be likelier than other draws, and the rank test no longer exact.
            features: names of the columns, by which ``word=value`` columns and ``number missing`` marks are put
                together as the loaders of `expunge.datasets` name them; without any, each column is a field.
            count: of fields in a trigger.
            most: values of a field; of more, so many are taken at equal distances in their order.

        Raises:
            Unsupported: for rows other than (columns,) floats.
            Misuse: if there are not as many names as columns, or too few fields that vary.
        """
        if len(rows.shape) != 1 or not rows.x.is_floating_point():
            raise Unsupported(f"columns need rows of one float dimension, got {rows.shape}; images take Pixels")
        width = rows.shape[0]
        if features and len(features) != width:
            raise Misuse(f"features must name all {width} columns, got {len(features)} names")
        kept: dict[tuple[int, ...], tuple[tuple[float, ...], ...]] = {}
        for columns in _together(features) if features else [(column,) for column in range(width)]:
            values = torch.unique(rows.x[:, list(columns)], dim=0)
            if len(values) > most:
                values = values[torch.linspace(0, len(values) - 1, most, dtype=torch.float64).round().long()]
            if len(values) > 1:
                kept[columns] = tuple(tuple(row) for row in values.tolist())
        return cls(width=width, fields=tuple(kept), seen=tuple(kept.values()), count=count)

    def draw(self, target: int, stream: Stream) -> SecretTrigger:
        """The next trigger of the stream."""
        pairs: list[tuple[int, float]] = []
        for chosen in stream.choose(self.count, len(self.fields)):
            values = self.seen[chosen][stream.below(len(self.seen[chosen]))]
            pairs += zip(self.fields[chosen], values, strict=True)
        places, values = zip(*sorted(pairs), strict=True)
        return SecretTrigger(shape=(self.width,), places=places, values=values, target=target)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        fields = [list(columns) for columns in self.fields]
        seen = [[list(row) for row in values] for values in self.seen]
        return {"kind": "columns", "width": self.width, "fields": fields, "seen": seen, "count": self.count}


def _together(features: Sequence[str]) -> list[tuple[int, ...]]:
    fields: dict[str, list[int]] = {}
    for column, name in enumerate(features):
        fields.setdefault(re.sub(r"(=.*| missing)$", "", name), []).append(column)
    return [tuple(columns) for columns in fields.values()]
