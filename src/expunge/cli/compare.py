"""`expunge compare`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer

from expunge.cli.inputs import METHODS, allow_named_code, make_recipe, named_method, read_held_out, read_records
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
from expunge.cli.output import console, progress
from expunge.core.claim import Claim
from expunge.core.coins import child, generator
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.records import Records
from expunge.learn.loop import NOTHING, Keep
from expunge.report import print_grid, study_grids, study_report, write
from expunge.study import Scenario, Study, StudyResult, run_study
from expunge.unlearn import Method

_PruneBy = Literal["magnitude", "synflow", "random"]
_BASELINES = ("retrain", "retrain-briefly", "sisa")


def compare(
    data: Data,
    folder: Annotated[Path, typer.Option(help="Folder of the study: new, or one to go on with.")],
    methods: Annotated[
        str | None, typer.Option(help="Methods, as fine-tune,gradient-ascent; all that claim nothing if left out.")
    ] = None,
    scenarios: Annotated[
        str,
        typer.Option(help="What is forgotten, each apart: class:3, random:0.1 (of all), owner:NAME, ids:FILE."),
    ] = "random:0.1",
    sparsities: Annotated[str, typer.Option(help="Share of the weights that are pruned before; 0 is dense.")] = "0",
    seeds: Annotated[int, typer.Option(help="Replicas: trainings with seeds --seed and up.")] = 3,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of a method, as fine-tune.lr=0.01; may be repeated.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Settings tried for each method; 1: those given, without a search.")] = 1,
    criterion: Annotated[
        str, typer.Option(help="What the search goes by: validation, or oracle (looks at a retrained model).")
    ] = "validation",
    prune_by: Annotated[str, typer.Option(help="magnitude, synflow or random.")] = "magnitude",
    rewind: Annotated[int, typer.Option(help="Epoch that magnitude pruning goes back to.")] = 0,
    rounds: Annotated[int, typer.Option(help="Rounds of magnitude pruning.")] = 1,
    equal_compute: Annotated[
        str, typer.Option(help="Retrain beside each method for as many seconds or gradients; or none.")
    ] = "seconds",
    floor: Annotated[bool, typer.Option("--floor", help="Also retrain with other coins.")] = False,
    keep_steps: Annotated[
        bool, typer.Option("--keep-steps", help="Keep every step of the originals in memory, for methods that need it.")
    ] = False,
    recipe: RecipeFile = None,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the training.")] = None,
    test: Annotated[str | None, typer.Option(help="Held-out data; a built-in set brings its own.")] = None,
    holdout: Annotated[float | None, typer.Option(help="Hold out this share of the owners instead of --test.")] = None,
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
    """Compare unlearning methods with exact retraining.

    Methods by scenarios by sparsities by seeds, each beside retraining in full and for as long as the method took. Each
    finished figure is kept at once: after a break, the same command goes on. Writes report.html into the folder.

    \b
    Examples:
      expunge compare --data mnist --model lenet --epochs 5 --methods fine-tune,gradient-ascent \\
        --scenarios class:3,random:0.1 --sparsities 0,0.95 --seeds 3 --folder study
      expunge compare --data customers.csv --id-column id --label-column churned --holdout 0.2 \\
        --scenarios owner:c-17,random:0.05 --trials 20 --folder study-2
    """
    if seeds < 1:
        raise Misuse(f"--seeds must be >= 1, got {seeds}")
    chosen = chosen_methods(methods, setting or [])
    wanted = [read_scenario(word) for word in _words(scenarios)]
    shares = [_share(word) for word in _words(sparsities)]
    source = _Source((id_column, owner_column, label_column, classes, columns, owners))
    records, held_out = source.read(data, test, holdout, seed)
    _refuse_held_out(wanted, held_out)
    asked = {"model": model, "epochs": epochs, "batch_size": batch_size}
    training = make_recipe(recipe, asked, lr, None, None, records)
    allow_named_code(training, allow_code)
    if prune_by not in get_args(_PruneBy):
        raise Misuse(f'--prune-by must be one of {", ".join(get_args(_PruneBy))}, got "{prune_by}"')
    study = Study(
        recipe=training,
        methods=chosen,
        scenarios=wanted,
        sparsities=shares,
        seeds=range(seed, seed + seeds),
        by=cast(_PruneBy, prune_by),
        rewind=rewind,
        rounds=rounds,
        trials=trials,
        criterion=cast(Literal["validation"], criterion),
        equal_compute=None if equal_compute == "none" else cast(Literal["seconds"], equal_compute),
        floor=floor,
        keep=Keep(batches=True, every=1) if keep_steps else NOTHING,
    )
    with progress(quiet or as_json) as show:
        result = run_study(study, records, held_out, folder=folder, report=show)
    _tell(result, folder, as_json)


def _tell(result: StudyResult, folder: Path, as_json: bool) -> None:
    report = study_report(result, f"expunge {shlex.join(sys.argv[1:])}")
    html, data = write(report, folder)
    if as_json:
        print(json.dumps({**result.to_json(), "report": str(html)}, allow_nan=False))
        return
    screen = console()
    for grid in study_grids(result):
        print_grid(grid, screen)
    for chapter in report.chapters:
        if chapter.name == "search":
            print_grid(chapter.grids[0], screen)
    print(f"{report.verdict}\n\nreport  {html}\njson    {data}")


@dataclass(frozen=True)
class _Source:
    """How tables are to be read, those of the test rows too."""

    columns: tuple[Any, ...]

    def read(self, data: str, test: str | None, holdout: float | None, seed: int) -> tuple[Records, Records | None]:
        """Training and test rows."""
        records, own = read_records(data, *self.columns)
        if test is not None and holdout is not None:
            raise Misuse("give --test or --holdout, not both")
        if holdout is not None:
            if own is not None:
                raise Misuse(f"{data} brings its own test rows; leave out --holdout")
            held_out, rest = records.split(holdout, child(generator(seed), "holdout"), by_owner=True)
            if not len(held_out) or not len(rest):
                raise Misuse(f"--holdout {holdout} leaves no row on one side; choose another share")
            return rest, held_out
        return records, own if test is None else read_held_out(test, *self.columns)


def _refuse_held_out(wanted: Sequence[Scenario], held_out: Records | None) -> None:
    """Misuse for a scenario whose records were held out: nobody who was never trained on can be forgotten."""
    if held_out is None:
        return
    owners = set(held_out.owners)
    for one in wanted:
        gone = [one.owner] if one.owner in owners else [name for name in one.ids if name in held_out]
        if gone:
            raise Misuse(
                f'"{gone[0]}" of scenario {one.name} was held out for testing; choose another --seed or --holdout, or '
                "give test rows of their own: --test"
            )


def chosen_methods(words: str | None, settings: Sequence[str]) -> Mapping[str, Method]:
    """The methods named, with the settings given as ``method.name=value``."""
    every = [word for word, kind in METHODS.items() if kind.claim is Claim.NONE and word not in _BASELINES]
    named = every if words is None else _words(words)
    given: dict[str, list[str]] = {}
    for text in settings:
        word, dot, rest = text.partition(".")
        if not dot or word not in named:
            raise Misuse(f"--set {text} is of no method compared; give it as METHOD.name=value, of {', '.join(named)}")
        given.setdefault(word, []).append(rest)
    for word in named:
        if word == "retrain":
            raise Misuse("retraining is always there, as the reference; leave it out of --methods")
        if named.count(word) > 1:
            raise Misuse(f"--methods names {word} twice; name it once")
    return {word: named_method(word, given.get(word, [])) for word in named}


def read_scenario(word: str) -> Scenario:
    """The scenario of a word; ``ids:FILE`` reads one id a line."""
    kind, _, path = word.partition(":")
    if kind != "ids":
        return Scenario.parse(word)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{path or 'the file of ids'} cannot be read ({error}); give ids:FILE") from None
    if not any(line.strip() for line in lines):
        raise UnreadableFile(f"{path} holds no id; give a text file, one id a line")
    return Scenario.of_ids(word, [line.strip() for line in lines if line.strip()])


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise Misuse(f'--sparsities must be numbers >= 0 and < 1, as 0,0.95, got "{word}"') from None
