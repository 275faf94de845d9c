"""From the words of the command line to records, recipes, requests, methods and models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from expunge import datasets
from expunge.certify.accountant import Budget
from expunge.certify.clipped_models import ClippedModelFineTune
from expunge.certify.descent import DescentToDelete
from expunge.certify.guo import GuoRemoval
from expunge.certify.head import NewtonHead
from expunge.certify.newton import NewtonUnlearning
from expunge.certify.noisy_fine_tune import ClippedFineTune
from expunge.certify.rewind import RewindToDelete
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.datasets.tables import is_table
from expunge.learn.build import allow_code
from expunge.learn.training import load
from expunge.unlearn import (
    AmnesiacUnlearning,
    BadTeacher,
    BoundaryShrink,
    FineTune,
    FisherForgetting,
    GradientAscent,
    InfluenceUnlearning,
    L1Sparse,
    Masked,
    Method,
    NegGradPlus,
    Pruned,
    RandomLabels,
    Retrain,
    RetrainBriefly,
    RetrainSameMask,
    SalUn,
    Scrub,
    SelectiveSynapticDampening,
    Sisa,
    UnrollingSGD,
)
from expunge.unlearn.sparsity import CRITERIA

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        "amnesiac-unlearning": AmnesiacUnlearning,
        "bad-teacher": BadTeacher,
        "boundary-shrink": BoundaryShrink,
        "clipped-fine-tune": ClippedFineTune,
        "clipped-model-fine-tune": ClippedModelFineTune,
        "descent-to-delete": DescentToDelete,
        "fine-tune": FineTune,
        "fisher-forgetting": FisherForgetting,
        "gradient-ascent": GradientAscent,
        "guo-removal": GuoRemoval,
        "influence-unlearning": InfluenceUnlearning,
        "l1-sparse": L1Sparse,
        "masked-fine-tune": Masked,
        "neg-grad-plus": NegGradPlus,
        "newton-head": NewtonHead,
        "newton-unlearning": NewtonUnlearning,
        "pruned-fine-tune": Pruned,
        "random-labels": RandomLabels,
        "retrain": Retrain,
        "retrain-briefly": RetrainBriefly,
        "retrain-same-mask": RetrainSameMask,
        "rewind-to-delete": RewindToDelete,
        "salun": SalUn,
        "scrub": Scrub,
        "selective-synaptic-dampening": SelectiveSynapticDampening,
        "sisa": Sisa,
        "unrolling-sgd": UnrollingSGD,
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
    if is_table(Path(data)) and label_column is None:
        raise Misuse(f"which column of {data} is to be predicted? name it: --label-column")
    options: dict[str, Any] = dict(given)
    if classes is not None:
        options["classes"] = int(classes) if classes.isdecimal() else classes.split(",")
    if columns is not None:
        options.update(_json_object(columns))
    return datasets.load_records(data, **options), None


def read_held_out(test: str, *columns_of: Any) -> Records:
    """What `--test` names: a named set's test rows, never those that are trained on, or all rows of the user's files.

    The other arguments are those of `read_records`. Misuse for a named set that has no test rows.
    """
    rows, own = read_records(test, *columns_of)
    if test not in datasets.names():
        return rows
    if own is None:
        raise Misuse(f"{test} brings no test rows; give a file of rows that nobody trained on: --test")
    return own


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"{path} cannot be read as JSON ({error}); it should hold one object") from None
    if not isinstance(data, dict) or not set(data) <= {"columns", "scale", "categories", "regression"}:
        raise UnreadableFile(f"{path} must be one object with any of columns, scale, categories, regression")
    return data


def make_recipe(
    path: Path | None,
    asked: Mapping[str, Any],
    lr: float | None,
    shards: int | None,
    slices: int | None,
    records: Records,
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
    cut: dict[str, Any] = {name: value for name, value in (("shards", shards), ("slices", slices)) if value is not None}
    if recipe.sharding is not None:
        return replace(recipe, sharding=replace(recipe.sharding, **cut))
    if "slices" in cut and "shards" not in cut:
        raise Misuse("--slices cuts shards; give --shards too, or a recipe with sharding")
    return replace(recipe, sharding=Sharding(**cut)) if cut else recipe


def make_request(record: list[str] | None, ids_file: Path | None, owner: str | None, label: int | None) -> Request:
    """What to forget, said in exactly one way."""
    named = list(record or [])
    if ids_file is not None:
        try:
            listed = [line.strip() for line in ids_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableFile(f"{ids_file} cannot be read ({error}); give a text file, one id a line") from None
        if not listed:
            raise UnreadableFile(f"{ids_file} names no record; write one id a line")
        named += listed
    ways = [bool(named), owner is not None, label is not None]
    if sum(ways) != 1:
        raise Misuse("say what to forget in one way: --id (or --ids-file), --owner or --class")
    if owner is not None:
        return Request.remove_owner(owner)
    return Request.remove(named) if label is None else Request.remove_class(label)


def make_method(word: str, settings: Sequence[str], trained: Trained) -> Method:
    """The method of this name with these settings; ``auto`` is the exact one that fits the model."""
    return named_method(("sisa" if trained.parts else "retrain") if word == "auto" else word, settings)


def named_method(word: str, settings: Sequence[str]) -> Method:
    """The method of this name with these settings, each as ``name=value``."""
    if word not in METHODS:
        raise Misuse(f'unknown method "{word}"; known: {", ".join(METHODS)}')
    kind = METHODS[word]
    known = {f.name: default_of(f) for f in fields(kind)}
    inner = [text.removeprefix("then.") for text in settings if text.startswith("then.")]
    chosen: dict[str, Any] = {}
    for text in settings:
        if text.startswith("then.") and "then" in known:
            continue
        name, equals, value = text.partition("=")
        if name not in known:
            raise Misuse(f'{word} has no setting "{name}"; it has {", ".join(known) or "none"}')
        if not equals:
            raise Misuse(f"--set {text} lacks its value; give it as {name}=value")
        if name in chosen:
            raise Misuse(f"--set {name} is given twice; give it once")
        chosen[name] = _typed(name, value, known[name], get_type_hints(kind)[name])
    if inner and "then" in known:
        chosen["then"] = named_method(chosen.get("then", known["then"]).name, inner)
    return kind(**chosen)


def default_of(setting: Field[Any]) -> Any:
    """The default of a setting, made anew if it is made; of a budget, as one says it on the command line."""
    value = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return say_budget(value) if isinstance(value, Budget) else value


def say_budget(budget: Budget) -> str:
    """``1,1e-05,100``: epsilon, delta and requests."""
    return f"{budget.epsilon:g},{budget.delta:g},{budget.requests}"


def _typed(name: str, value: str, default: Any, hint: Any) -> Any:
    if isinstance(default, Method):
        return named_method(value, ())
    if isinstance(default, tuple(CRITERIA.values())):
        if value not in CRITERIA:
            raise Misuse(f"{name} must be one of {', '.join(CRITERIA)}, got {value}")
        return CRITERIA[value]()
    if hint is Budget:
        return _budget(name, value)
    if isinstance(default, bool):
        return _yes_or_no(name, value)
    kind = type(default)
    if default is None:
        plain = [one for one in (int, float) if one in get_args(hint)]
        if not plain:
            raise Misuse(f"{name} cannot be given on the command line; set it in Python")
        kind = plain[0]
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise Misuse(f"{name} must be one of {', '.join(get_args(hint))}, got {value}")
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise Misuse(f'{name} must be {what}, got "{value}"') from None


def _budget(name: str, value: str) -> Budget:
    try:
        epsilon, delta, requests = value.split(",")
        return Budget(epsilon=float(epsilon), delta=float(delta), requests=int(requests))
    except ValueError as error:
        if isinstance(error, Misuse):
            raise
        raise Misuse(f'{name} must be epsilon,delta,requests, as 1,1e-5,100, got "{value}"') from None


def _yes_or_no(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false", "yes", "no"):
        raise Misuse(f'{name} must be true or false, got "{value}"')
    return value.lower() in ("true", "yes")


def load_model(folder: Path, allowed: bool) -> Trained:
    """The model saved in this folder; code that its recipe names runs only if allowed."""
    if allowed:
        try:
            about = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
            recipe = Recipe.from_json(about["recipe"])
        except (OSError, ValueError, TypeError, KeyError):
            return load(folder)  # says what is wrong with it
        allow_named_code(recipe, allowed)
    return load(folder)


def allow_named_code(recipe: Recipe, allowed: bool) -> None:
    """Give the code that the recipe names leave to run, if allowed; looked for in this folder too."""
    if allowed and ":" in recipe.model:
        sys.path.insert(0, str(Path.cwd()))
        allow_code(recipe.model)


def refuse_existing(out: Path) -> None:
    """Misuse if the folder to write is there already, or cannot be made."""
    if out.exists():
        raise Misuse(f"{out} is there already; name a new folder, or remove it first")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise Misuse(f"{out} cannot be made, for {above} is not a folder that can be written to; name another")
