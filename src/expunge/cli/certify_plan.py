"""`expunge certify plan` and `plot`: what a budget costs, before any request arrives."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.certify.accountant import Budget
from expunge.cli.compare import _Source
from expunge.cli.inputs import (
    allow_named_code,
    load_model,
    make_recipe,
    refuse_existing,
)
from expunge.cli.options import (
    AllowCode,
    BatchSize,
    Classes,
    Columns,
    Data,
    Epochs,
    IdColumn,
    Json,
    LabelColumn,
    OwnerColumn,
    Owners,
    Quiet,
    RecipeFile,
    Seed,
)
from expunge.cli.output import console, outline, progress, say
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.store import write_atomically
from expunge.report import Report, print_grid, write
from expunge.report.certified import plan_grid, plan_reasons, sweep_report, sweep_svg
from expunge.study.certified import plan_certified, sweep_certified
from expunge.study.certified_bench import Setting
from expunge.study.certified_ways import WAYS

Epsilon = Annotated[float, typer.Option(help="What all requests together may tell: epsilon.")]
Delta = Annotated[float, typer.Option(help="And delta, well below 1 / records.")]
Requests = Annotated[int, typer.Option(help="How many requests there may be, agreed on before the first.")]
Rows = Annotated[int, typer.Option(help="Records that one request removes at most.")]
Model = Annotated[str | None, typer.Option(help="softmax (the default), mlp, lenet, ...")]
Rate = Annotated[float | None, typer.Option(help="Learning rate.")]
Decay = Annotated[float | None, typer.Option(help="Weight decay of the recipe.")]
Ways = Annotated[str | None, typer.Option(help=f"Of {', '.join(WAYS)}; all if left out.")]
Radius = Annotated[
    float | None,
    typer.Option(help="Norm that no row, with a 1 appended, can have, for a reason other than these rows."),
]
Draws = Annotated[int, typer.Option(help="Draws of the noise, or runs, that an accuracy is the mean of.")]
Test = Annotated[str | None, typer.Option(help="Held-out data; a built-in set brings its own.")]
Holdout = Annotated[float | None, typer.Option(help="Hold out this share of the owners instead of --test.")]


def plan(
    data: Data,
    model: Model = None,
    epsilon: Epsilon = 1.0,
    delta: Delta = 1e-5,
    requests: Requests = 100,
    rows: Rows = 1,
    methods: Ways = None,
    draws: Draws = 10,
    radius: Radius = None,
    model_folder: Annotated[
        Path | None, typer.Option(help="A model of these records, used by methods that need no recipe of their own.")
    ] = None,
    recipe: RecipeFile = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    weight_decay: Decay = None,
    test: Test = None,
    holdout: Holdout = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which methods can honour a budget.

    Before any request, and at what accuracy and cost: trains by the recipe (and by others that methods need), removes
    random records for real, and shows each method's accuracy with noise and its seconds, beside exact retraining and
    retraining for as long. Nothing is written.

    \b
    Examples:
      expunge certify plan --data adult --model softmax --epsilon 1 --delta 1e-5 --requests 500
      expunge certify plan --data mnist --rows 20 --requests 50 --methods newton-head,clipped-fine-tune --json
    """
    trained = None if model_folder is None else load_model(model_folder, allow_code)
    if trained is not None and (recipe, model, epochs, batch_size, lr, weight_decay) != (None,) * 6:
        raise Misuse("--model-folder brings its own recipe; leave out --recipe, --model and the like")
    records, held_out = _rows(
        data, test, holdout, seed, (id_column, owner_column, label_column, classes, columns, owners)
    )
    asked = {"model": model, "epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay}
    training = trained.recipe if trained is not None else _recipe(recipe, asked, lr, records, allow_code)
    setting = Setting(
        recipe=training, rows=rows, radius=radius, methods=_words(methods), draws=draws, seed=seed, trained=trained
    )
    budget = Budget(epsilon=epsilon, delta=delta, requests=requests)
    with progress(quiet or as_json) as show:
        found = plan_certified(setting, budget, records, held_out, report=show)
    if as_json:
        print(json.dumps(found.to_json(), allow_nan=False))
        return
    screen = console()
    print_grid(plan_grid(found), screen)
    reasons = plan_reasons(found)
    if reasons:
        screen.print(outline(reasons))


def plot(
    data: Data,
    out: Annotated[Path, typer.Option(help="The page, .html (its figures go beside it as .json), or a picture, .svg.")],
    epsilons: Annotated[str, typer.Option(help="Budgets' epsilons, as .1,1,10.")] = ".1,1,10",
    model: Model = None,
    delta: Delta = 1e-5,
    requests: Requests = 100,
    rows: Rows = 1,
    seeds: Annotated[int, typer.Option(help="Trainings, with seeds --seed and up.")] = 1,
    methods: Ways = None,
    draws: Draws = 10,
    radius: Radius = None,
    recipe: RecipeFile = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    weight_decay: Decay = None,
    test: Test = None,
    holdout: Holdout = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw accuracy and seconds against epsilon.

    Of first and of later requests, beside exact retraining and retraining for as long.

    \b
    Examples:
      expunge certify plot --data adult --model softmax --requests 500 --epsilons .1,1,10 --out plot.html
      expunge certify plot --data optdigits --methods newton-head,clipped-fine-tune --seeds 3 --out plot.svg
    """
    if out.suffix not in (".html", ".svg"):
        raise Misuse(f"--out must end in .html or .svg, got {out}")
    refuse_existing(out)
    refuse_existing(out.with_suffix(".json"))
    records, held_out = _rows(
        data, test, holdout, seed, (id_column, owner_column, label_column, classes, columns, owners)
    )
    asked = {"model": model, "epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay}
    training = _recipe(recipe, asked, lr, records, allow_code)
    setting = Setting(recipe=training, rows=rows, radius=radius, methods=_words(methods), draws=draws, seed=seed)
    budget = Budget(delta=delta, requests=requests)
    with progress(quiet or as_json) as show:
        found = sweep_certified(setting, budget, _numbers(epsilons), records, held_out, seeds=seeds, report=show)
    report = sweep_report(found, f"expunge {shlex.join(sys.argv[1:])}")
    if out.suffix == ".svg":
        write_atomically(out, sweep_svg(found).encode("utf-8"))
    else:
        _write_page(report, out)
    say(as_json, {**found.to_json(), "out": str(out)}, f"{report.verdict}\n\nwritten  {out}")


def _write_page(report: Report, out: Path) -> None:
    """The page under the name asked for, with its figures beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".part") as folder:
        html, data = write(report, Path(folder))
        os.replace(data, out.with_suffix(".json"))
        os.replace(html, out)


def _rows(
    data: str, test: str | None, holdout: float | None, seed: int, columns: tuple[Any, ...]
) -> tuple[Records, Records]:
    records, held_out = _Source(columns).read(data, test, holdout, seed)
    if records.classes is None:
        raise Misuse("plans are for classifiers: their figures are accuracies, and these records have float targets")
    if held_out is None:
        raise Misuse("accuracy is measured on rows that nothing is trained on; give them: --test or --holdout")
    return records, held_out


def _recipe(path: Path | None, asked: dict[str, Any], lr: float | None, records: Records, allow_code: bool) -> Recipe:
    given = asked if path is not None or asked["model"] is not None else {**asked, "model": "softmax"}
    recipe = make_recipe(path, given, lr, None, None, records)
    allow_named_code(recipe, allow_code)
    return recipe


def _words(text: str | None) -> tuple[str, ...]:
    if text is None:
        return tuple(WAYS)
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise Misuse(f'--epsilons must be numbers, as .1,1,10, got "{text}"') from None
