"""Backdoors: a patch stamped on images, rows poisoned with it, and how often a model obeys it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from expunge.core import coins
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, proportion
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.predict import outputs


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A small patch, the same on every image.

    By default a bright square of 4 x 4 pixels that leaves two between it and the lower right corner (Jia et al., 2023,
    with theirs black: on digits that would be nearly no change).

    Attributes:
        row: of the patch's first row; below zero it counts from the image's lower edge.
        column: of its first column; below zero it counts from the right edge.
        size: pixels on a side, if there is no pattern.
        value: of its pixels, if there is no pattern: a share of full brightness. Float images take it as it is, those
            of uint8 times 255.
        pattern: rows of such values, in place of `size` and `value`.
    """

    row: int = -6
    column: int = -6
    size: int = 4
    value: float = 1.0
    pattern: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            rows = tuple(tuple(float(value) for value in row) for row in self.pattern)
            if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
                raise Misuse(f"a pattern is rows of equal length with one value or more each, got {self.pattern}")
            object.__setattr__(self, "pattern", rows)
        if self.size < 1:
            raise Misuse(f"size must be >= 1, got {self.size}")
        if not all(math.isfinite(value) for row in self._values() for value in row):
            raise Misuse(f"values must be finite, got {self._values()}")

    def _values(self) -> tuple[tuple[float, ...], ...]:
        return ((self.value,) * self.size,) * self.size if self.pattern is None else self.pattern

    def stamp(self, x: Tensor) -> Tensor:
        """The images with the patch on them; a copy, in which no other pixel is touched.

        Args:
            x: (..., height, width) one image or many; every channel gets the same patch.

        Raises:
            Misuse: if the patch does not lie inside the image whole, or the pixels are neither uint8 nor floats.
        """
        if x.dim() < 2:
            raise Misuse(f"a trigger needs images (..., height, width), got shape {tuple(x.shape)}")
        patch = self._patch(x.dtype)
        top, left = (
            start + side if start < 0 else start
            for start, side in zip((self.row, self.column), x.shape[-2:], strict=True)
        )
        bottom, right = top + patch.shape[0], left + patch.shape[1]
        if min(top, left) < 0 or bottom > x.shape[-2] or right > x.shape[-1]:
            raise Misuse(
                f"a patch of {patch.shape[0]} x {patch.shape[1]} at ({self.row}, {self.column}) does not lie inside an "
                f"image of {x.shape[-2]} x {x.shape[-1]}; move it or make it smaller"
            )
        stamped = x.clone()
        stamped[..., top:bottom, left:right] = patch.to(x.device)
        return stamped

    def _patch(self, dtype: torch.dtype) -> Tensor:
        values = torch.tensor(self._values(), dtype=torch.float64)
        if dtype is torch.uint8:
            if float(values.min()) < 0 or float(values.max()) > 1:
                raise Misuse(f"on images of uint8 values are shares of 255, from 0 to 1, got {self._values()}")
            return (values * 255).round().to(dtype)
        if not dtype.is_floating_point:
            raise Misuse(f"a trigger stamps images of uint8 or floats, got {dtype}")
        return values.to(dtype)


def stamped(records: Records, trigger: Trigger) -> Records:
    """The same rows with the trigger on each: labels, ids and owners as they are. Cost: a copy of all rows."""
    _refuse_other_than_images(records)
    return Records(trigger.stamp(records.x), records.y, records.ids, records.owners, classes=records.classes)


def poison(
    records: Records, trigger: Trigger, target: int, share: float, rng: Generator
) -> tuple[Records, tuple[str, ...]]:
    """Plant a backdoor: some rows of other classes are stamped and said to be of the target class.

    Which ones is a function of the rows and of the coins, not of positions.

    Args:
        records: images; not written to.
        trigger: what is stamped.
        target: the class that stamped images shall be taken for.
        share: of the rows of other classes, to the nearest whole row; at least one.
        rng: names the coins; nothing is drawn from it.

    Returns:
        All rows, in their order and under their ids and owners, and the ids of those that were changed.

    Raises:
        Misuse: for a target that is no class, a share that is not above 0 and up to 1, or rows that are no images.

    Cost: a copy of all rows.
    """
    _refuse_other_than_images(records)
    _refuse_other_than_class(records, target)
    others = (records.y != target).nonzero().flatten().cpu()
    if not 0 < share <= 1 or not len(others):
        raise Misuse(f"share must be > 0 and <= 1 of rows of other classes, got {share} of {len(others):,} rows")
    ranked = torch.from_numpy(coins.order(records.select(others).keys, rng.initial_seed(), "poison"))
    chosen = others[ranked[: max(1, round(share * len(others)))]].sort().values
    x, y = records.x.clone(), records.y.clone()
    x[chosen.to(x.device)] = trigger.stamp(x[chosen.to(x.device)])
    y[chosen.to(y.device)] = target
    changed = Records(x, y, records.ids, records.owners, classes=records.classes)
    return changed, tuple(records.ids[i] for i in chosen.tolist())


def attack_success(
    trained: Trained, test: Records, trigger: Trigger, target: int, *, everyone: bool = False, level: float = 0.95
) -> Estimate:
    """Share of stamped test images of other classes that the model takes for the target class.

    Args:
        trained: the model.
        test: images with their true labels; not stamped.
        trigger: what is stamped on them.
        target: the class that they shall be taken for.
        everyone: count images of the target class too, as some publications do. A model that knows no trigger then
            scores as many percent as there are such images: compare with `attack_floor` under the same definition.
        level: of the exact binomial interval, over images of this one model.

    Raises:
        Misuse: if there is no image to count, or the target is no class.
    """
    victims = _victims(test, target, everyone=everyone)
    return _share_called(trained, stamped(victims, trigger), target, level)


def attack_floor(
    trained: Trained, test: Records, target: int, *, everyone: bool = False, level: float = 0.95
) -> Estimate:
    """Share of the same images, not stamped, that the model takes for the target class: what is no success.

    Of other classes these are the model's plain mistakes; with `everyone` the images of the target class themselves
    count too, and make up nearly all of it. What the patch does to a model that never learnt it (it may hide strokes,
    or look like some) is not in this: for that, ask `attack_success` of a model retrained without the poisoned rows.
    Arguments and errors as those of `attack_success`.
    """
    return _share_called(trained, _victims(test, target, everyone=everyone), target, level)


def _share_called(trained: Trained, images: Records, target: int, level: float) -> Estimate:
    called = outputs(trained.module, images).argmax(1) == target
    return proportion(int(called.sum()), len(images), level)


def _victims(test: Records, target: int, *, everyone: bool) -> Records:
    _refuse_other_than_images(test)
    _refuse_other_than_class(test, target)
    victims = test if everyone else test.select((test.y != target).nonzero().flatten().cpu())
    if not len(victims):
        raise Misuse(f"an attack needs test images of other classes than {target}, got none")
    return victims


def _refuse_other_than_images(records: Records) -> None:
    if len(records.shape) not in (2, 3):
        raise Misuse(f"a trigger needs images (height, width) or (channels, height, width), got rows {records.shape}")


def _refuse_other_than_class(records: Records, target: int) -> None:
    if records.classes is None or not 0 <= target < records.classes:
        known = "float targets" if records.classes is None else f"classes 0 to {records.classes - 1}"
        raise Misuse(f"the target must be a class, got {target} of records with {known}")
