"""`expunge certify votes` and `votes-plan`: predictions that no deletion can flip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.certify.votes import DeletionRobustness, deletion_robustness, robustness_by_shards
from expunge.cli.certify_plan import Decay, Holdout, Rate, Test
from expunge.cli.compare import _Source
from expunge.cli.inputs import allow_named_code, load_model, make_recipe, refuse_existing
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
    Model,
    OwnerColumn,
    Owners,
    Quiet,
    RecipeFile,
    Seed,
)
from expunge.cli.output import console, progress, say
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.core.store import write_atomically
from expunge.report import Grid, print_grid
from expunge.report.votes import predictions_grid, robustness_by_shards_grid, robustness_grid, robustness_svg

Plot = Annotated[Path | None, typer.Option(help="Draw accuracy against touched shards into this new file, .svg.")]
Floors = Annotated[str, typer.Option("--k", help="Numbers of touched shards to give floors for, as 1,2,5.")]


def votes(
    model: Annotated[Path, typer.Argument(help="Folder of a model trained in shards.")],
    data: Data,
    test: Test = None,
    each: Annotated[bool, typer.Option("--each", help="Show every prediction with its votes and radius.")] = False,
    plot: Plot = None,
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
    """Say which predictions no deletion can flip.

    For a model of shards that vote: how many shards requests may touch without changing each prediction on test rows,
    whatever they remove, and what accuracy is left at least. Nothing is random: --seed changes nothing.

    \b
    Examples:
      expunge certify votes models/digits --data mnist
      expunge certify votes models/churn --data customers.csv --test later.csv --id-column id --label-column churned \\
        --each --plot votes.svg
    """
    _refuse_plot(plot)
    trained = load_model(model, allow_code)
    source = _Source((id_column, owner_column, label_column, classes, columns, owners))
    rows = _test_rows(source.read(data, test, None, seed)[1], "--test")
    with progress(quiet or as_json) as show:
        show("counting votes", 0, 1)
        found = deletion_robustness(trained, rows)
    _draw(plot, [found])
    grids = [*([predictions_grid(found)] if each else []), robustness_grid(found)]
    about = {**_summary(found), **({"each": _each(found)} if each else {})}
    _tell(as_json, {"model": str(model), **about}, grids)


def votes_plan(
    data: Data,
    shards: Annotated[str, typer.Option(help="Numbers of shards to try, as 5,10,20,50.")] = "5,10,20,50",
    floors: Floors = "1,2,5",
    plot: Plot = None,
    model: Model = None,
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
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness; default: the recipe's, or 0.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare numbers of shards: accuracy, and what is left of it.

    Trains the recipe once in each number of shards, and shows the accuracy on test rows beside the accuracy that is
    left at least after any requests that touch k shards. Nothing is kept but the picture.

    \b
    Examples:
      expunge certify votes-plan --data mnist --owners 2000 --model mlp --epochs 5 --shards 20,50
      expunge certify votes-plan --data customers.csv --id-column id --label-column churned --holdout 0.2 \\
        --shards 5,10 --k 1,2 --plot votes.svg --json
    """
    _refuse_plot(plot)
    counts, ks = _numbers("--shards", shards, 1), _numbers("--k", floors, 0)
    source = _Source((id_column, owner_column, label_column, classes, columns, owners))
    records, held_out = source.read(data, test, holdout, seed or 0)
    rows = _test_rows(held_out, "--test or --holdout")
    asked = {"model": model, "epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay, "seed": seed}
    training = make_recipe(recipe, asked, lr, None, None, records)
    allow_named_code(training, allow_code)
    with progress(quiet or as_json) as show:
        found = robustness_by_shards(training, records, rows, counts, report=show)
    _draw(plot, found)
    about = {"recipe": training.to_json(), "k": ks, "lines": [_summary(one) for one in found]}
    _tell(as_json, about, [robustness_by_shards_grid(found, ks)])


def _summary(found: DeletionRobustness) -> dict[str, Any]:
    return {
        "digest": found.model,
        "shards": found.shards,
        "voters": found.voters,
        "rows": len(found),
        "median_radius": found.median_radius,
        "accuracy": found.accuracy_floor(0).to_json(),
        "floors": [floor.to_json() for floor in found.curve()],
    }


def _each(found: DeletionRobustness) -> list[dict[str, Any]]:
    names = ("id", "label", "predicted", "radius", "votes")
    columns = (found.labels, found.predicted, found.radius, found.votes)
    rows = zip(found.ids, *(column.tolist() for column in columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _test_rows(rows: Records | None, how: str) -> Records:
    if rows is None:
        raise Misuse(f"floors are of rows that the model was not trained on; give them: {how}")
    return rows


def _refuse_plot(plot: Path | None) -> None:
    if plot is not None:
        if plot.suffix != ".svg":
            raise Misuse(f"--plot must end in .svg, got {plot}")
        refuse_existing(plot)


def _draw(plot: Path | None, found: Sequence[DeletionRobustness]) -> None:
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(plot, robustness_svg(found).encode("utf-8"))


def _tell(as_json: bool, about: dict[str, Any], grids: Sequence[Grid]) -> None:
    if as_json:
        say(True, about, "")
        return
    screen = console()
    for grid in grids:
        print_grid(grid, screen)


def _numbers(option: str, text: str, least: int) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise Misuse(f'{option} must be whole numbers >= {least}, as 5,10,20, got "{text}"')
    return sorted(set(map(int, words)))
