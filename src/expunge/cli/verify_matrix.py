"""`expunge verify matrix`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.inputs import make_recipe, read_held_out, read_records
from expunge.cli.options import (
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
from expunge.core.coins import generator
from expunge.core.errors import Misuse
from expunge.report import print_grid, write
from expunge.report.verification import verification_report
from expunge.study.verification import some_owners, verification
from expunge.study.verification_ground import Terms
from expunge.study.verification_parties import PROVIDERS


def matrix(
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the report, and for every cell as it is finished.")],
    recipe: RecipeFile = None,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows at least, of whole owners; all if left out.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs, each with coins, owners and triggers of its own.")] = 5,
    askers: Annotated[int, typer.Option(help="Owners who plant triggers and ask to be forgotten.")] = 1,
    providers: Annotated[str | None, typer.Option(help="Names, separated by semicolons; all if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the folder --out; more seeds add to it.")] = False,
    test: Annotated[str | None, typer.Option(help="Held-out data; a built-in set brings its own.")] = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Let every verifier look at every way to cheat, on your data and model.

    Says who is caught by whom, who by nobody, and how often honest providers are accused. Exit code 1 if an honest
    provider was accused, or a cheat came past every verifier. Training is by plain SGD at a rate of .1, which forging
    needs, unless --recipe or --lr say otherwise.

    \b
    Examples:
      expunge verify matrix --data mnist --rows 3000 --epochs 3 --batch-size 32 --seeds 5 --out matrix
    """
    begun = (out / "study.json").is_file()
    if begun != resume:
        what = "holds a run already; go on with it: --resume" if begun else "holds no run to go on with: leave --resume"
        raise Misuse(f"{out} {what}, or name another folder")
    columns_of = (id_column, owner_column, label_column, classes, columns, owners)
    records, held_out = read_records(data, *columns_of)
    queries = held_out if test is None else read_held_out(test, *columns_of)
    if queries is None:
        raise Misuse("verifiers ask about rows that nobody trains on, and the data brings none; give some: --test")
    unknown = [name for name in _names(providers) if name not in PROVIDERS]
    if unknown:
        raise Misuse(f'--providers are {"; ".join(PROVIDERS)}, got "{unknown[0]}"')
    plain = None if recipe is not None else {"lr": 0.1}  # forging needs it
    asked = {"model": model, "epochs": epochs, "batch_size": batch_size, "optimiser_args": plain}
    some = records if rows is None else some_owners(records, rows, generator(seed))
    with progress(quiet or as_json) as show:
        found = verification(
            some,
            queries,
            make_recipe(recipe, asked, lr, None, None, some),
            seeds=seeds,
            providers={name: PROVIDERS[name] for name in _names(providers)} or None,
            terms=Terms(askers=askers),
            rng=generator(seed),
            keep=out,
            progress=show,
        )
    report = verification_report(found, f"expunge {shlex.join(sys.argv[1:])}")
    html, values = write(report, out)
    if as_json:
        print(json.dumps({**found.to_json(), "verdict": report.verdict, "report": str(html)}, allow_nan=False))
    else:
        for grid in report.chapters[0].grids[:2]:
            print_grid(grid, console())
        print(f"{report.verdict}\n\nreport  {html}\njson    {values}")
    return 0 if found.sound else 1


def _names(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(";") if word.strip()]
