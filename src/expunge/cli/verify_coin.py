"""`expunge verify commit`, `draw` and `spend`: a public coin from its commitments to the one transcript it is for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.inputs import make_request, read_records
from expunge.cli.options import Classes, Columns, Data, IdColumn, Json, LabelColumn, OwnerColumn, Owners
from expunge.cli.output import say
from expunge.cli.verify_files import coin_json, read_coin, read_commitments, write_json
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.verify import CoinRegistry, Transcript
from expunge.verify import commit as commit_to


def commit(
    data: Data,
    recipe: Annotated[Path, typer.Option(help="The recipe agreed on, as JSON; its seed is left to the coin.")],
    out: Annotated[Path, typer.Option(help="New file for the commitments; hand it to the auditor.")],
    record: Annotated[list[str] | None, typer.Option("--id", help="A record to forget; may be repeated.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with one id to forget a line.")] = None,
    owner: Annotated[str | None, typer.Option("--forget-owner", help="Forget all of this owner.")] = None,
    label: Annotated[int | None, typer.Option("--class", help="Forget a whole class.")] = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    as_json: Json = False,
) -> None:
    """Commit to all rows, those to forget and those that stay, before the coin is drawn: the provider's part.

    \b
    Examples:
      expunge verify commit --data mnist --recipe agreed.json --forget-owner owner-017 --out commitments.json
    """
    given = (record, ids_file, owner, label)
    asked = make_request(*given) if any(one is not None for one in given) else None
    rows = read_records(data, id_column, owner_column, label_column, classes, columns, owners)[0]
    gone = None if asked is None else rows.take(asked.named(rows))
    commitments = commit_to(Recipe.load(recipe), rows, gone)
    write_json(out, asdict(commitments))
    about = {"commitments": str(out), "digest": commitments.digest(), "rows": len(rows), "forget": len(gone or ())}
    say(as_json, about, f"committed to {len(rows):,} rows, {len(gone or ()):,} to forget: {commitments.digest()}")


def draw(
    commitments: Annotated[Path, typer.Argument(help="File of the commitments.")],
    registry: Annotated[Path, typer.Option(help="The auditor's file of all coins, where the provider cannot write.")],
    subject: Annotated[str, typer.Option(help="What is answered, such as the request's number: tries count by it.")],
    out: Annotated[Path, typer.Option(help="New file for the coin; hand it to the provider.")],
    nonce: Annotated[str | None, typer.Option(help="Of a beacon, published after the commitments; else drawn.")] = None,
    as_json: Json = False,
) -> None:
    """Take in commitments and draw the coin for them: the auditor's part. Each draw is counted.

    \b
    Examples:
      expunge verify draw commitments.json --registry coins.json --subject request-1 --out coin.json
    """
    told, book = read_commitments(commitments), CoinRegistry(registry)
    book.anchor(told, subject)
    coin = book.draw(told, subject, nonce=nonce)
    write_json(out, coin_json(coin))
    about = {"coin": str(out), "nonce": coin.nonce, "tries": coin.tries, "seed": coin.seed}
    say(as_json, about, f"coin in {out}; {coin.tries} drawn for {subject}")


def spend(
    transcript: Annotated[Path, typer.Argument(help="Folder of the transcript to accept for the coin.")],
    coin: Annotated[Path, typer.Option(help="The coin, as expunge verify draw wrote it.")],
    registry: Annotated[Path, typer.Option(help="The auditor's file of all coins.")],
    as_json: Json = False,
) -> None:
    """Accept one transcript for a coin, and no other ever after: the auditor's part, once it was replayed and accepted.

    Refuses a coin that is not the last one drawn for its subject. Says how many were drawn, which is how often the
    provider may have tried. The coin of a sharded model serves later removals too, and is not spent.

    \b
    Examples:
      expunge verify spend told --coin coin.json --registry coins.json
    """
    told, drawn = Transcript.open(transcript), read_coin(coin)
    if told.contract.coin is None or dict(told.contract.coin) != drawn.to_json():
        raise Misuse(f"{transcript} was made by another coin than {coin}, or by none; nothing was spent")
    if not registry.is_file():
        raise Misuse(f"{registry} is no registry; give the file that expunge verify draw wrote to")
    tries = CoinRegistry(registry).spend(drawn, told.commitment)
    about = {"transcript": told.commitment, "nonce": drawn.nonce, "tries": tries}
    say(as_json, about, f"accepted {told.commitment} for the coin, number {tries} of its subject")
