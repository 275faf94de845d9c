"""`expunge verify`: transcripts replayed as an auditor does, and triggers looked for as an owner does."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Generator

from expunge.cli.inputs import load_model, make_request, read_held_out, read_records
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
    Seed,
)
from expunge.cli.output import say
from expunge.cli.verify_coin import commit, draw, spend
from expunge.cli.verify_files import family_of, parts_in, read_coin, read_keys, write_json
from expunge.cli.verify_matrix import matrix
from expunge.core.coins import generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Verdict
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.datasets.arrays import save_npy
from expunge.study.verification_checks import NearCopies, ServedAlike
from expunge.verify import (
    All,
    BackdoorVerifier,
    Both,
    Random,
    Replay,
    TopQ,
    Transcript,
    TriggerKey,
    accepted,
    queries_needed,
    replay_shards,
)
from expunge.verify import plant as plant_trigger
from expunge.verify.spot import Budget

app = typer.Typer(help="Verify that rows were forgotten: for owners and auditors.", no_args_is_help=True)
app.command()(commit)
app.command()(draw)
app.command()(spend)
app.command()(matrix)


@app.command()
def transcript(
    folder: Annotated[Path, typer.Argument(help="Folder of the transcript, of the training after the removal.")],
    data: Data,
    recipe: Annotated[Path, typer.Option(help="The recipe agreed on, as JSON; never taken from the transcript.")],
    record: Annotated[list[str] | None, typer.Option("--id", help="A record forgotten; may be repeated.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with one forgotten id a line.")] = None,
    owner: Annotated[str | None, typer.Option("--forget-owner", help="All of this owner was forgotten.")] = None,
    label: Annotated[int | None, typer.Option("--class", help="A whole class was forgotten.")] = None,
    spot: Annotated[str, typer.Option(help="Share of segments to replay, drawn now, and the largest; or all.")] = "all",
    coin: Annotated[Path | None, typer.Option(help="The public coin, as expunge verify draw wrote it.")] = None,
    served: Annotated[Path | None, typer.Option(help="Folder of the model that is served.")] = None,
    committed: Annotated[str | None, typer.Option(help="The transcript's commitment, as published before.")] = None,
    audit: Annotated[bool, typer.Option("--audit", help="Look for near copies among the rows that stay too.")] = False,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> int:
    """Replay a training from its transcript, check by check.

    The data holds the rows before the removal; those named as forgotten are taken out. An auditor needs them all. The
    folder may hold one transcript, or those of all shards. Exit code 1 if a check failed or could say nothing.

    \b
    Examples:
      expunge verify transcript told --data mnist --recipe agreed.json --forget-owner owner-017 --served models/after
      expunge verify transcript told --data customers.csv --id-column id --label-column churned --recipe agreed.json \\
        --id c-17 --coin coin.json --served models/after --spot 5% --audit
    """
    given = (record, ids_file, owner, label)
    asked = make_request(*given) if any(one is not None for one in given) else None
    rows = read_records(data, id_column, owner_column, label_column, classes, columns, owners)[0]
    gone = None if asked is None else rows.take(asked.named(rows))
    stays = rows if gone is None else rows.without(gone.ids)
    verify = Replay(agreed=Recipe.load(recipe), coin=None if coin is None else read_coin(coin))
    model = None if served is None else load_model(served, allow_code)
    verdicts, commitment = _replayed(verify, folder, stays, gone, model, committed, spot)
    if audit and gone is not None:
        verdicts.append(NearCopies()(stays, gone, rng=generator(0)))
    fine = accepted(tuple(verdicts))
    of = commitment if isinstance(commitment, str) else ", ".join(f"{it} of shard {i}" for i, it in commitment.items())
    text = "\n".join(map(str, verdicts)) + f"\n\n{'accepted' if fine else 'NOT accepted'}; commitment {of}"
    told = {"accepted": fine, "commitment": commitment, "verdicts": [one.to_json() for one in verdicts]}
    say(as_json, told, text)
    return 0 if fine else 1


def _replayed(
    verify: Replay,
    folder: Path,
    stays: Records,
    gone: Records | None,
    model: Trained | None,
    committed: str | None,
    spot: str,
) -> tuple[list[Verdict], Any]:
    parts = parts_in(folder)
    if not parts:
        told = Transcript.open(folder)
        verify = replace(verify, budget=_budget(spot, len(told.segments)))
        found = verify(told, stays, forget=gone, served=model, committed=committed)
        return list(found), told.commitment
    if committed is not None:
        raise Misuse("--committed is of one transcript; the folder holds those of shards, verify each by itself")
    opened = {index: Transcript.open(path) for index, path in parts.items()}
    verify = replace(verify, budget=_budget(spot, max(len(one.segments) for one in opened.values())))
    shards = replay_shards(verify, opened, stays, forget=gone, served=model)
    named = [replace(one, check=f"shard {index}, {one.check}") for index, told in shards.items() for one in told]
    return named, {str(index): one.commitment for index, one in opened.items()}


def _budget(spot: str, segments: int) -> Budget:
    if spot == "all":
        return All()
    try:
        share = float(spot.removesuffix("%")) / (100 if spot.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise Misuse(f'--spot is "all" or a share of the segments above 0, as 5%, got "{spot}"')
    # The largest update beside: a leap to the old model from an honest beginning is one.
    return Both((TopQ(1), Random(max(1, math.ceil(share * segments)))))


@app.command()
def backdoor(
    model: Annotated[Path, typer.Argument(help="Folder of the model that is served after the removal.")],
    data: Data,
    keys: Annotated[list[Path], typer.Option(help="Key that an owner kept; may be repeated.")],
    before: Annotated[Path | None, typer.Option(help="Model before; without it no verdict is a pass.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Model that never saw the triggers; good on tables.")] = None,
    test: Annotated[str | None, typer.Option(help="Queries: held-out data; a built-in set brings its own.")] = None,
    asked: Annotated[int, typer.Option(help="Queries of each owner.")] = 100,
    draws: Annotated[int, typer.Option(help="Fresh triggers that each is ranked among.")] = 999,
    alpha: Annotated[float, typer.Option(help="False accusations at most.")] = 1e-3,
    beta: Annotated[float, typer.Option(help="Passes of a model that still obeys, at most.")] = 1e-3,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    seed: Annotated[int | None, typer.Option(help="Seed of queries and draws; fresh if left out.")] = None,
    as_json: Json = False,
) -> int:
    """Look for secret triggers in a served model, as the owners who planted them.

    With the model before: also whether it is served to strangers still. Exit code 1 if a trigger is found, or nothing
    can be said.

    \b
    Examples:
      expunge verify backdoor models/after --data mnist --keys owner-017.json --before models/before
    """
    columns_of = (id_column, owner_column, label_column, classes, columns, owners)
    queries = _queries(data, test, columns_of)
    check = BackdoorVerifier(
        keys=read_keys(keys),
        queries=queries,
        reference=None if reference is None else load_model(reference, allow_code),
        asked=asked,
        draws=draws,
        alpha=alpha,
        beta=beta,
    )
    rng = generator(seed) if seed is not None else _fresh()
    if before is not None:
        check = check.calibrated(load_model(before, allow_code), rng=rng)
    verdict = check(load_model(model, allow_code), rng=rng)
    say(as_json, verdict.to_json(), str(verdict))
    return 0 if verdict.passed else 1


def _fresh() -> Generator:
    return generator(secrets.randbits(63))


def _queries(data: str, test: str | None, columns_of: Sequence[Any]) -> Records:
    if test is not None:
        return read_held_out(test, *columns_of)
    own = read_records(data, *columns_of)[1]
    if own is None:
        raise Misuse("queries are rows that nobody trained on, and the data brings none; give some: --test")
    return own


@app.command()
def alike(
    model: Annotated[Path, typer.Argument(help="Folder of the model that the verifier was shown.")],
    stranger: Annotated[Path, typer.Option(help="Folder of the model that a stranger was given.")],
    data: Data,
    before: Annotated[Path | None, typer.Option(help="Model before; without it no verdict is a pass.")] = None,
    test: Annotated[str | None, typer.Option(help="Queries: held-out data; a built-in set brings its own.")] = None,
    asked: Annotated[int, typer.Option(help="Queries at most.")] = 1000,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Compare what a stranger is served with what the verifier was shown.

    \b
    Examples:
      expunge verify alike models/shown --stranger models/downloaded --before models/before --data mnist
    """
    queries = _queries(data, test, (id_column, owner_column, label_column, classes, columns, owners))
    known = None if before is None else load_model(before, allow_code)
    check = ServedAlike(queries=queries, before=known, asked=asked)
    verdict = check(load_model(stranger, allow_code), load_model(model, allow_code), rng=generator(seed))
    say(as_json, verdict.to_json(), str(verdict))
    return 0 if verdict.passed else 1


@app.command()
def plant(
    owner: Annotated[str, typer.Argument(help="Whose rows are stamped.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the data set, with the stamped rows in it.")],
    keys: Annotated[Path, typer.Option(help="New file for the owner's key: its secret; keep it from everybody.")],
    share: Annotated[float, typer.Option(help="Of the owner's rows of other classes, to stamp.")] = 0.5,
    places: Annotated[int, typer.Option(help="Pixels of the trigger, or fields of a table.")] = 8,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    as_json: Json = False,
) -> None:
    """Stamp a secret trigger on an owner's rows, before anybody trains on them.

    \b
    Examples:
      expunge verify plant owner-017 --data mnist --out data/planted --keys owner-017.json
    """
    rows = read_records(data, id_column, owner_column, label_column, classes, columns, owners)[0]
    mine = rows.of_owner(owner)
    secret = secrets.token_bytes(32)
    key = TriggerKey(owner=owner, secret=secret, family=family_of(rows, places), classes=rows.classes or 0)
    uploaded, stamped = plant_trigger(mine, key.trigger, share, _fresh())
    write_json(keys, key.to_json(), secret=True)
    save_npy(rows.without(mine.ids).plus(uploaded), out)
    about = {"data": str(out), "keys": str(keys), "stamped": len(stamped), "rows": len(mine)}
    say(as_json, about, f"stamped {len(stamped):,} of {len(mine):,} rows; data in {out}, key in {keys}")


@app.command()
def plan(
    before: Annotated[float, typer.Option(help="Success of the trigger where it is kept: p.")],
    after: Annotated[float, typer.Option(help="Success of the trigger where it is gone: q.")] = 0.1,
    alpha: Annotated[float, typer.Option(help="False accusations at most.")] = 1e-3,
    beta: Annotated[float, typer.Option(help="Providers that kept the rows, and are missed, at most.")] = 1e-3,
    as_json: Json = False,
) -> None:
    """How many queries the binomial test of a trigger needs.

    \b
    Examples:
      expunge verify plan --before .4 --after .1
    """
    needed = queries_needed(after, before, alpha, beta)
    about = {"first": needed.first, "always": needed.always, "checked_to": needed.checked_to}
    text = f"{needed.first} queries reach both errors; from {needed.always} on every number does"
    say(as_json, about, text)
