"""From the words of the command line to records, recipes, requests, methods and models."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expunge import datasets
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.build import allow_code
from expunge.learn.training import load
from expunge.unlearn import (
    FineTune,
    GradientAscent,
    Method,
    NegGradPlus,
    RandomLabels,
    Retrain,
    RetrainBriefly,
    Sisa,
)

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        "fine-tune": FineTune,
        "gradient-ascent": GradientAscent,
        "neg-grad-plus": NegGradPlus,
        "random-labels": RandomLabels,
        "retrain": Retrain,
        "retrain-briefly": RetrainBriefly,
        "sisa": Sisa,
    }
)


def read_records(
    data: str,
    id_column: str | None,
    owner_column: str | None,
    label_column: str | None,
    classes: str | None,
    columns: Path | None,
    owners: int | None,
) -> tuple[Records, Records | None]:
    """Records of the named set with its own test rows, or of the user's files without."""
    table = {"id": id_column, "owner": owner_column, "label": label_column}
    given = {name: value for name, value in table.items() if value is not None}
    if data in datasets.names():
        if given or columns is not None or classes is not None:
            raise Misuse(f"{data} is a built-in set and has no columns to name; leave out --id-column and the like")
        found = datasets.get(data, **({} if owners is None else {"owners": owners}))
        return found.train, found.test
    if not Path(data).exists():
        raise UnreadableFile(f'"{data}" is no file, folder or data set; data sets are {", ".join(datasets.names())}')
    options: dict[str, Any] = dict(given)
    if classes is not None:
        options["classes"] = int(classes) if classes.isdigit() else classes.split(",")
    if columns is not None:
        options.update(_json_object(columns))
    return datasets.load_records(data, **options), None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"{path} cannot be read as JSON ({error}); it should hold one object") from None
    if not isinstance(data, dict) or not set(data) <= {"columns", "scale", "categories", "regression"}:
        raise UnreadableFile(f"{path} must be one object with any of columns, scale, categories, regression")
    return data


def make_recipe(
    path: Path | None, asked: Mapping[str, Any], lr: float | None, shards: int | None, slices: int, records: Records
) -> Recipe:
    """The recipe of a file, of the options, or of both, the options first."""
    given = {name: value for name, value in asked.items() if value is not None}
    if path is not None:
        recipe = replace(Recipe.load(path), **given)
    else:
        loss = "mse" if records.classes is None else "cross_entropy"
        recipe = Recipe(**{"model": "mlp", "loss": loss, **given})
    if lr is not None:
        recipe = replace(recipe, optimiser_args={**recipe.optimiser_args, "lr": lr})
    if shards is not None:
        recipe = replace(recipe, sharding=Sharding(shards=shards, slices=slices))
    elif slices != 1:
        raise Misuse("--slices cuts shards and needs --shards")
    return recipe


def make_request(record: list[str] | None, ids_file: Path | None, owner: str | None, label: int | None) -> Request:
    """What to forget, said in exactly one way."""
    named = list(record or [])
    if ids_file is not None:
        try:
            named += [line.strip() for line in ids_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableFile(f"{ids_file} cannot be read ({error}); give a text file, one id a line") from None
    ways = [bool(named), owner is not None, label is not None]
    if sum(ways) != 1:
        raise Misuse("say what to forget in one way: --id (or --ids-file), --owner or --class")
    if owner is not None:
        return Request.remove_owner(owner)
    return Request.remove(named) if label is None else Request.remove_class(label)


def make_method(word: str, settings: Sequence[str], trained: Trained) -> Method:
    """The method of this name with these settings; ``auto`` is the exact one that fits the model."""
    if word == "auto":
        word = "sisa" if trained.parts else "retrain"
    if word not in METHODS:
        raise Misuse(f'unknown method "{word}"; known: {", ".join(METHODS)}')
    kind = METHODS[word]
    known = {f.name: f.default for f in fields(kind)}
    chosen: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise Misuse(f'{word} has no setting "{text}"; it has {", ".join(known) or "none"}, given as name=value')
        chosen[name] = _typed(name, value, known[name])
    return kind(**chosen)


def _typed(name: str, value: str, default: Any) -> Any:
    kind = int if default is None else type(default)
    try:
        return kind(value)
    except ValueError:
        raise Misuse(f"{name} must be of type {kind.__name__}, got {value}") from None


def load_model(folder: Path, allowed: bool) -> Trained:
    """The model saved in this folder; code that its recipe names runs only if allowed."""
    if allowed and (folder / "trained.json").is_file():
        about = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
        allow_named_code(Recipe.from_json(about.get("recipe", {})), allowed)
    return load(folder)


def allow_named_code(recipe: Recipe, allowed: bool) -> None:
    """Give the code that the recipe names leave to run, if allowed; looked for in this folder too."""
    if allowed and ":" in recipe.model:
        sys.path.insert(0, str(Path.cwd()))
        allow_code(recipe.model)


def refuse_existing(out: Path) -> None:
    """Misuse if the folder to write is there already."""
    if out.exists():
        raise Misuse(f"{out} is there already; name a new folder, or remove it first")
