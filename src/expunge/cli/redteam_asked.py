"""What `expunge redteam` was asked: checked word by word before a model or data is read, and then against both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge import datasets
from expunge.cli.inputs import named_method
from expunge.core.errors import BadRecords, Misuse, UnreadableFile
from expunge.core.protocols import Method
from expunge.core.records import Records, seal
from expunge.core.trained import Trained
from expunge.screen.conformal import least_draws


def words(text: str) -> Sequence[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def named(text: str | None, known: Mapping[str, Any], option: str) -> dict[str, Any]:
    """What these words name, all if None; Misuse for a word that is not known, or said twice."""
    if text == "none" and option == "--screens":
        return {}
    chosen = list(known) if text is None else words(text)
    for word in chosen:
        if word not in known:
            raise Misuse(f'{option} are {", ".join(known)}, got "{word}"')
        if chosen.count(word) > 1:
            raise Misuse(f'{option} names "{word}" twice; name it once')
    if not chosen:
        raise Misuse(f"{option} are {', '.join(known)}, got none; name at least one")
    return {word: known[word] for word in chosen}


def shares(text: str) -> list[float]:
    """Budgets: at least one number above 0 and below one half."""
    try:
        found = [float(word) for word in words(text)]
    except ValueError:
        raise Misuse(f'--budget must be shares of the rows, as .001,.01, got "{text}"') from None
    if not found:
        raise Misuse("--budget must be shares of the rows, as .001,.01, got none; give at least one")
    for share in found:
        if not 0 < share < 0.5:
            raise Misuse(f"--budget must be shares of the rows above 0 and below 0.5, got {share:g}; 0.01 is 1 %")
    return found


def unlearners(text: str) -> dict[str, Method]:
    """Those that attacks may transfer to."""
    return {word: named_method(word, ()) for word in words(text)}


def refuse_method(word: str, settings: Sequence[str]) -> None:
    """Misuse for a method that is not known, or a setting that it does not have.

    Whether ``auto`` is retraining or its sharded kind is not known yet, but neither takes what the other does not.
    """
    named_method("retrain" if word == "auto" else word, settings)


def refuse_numbers(*, targets: int, seeds: int, rate: float, draws: int, benign: int, screened: bool) -> None:
    """Misuse for numbers that cannot be meant."""
    for option, value in (("--targets", targets), ("--seeds", seeds), ("--draws", draws), ("--benign", benign)):
        if value < 1:
            raise Misuse(f"{option} must be >= 1, got {value}")
    if not 0 < rate < 1:
        raise Misuse(f"--rate, the share of false alarms, must lie between 0 and 1, got {rate:g}")
    if screened and draws < least_draws(rate):
        raise Misuse(
            f"--rate {rate:g} takes at least {least_draws(rate)} draws to calibrate on, got {draws}; raise --draws, or "
            "--rate"
        )


def refuse_missing(model: Path, data: str, test: str | None) -> None:
    """UnreadableFile for a model, data or test rows that are not there."""
    if not (model / "trained.json").is_file():
        raise UnreadableFile(f"{model} holds no trained model; name the folder that expunge train --out wrote")
    for option, name in (("--data", data), ("--test", test)):
        if name is not None and name not in datasets.names() and not Path(name).exists():
            known = ", ".join(datasets.names())
            raise UnreadableFile(f'{option} "{name}" is no file, folder or data set; data sets are {known}')


def refuse_other_rows(trained: Trained, records: Records, test: Records, data: str, targets: int) -> None:
    """BadRecords where these are not the rows that the model stands on, or the test rows are not such rows.

    Says what the model takes, what was got, and what to give. Cost: a digest of each row.
    """
    takes = _takes(trained)
    if _of(records) != takes and not _spare(records, takes):
        raise BadRecords(
            f"the model takes {_said(*takes)}, but {data} holds {_said(*_of(records))}; give --data that it was "
            "trained on, read with the same options"
        )
    lost = sorted(trained.ids - frozenset(records.ids))
    if lost:
        raise BadRecords(
            f"the model was trained on {len(trained.ids):,} rows, of which {data} lacks {len(lost):,}, as "
            f'"{lost[0]}"; give all rows that it was trained on, under the same ids'
        )
    if trained.seal is not None:
        mine = records.where(lambda one, _: one in trained.ids)
        if seal(mine, salt=trained.seal.partition(":")[0]) != trained.seal:
            raise BadRecords(
                f"{data} holds other rows than the model was trained on: under the same ids, content or owners "
                "differ; give the same data, read with the same options (columns, --owners)"
            )
    if _of(test) != _of(records):
        raise BadRecords(
            f"the data holds {_said(*_of(records))}, but the test rows are {_said(*_of(test))}; give --test of the "
            "same columns and classes"
        )
    if targets > len(test):
        raise Misuse(
            f"asked for {targets} targets, but there are {len(test):,} test rows; lower --targets, or give more rows: "
            "--test"
        )


_Kind = tuple[tuple[int, ...], int | None]


def _takes(trained: Trained) -> _Kind:
    """Shape of a row, and number of classes; None where the outputs are numbers."""
    made = trained.recipe.model_args
    return tuple(made["shape"]), None if trained.recipe.loss == "mse" else int(made["outputs"])


def _of(records: Records) -> _Kind:
    return tuple(records.shape), records.classes


def _spare(records: Records, takes: _Kind) -> bool:
    """A model may have outputs for classes that no row has."""
    shape, classes = takes
    return tuple(records.shape) == shape and None not in (classes, records.classes) and records.classes < classes  # type: ignore[operator]


def _said(shape: tuple[int, ...], classes: int | None) -> str:
    size = " x ".join(map(str, shape)) or "one"
    return f"rows of {size} numbers{'' if classes is None else f' and {classes} classes'}"
