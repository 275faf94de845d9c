"""`expunge redteam`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from expunge.cli.inputs import load_model, make_method, read_held_out, read_records
from expunge.cli.options import (
    AllowCode,
    Classes,
    Columns,
    Data,
    IdColumn,
    Json,
    LabelColumn,
    OwnerColumn,
    Owners,
    Quiet,
    Seed,
)
from expunge.cli.output import console, progress
from expunge.cli.redteam_asked import (
    named,
    refuse_method,
    refuse_missing,
    refuse_numbers,
    refuse_other_rows,
    shares,
    unlearners,
)
from expunge.core.coins import generator
from expunge.core.errors import Misuse, Stopped
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import Report
from expunge.report import print_grid, write
from expunge.report.redteam import redteam_report
from expunge.study.redteam import redteam as run_redteam
from expunge.study.redteam_attacks import ATTACKS
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_response import summary
from expunge.study.redteam_screens import SCREENS


def redteam(
    model: Annotated[Path, typer.Argument(help="Folder of the trained model.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the report, and for every trial as it is finished.")],
    method: Annotated[
        str, typer.Option(help="The unlearner under attack; auto: sisa for shards, else retrain.")
    ] = "auto",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, as lr=0.01.")] = None,
    others: Annotated[str, typer.Option(help="Unlearners that attacks may transfer to, as fine-tune,scrub.")] = "",
    attacks: Annotated[str | None, typer.Option(help=f"Of {', '.join(ATTACKS)}; all if left out.")] = None,
    targets: Annotated[int, typer.Option(help="Test rows that are attacked, each apart.")] = 5,
    targeted: Annotated[
        bool, typer.Option("--targeted", help="Want the second best class, instead of any but the true one.")
    ] = False,
    budget: Annotated[str, typer.Option(help="Shares of the rows that an attack may ask for, as .001,.01.")] = ".01",
    screens: Annotated[str | None, typer.Option(help=f"Of {', '.join(SCREENS)}; none; all if left out.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings that exact retraining is measured on.")] = 1,
    rate: Annotated[float, typer.Option(help="False alarms that every screen is calibrated to.")] = 0.05,
    draws: Annotated[int, typer.Option(help="Requests in good faith that screens are calibrated on.")] = 200,
    benign: Annotated[int, typer.Option(help="Other such requests, on which false alarms are measured.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the folder --out after a break.")] = False,
    test: Annotated[str | None, typer.Option(help="Held-out data; a built-in set brings its own.")] = None,
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
) -> int:
    """Attack a model by requests filed in bad faith.

    Every attack on every target at every budget, through the unlearner and under exact retraining, beside random rows,
    nearest neighbours and doing nothing; then every screen, alone and together. Says of each attack whether it is the
    data or the approximation, and writes report.html with pictures into the folder. Targets are test rows that the
    model answers rightly. Nothing is changed in the model.

    Exit code 1 if nothing could be measured, or an attack moves targets through the unlearner further than random rows
    and doing nothing do, with all of the interval, and no screen catches it more often than requests in good faith.
    With few targets neither is shown of weak attacks: 0 is no proof.

    \b
    Examples:
      expunge redteam models/digits --data mnist --method influence-unlearning --out redteam
      expunge redteam models/churn --data customers.csv --id-column id --label-column churned --test held-out.csv \\
        --method fine-tune --set lr=0.01 --attacks select,sequential --targets 30 --budget .001,.005,.01,.02 \\
        --seeds 3 --out redteam-churn
    """
    _refuse_folder(out, resume)
    chosen, guards = named(attacks, ATTACKS, "--attacks"), named(screens, SCREENS, "--screens")
    if "evading" in chosen and not guards:
        if attacks is not None:
            raise Misuse("evading attacks screens, and there are none; name some in --screens, or leave it out")
        chosen.pop("evading")
    budgets, transfer = shares(budget), unlearners(others)
    refuse_method(method, setting or [])
    refuse_numbers(targets=targets, seeds=seeds, rate=rate, draws=draws, benign=benign, screened=bool(guards))
    refuse_missing(model, data, test)
    trained = load_model(model, allow_code)
    through = make_method(method, setting or [], trained)
    columns_of = (id_column, owner_column, label_column, classes, columns, owners)
    records, strangers = _rows(trained, data, test, columns_of, targets)
    with _resumable(out), _shown(quiet or as_json) as show:
        found = run_redteam(
            trained,
            records,
            strangers,
            attacks=chosen,
            through=through,
            others=transfer,
            screens=[make() for make in guards.values()],
            targets=targets,
            targeted=targeted,
            budgets=budgets,
            seeds=seeds,
            rate=rate,
            draws=draws,
            benign=benign,
            rng=generator(seed),
            keep=out,
            progress=show,
        )
    _tell(found, out, as_json)
    return 1 if found.uncaught or not found.carried_out else 0


@contextmanager
def _shown(quiet: bool) -> Iterator[Report]:
    """The bar of other commands; where nobody watches it, as in a log, a line whenever a trial is begun."""
    if quiet or Console(stderr=True).is_terminal:
        with progress(quiet) as bar:
            yield bar
        return
    started, before = time.monotonic(), list[int]()

    def line(what: str, done: int, total: int) -> None:
        before.append(done)  # what was done before the first line was kept by another run, and took no time in this one
        spent, own = time.monotonic() - started, done - before[0]
        left = f", about {spent / own * (total - done):,.0f} s left" if own and done < total else ""
        print(f"{done} of {total} trials after {spent:,.0f} s{left}: {what}", file=sys.stderr, flush=True)

    yield line


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(
            f"interrupted; finished trials are kept: go on with the same command and --resume ({out})"
        ) from None


def _tell(found: Redteam, out: Path, as_json: bool) -> None:
    words = [word for word in sys.argv[1:] if word != "--resume"]  # the reader has no run to go on with
    report = redteam_report(found, f"expunge {shlex.join(words)}")
    html, data = write(report, out)
    if as_json:
        about = {**summary(found), "verdict": report.verdict, "sound": report.sound}
        print(json.dumps({**about, "report": str(html), "data": str(data)}, allow_nan=False))
        return
    screen = console()
    for chapter in report.chapters:
        for grid in chapter.grids:
            print_grid(grid, screen)
    for line in report.chapters[0].text:
        print(line)
    print(f"\n{report.verdict}\n\nreport  {html}\njson    {data}")


def _refuse_folder(out: Path, resume: bool) -> None:
    begun = (out / "study.json").is_file()
    if begun and not resume:
        raise Misuse(f"{out} holds a run already; go on with it: --resume, or name a new folder")
    if resume and not begun:
        raise Misuse(f"there is no run in {out} to go on with; leave out --resume")


def _rows(
    trained: Trained, data: str, test: str | None, columns: tuple[Any, ...], targets: int
) -> tuple[Records, Records]:
    """All rows of the data, and rows that the model was not trained on."""
    records, own = read_records(data, *columns)
    if test is not None:
        strangers = read_held_out(test, *columns)
    elif own is not None:
        strangers = own
    else:
        strangers = records.where(lambda one, _: one not in trained.ids and one not in trained.gone)
        if not len(strangers):
            raise Misuse(
                "targets are rows that the model was not trained on, and the data holds none; give some: --test"
            )
    refuse_other_rows(trained, records, strangers, data, targets)
    return records, strangers
