"""`expunge certify`: removals with a guarantee, and what one says; what a budget would cost is in `certify_plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.certify.derivations import settings_of
from expunge.certify.explain import NOT_COMPUTED, rounded_up
from expunge.cli.certify_plan import Delta, Epsilon, Requests, plan, plot
from expunge.cli.certify_votes import votes, votes_plan
from expunge.cli.guarantees import Kept, rechecked, where_kept
from expunge.cli.inputs import (
    METHODS,
    load_model,
    make_request,
    named_method,
    read_records,
    refuse_existing,
)
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
from expunge.cli.output import progress, say
from expunge.core.claim import Claim, Guarantee
from expunge.core.coins import generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Unlearned
from expunge.unlearn import Method

app = typer.Typer(help="Certified removals: carry out, explain, plan and plot.", no_args_is_help=True)

_CERTIFIED = [word for word, kind in METHODS.items() if kind.claim is Claim.CERTIFIED]


@app.command()
def remove(
    model: Annotated[Path, typer.Argument(help="Folder of the trained model.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the model after; its guarantee goes beside it.")],
    record: Annotated[list[str] | None, typer.Option("--id", help="A record to remove; may be repeated.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with one record id a line.")] = None,
    owner: Annotated[str | None, typer.Option(help="Remove all that this owner holds.")] = None,
    label: Annotated[int | None, typer.Option("--class", help="Remove a whole class.")] = None,
    method: Annotated[str, typer.Option(help=", ".join(_CERTIFIED))] = "newton-head",
    epsilon: Epsilon = 1.0,
    delta: Delta = 1e-5,
    requests: Requests = 100,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, as sigma=.02.")] = None,
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
    """Remove records with a guarantee.

    Writes a new model, and OUT.guarantee.json beside it. The budget is of all requests of this model together: give
    the same one each time. Exit code 3 if it is spent, 1 if nothing could be claimed. What it took is told on standard
    error, to you alone: times and steps of a certified removal may depend on the records removed.

    \b
    Examples:
      expunge certify remove models/adult --data adult --id adult-train-00017 --out models/adult-2
      expunge certify remove models/churn --data customers.csv --id-column id --label-column churned --owner c-17 \\
        --epsilon 1 --delta 1e-6 --requests 500 --set sigma=.02 --out models/churn-2
    """
    beside = where_kept(out)
    refuse_existing(out)
    refuse_existing(beside)
    request = make_request(record, ids_file, owner, label)
    if method not in _CERTIFIED:
        raise Misuse(f'"{method}" is no certified method; these are: {", ".join(_CERTIFIED)}')
    if any(text.partition("=")[0] == "budget" for text in setting or []):
        raise Misuse("the budget is said by --epsilon, --delta and --requests here; leave --set budget out")
    budget = f"budget={epsilon!r},{delta!r},{requests}"
    chosen = named_method(method, [budget, *(setting or [])])
    trained = load_model(model, allow_code)
    records = read_records(data, id_column, owner_column, label_column, classes, columns, owners)[0]
    with progress(quiet or as_json) as show:
        show(method, 0, 1)
        answer = chosen(trained, records, request, rng=generator(seed))
    after, kept = answer.trained, _kept_of(answer, chosen, method)
    if after is trained and where_kept(model).exists():
        kept = Kept.read(where_kept(model))  # nothing was left to do: what was guaranteed still is
    after.save(out)
    if kept is not None:
        kept.write(beside)
    if not quiet:
        print(f"took {answer.cost.seconds:.2g} s (for you alone)", file=sys.stderr)
    removed = len(after.gone) - len(trained.gone)
    _tell_removal(answer, kept, removed, out, method, as_json)
    return 1 if removed and kept is None else 0


def _kept_of(answer: Unlearned, chosen: Method, word: str) -> Kept | None:
    """The guarantee to write down; None without a claim."""
    after = answer.trained
    if answer.guarantee is None or answer.claim is not Claim.CERTIFIED:
        return None
    settings = settings_of(chosen, after.recipe, module=after.module)
    return Kept(guarantee=answer.guarantee, model=after.digest(), method=word, settings=settings)


def _tell_removal(answer: Unlearned, kept: Kept | None, removed: int, out: Path, method: str, as_json: bool) -> None:
    guarantee = None if kept is None else kept.guarantee
    about: dict[str, Any] = {
        "model": str(out),
        "method": method,
        "claim": answer.claim.value,
        "not_covered": answer.claim.caveat(answer.exactness),
        "removed": removed,
        "gone": len(answer.trained.gone),
        "digest": answer.trained.digest(),
        "guarantee_file": None if guarantee is None else str(where_kept(out)),
        "guarantee": None if guarantee is None else guarantee.to_json(),
    }
    if removed:
        told = [f"removed {removed:,} records; {method}; saved in {out}"]
    else:
        told = [f"nothing left to remove: all of these are gone; saved as it was in {out}"]
    if guarantee is not None:
        told += [*_claim_lines(guarantee), f"guarantee in {where_kept(out)}"]
    elif removed:
        told += [f"claim: {answer.claim.value}. {answer.claim.caveat()}"]
        told += [] if answer.guarantee is None else answer.guarantee.remarks
    say(as_json, about, "\n".join(told))


def _claim_lines(guarantee: Guarantee) -> list[str]:
    """The claim with its two figures, and what it does not cover."""
    lines = [
        f"certified, {guarantee.basis}: compared with {guarantee.reference}",
        f"  this model alone     epsilon {rounded_up(guarantee.epsilon)}, delta {guarantee.delta:.3g}",
    ]
    spent = guarantee.transcript
    if spent is None:
        lines.append("  all releases so far  not bounded")
    else:
        lines.append(
            f"  all releases so far  epsilon {rounded_up(spent.epsilon)} of {spent.budget_epsilon:g}, "
            f"delta {spent.delta:.3g}: release {spent.releases} of {spent.budget_releases}"
        )
    if guarantee.outside:
        lines.append(f"Outside: {', '.join(guarantee.outside)}.")
    return [*lines, *guarantee.remarks, Claim.CERTIFIED.caveat()]


@app.command()
def explain(
    thing: Annotated[Path, typer.Argument(help="A guarantee (.json), or the model's folder that it lies beside.")],
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    seed: Seed = 0,
) -> int:
    """Say what a guarantee says, and check it.

    In plain words; then every constant is computed anew from those that it rests on. Of a model's folder, the
    guarantee must also be of just this model, its recipe and its last release. Exit code 1 if something does not hold.
    Nothing is random: --seed changes nothing.

    \b
    Examples:
      expunge certify explain models/adult-2
      expunge certify explain models/adult-2.guarantee.json --json
    """
    trained = load_model(thing, allow_code) if thing.is_dir() else None
    kept = Kept.read(where_kept(thing) if thing.is_dir() else thing)
    text, problems = rechecked(kept, trained)
    about = {"guarantee": kept.guarantee.to_json(), "holds": not problems, "problems": list(problems), "text": text}
    if problems:
        told = "\n".join(["Computed again, and it does NOT hold:", *(f"- {problem}" for problem in problems)])
    else:
        told = (
            f"Computed again: all {len(kept.guarantee.constants)} constants hold. Its words (what made it, what it is "
            "compared with) cannot be computed."
        )
        if any(one.derivation.startswith("checked ") for one in kept.guarantee.constants.values()):
            told += " What was counted on rows (checked) is believed here: only the rows could tell."
        if trained is None:
            told += " Which model it is of was not looked at: give the model's folder for that."
    say(as_json, about, told if quiet else f"{text.replace(NOT_COMPUTED, '').rstrip()}\n\n{told}")
    return 1 if problems else 0


app.command()(plan)
app.command()(plot)
app.command()(votes)
app.command()(votes_plan)
