"""`expunge init`, `expunge register-model` and `expunge run`."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from expunge import datasets
from expunge.cli.inputs import METHODS, load_model, read_records
from expunge.cli.options import (
    AllowCode,
    Classes,
    Columns,
    Data,
    Folder,
    IdColumn,
    Json,
    LabelColumn,
    Models,
    OwnerColumn,
    Owners,
    Quiet,
)
from expunge.cli.output import progress, say
from expunge.cli.places import opened, plain, refuse_inside
from expunge.cli.served import Source, absolute, served_model
from expunge.core.errors import ExpungeError, Misuse
from expunge.core.protocols import Stage
from expunge.ledger.check import key_id
from expunge.ledger.states import State
from expunge.screen import ScreenStage
from expunge.screen.conformal import least_draws
from expunge.verify import Share, VerifyStage
from expunge.workflow import Journey, Leftovers, Progress, Workspace

Tell = Callable[[str, int, int], None]
_ROWS_OUTSIDE = "a workspace must not keep rows or their ids"


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder for the workspace.")],
    url: Annotated[
        str | None,
        typer.Option(help="The ledger's database, as postgresql://user@host/name; a file in DIR if left out."),
    ] = None,
    origin: Annotated[str | None, typer.Option(help="The log's name on every checkpoint; never changes.")] = None,
    as_json: Json = False,
) -> None:
    """Make a workspace for models and requests about them.

    \b
    Examples:
      expunge init shop
      expunge init shop --origin example.com/erasures --url postgresql://expunge@localhost/shop
    """
    _refuse_odd(url, origin)
    fresh = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    try:
        workspace = Workspace.init(folder, url=url, origin=origin)
    except ExpungeError:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)  # keys that have signed nothing, and no ledger
        raise
    public = folder / "keys" / "expunge.pub"
    key = key_id(workspace.keys.signing.public_key())
    about = {
        "workspace": str(folder),
        "public_key": str(public),
        "key_id": key,
        "origin": workspace.ledger.log.origin,
        "ledger": str(workspace.ledger.database),
        "checkpoint": str(workspace.root / workspace.config.anchor),
    }
    workspace.close()
    text = (
        f"workspace made in {folder}\n"
        f"public key  {public} (key id {key[:16]}): publish it where owners find it without asking you for it\n"
        f"settings    {folder / 'expunge.toml'}: legal regime, time zone, batches, and the checkpoint's place\n"
        f"back up     {folder / 'keys'} now, apart from the ledger: without it nothing can be signed\n"
        f"next        expunge register-model NAME FOLDER --data ... --workspace {folder}"
    )
    say(as_json, about, text)


def _refuse_odd(url: str | None, origin: str | None) -> None:
    """Misuse for a URL that is none, or an origin that no checkpoint can carry."""
    try:
        make_url(url or "sqlite:///ledger.db")
    except ArgumentError:
        raise Misuse("--url must be a database's, as postgresql://user@host/name; it cannot be read as one") from None
    if not (origin is None or (origin and origin.isprintable() and not set(origin) & set(" +"))):
        raise Misuse(f'--origin must be text without spaces and "+", as example.com/erasures, got {origin!r}')


def register_model(
    name: Annotated[str, typer.Argument(help="What requests call the model.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the trained model.")],
    data: Data,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + "; auto: sisa for shards, else retrain.")] = "auto",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, as lr=0.01.")] = None,
    fallback: Annotated[Path | None, typer.Option(help="Folder of a model to serve if this one is retired.")] = None,
    mlflow: Annotated[
        str | None, typer.Option(help="Database of an MLflow registry to serve it too, as sqlite:////srv/mlflow.db.")
    ] = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    workspace: Folder = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Begin to serve a trained model.

    Keeps it under pseudonyms, commits to each of its records, and writes where its data is into expunge.toml.

    \b
    Examples:
      expunge register-model digits models/digits --data mnist
      expunge register-model churn models/churn --data customers.csv --id-column id --label-column churned
    """
    with opened(workspace) as ws:
        if any(known.name == name for known in ws.ledger.models.all()):
            raise Misuse(f'there is a model "{name}" already; choose another name')
        files = [] if data in datasets.names() else [Path(data)]
        for path in (folder, *files, *([fallback] if fallback else []), *([columns] if columns else [])):
            refuse_inside(ws.root, path, _ROWS_OUTSIDE)
        source = Source(
            data=absolute(data),
            id_column=id_column,
            owner_column=owner_column,
            label_column=label_column,
            classes=classes,
            columns=None if columns is None else str(columns.absolute()),
            owners=owners,
            method=method,
            set=tuple(setting or ()),
            fallback=None if fallback is None else str(fallback.absolute()),
            mlflow=mlflow,
        )
        settings = source.settings()
        with progress(quiet or as_json) as show:
            show(f"register {name}", 0, 1)
            trained = load_model(folder, allow_code)
            chosen, _ = source.methods(trained)
            refused = chosen.supports(trained)
            if refused is not None:
                raise refused
            if fallback is not None:
                load_model(fallback, allow_code)
            records = read_records(data, id_column, owner_column, label_column, classes, columns, owners)[0]
            mirror = source.mirror(name)
            served = ws.register(name, trained, records, settings)
            if mirror is not None:
                mirror.serve(mirror.publish(ws.root / served.folder, served.digest, {}))
        about = {
            "model": name,
            "version": served.version,
            "digest": served.digest,
            "records": len(trained.ids),
            "method": chosen.name,
            "claim_at_most": chosen.claim.value,
        }
    text = (
        f"{name} is served, version {served.version}: {len(trained.ids):,} records committed to; "
        f"removal by {chosen.name}, which claims at most: {chosen.claim.value}\n"
        f"{folder} is as it was, and names the ids of its records: delete it yourself\n"
        f"next        expunge request {name} --owner ..."
    )
    say(as_json, about, text)


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """What a run did for one model.

    `left` are requests that it did not get to the end of, `standing` those that were held, withheld or failed before
    it, and still wait for a person.
    """

    done: Progress
    left: tuple[str, ...]
    standing: tuple[str, ...]
    error: ExpungeError | None

    @property
    def good(self) -> bool:
        return self.done.good and not self.left and not self.standing and self.error is None

    def to_json(self) -> dict[str, Any]:
        lists = {"unfinished": list(self.left), "standing": list(self.standing)}
        return {**self.done.to_json(), **lists, "error": self.error and str(self.error)}


def run(
    names: Models = None,
    now: Annotated[bool, typer.Option("--now", help="Begin though the batch policy would wait.")] = False,
    worker: Annotated[str | None, typer.Option(help="A name that no other process has; made up if left out.")] = None,
    workspace: Folder = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Take every request as far as it goes.

    Screens, unlearns, verifies, serves the new model, erases the old one, sweeps and certifies. Goes on with what was
    interrupted. Exit code 1 if a request was held, withheld or failed, or could not be brought to its end.

    \b
    Examples:
      expunge run
      expunge run digits --now --json
    """
    with opened(workspace) as ws:
        chosen = names or [model.name for model in ws.ledger.models.all()]
        if not chosen:
            raise Misuse("no model is served here yet; begin with: expunge register-model NAME FOLDER --data ...")
        for name in chosen:
            ws.ledger.models.served(name)
        who = worker or worker_name()
        with progress(quiet or as_json) as show:
            taken = {name: _take(ws, name, who, now, allow_code, show) for name in dict.fromkeys(chosen)}
        lines = [line for name, one in taken.items() for line in _lines(ws, name, one)]
    good = all(one.good for one in taken.values())
    say(as_json, {"models": {name: one.to_json() for name, one in taken.items()}, "good": good}, "\n".join(lines))
    errors = {name: one.error for name, one in taken.items() if one.error is not None}
    for name, error in errors.items():
        print(f"error: {name}: {' '.join(plain(error).split())}", file=sys.stderr)
    return max([0 if good else 1, *(error.exit_code for error in errors.values())])


def worker_name() -> str:
    """A name that no other process has."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def journey_of(ws: Workspace, name: str, allowed: bool, tell: Tell) -> Journey:
    """The journey of a model, by what expunge.toml says of it."""
    source = Source.of(ws, name)
    tell(f"read {name}", 0, 1)
    method, exact = source.methods(served_model(ws, name, allowed))
    return Journey(
        ws,
        name,
        source.records(),
        method=method,
        exact=exact,
        stages=_stages(ws),
        mirror=source.mirror(name),
        tell=tell,
    )


def _stages(ws: Workspace) -> tuple[Stage, ...]:
    """What the workspace wants done beside unlearning."""
    rate, share = ws.config.policy.screen, ws.config.policy.replay
    stages: list[Stage] = []
    if rate:
        # The seed is the workspace's secret: who knew the benign requests compared with could hide among them.
        seed = ws.keys.coins("screen").initial_seed()
        stages.append(ScreenStage(rate=rate, draws=max(200, least_draws(rate)), seed=seed))
    if share:
        stages.append(VerifyStage(budget=Share(share)))
    return tuple(stages)


def _take(ws: Workspace, name: str, worker: str, now: bool, allowed: bool, tell: Tell) -> _Taken:
    """One model's requests; an error of one model does not keep the others from their deadlines."""
    done, error = Progress(), None
    try:
        done = journey_of(ws, name, allowed, tell).run(worker, now=now)
    except ExpungeError as caught:
        if caught.exit_code == 4:  # of the disk, the database or another worker: the next model would meet it too
            raise
        error = caught
    found = ws.ledger.requests.find(model=name, state=[State.RUNNING, State.VERIFYING])
    waits = ws.ledger.requests.find(model=name, state=[State.HELD, State.WITHHELD, State.FAILED])
    new = {*done.held, *done.withheld, *done.failed}
    standing = tuple(filed.id for filed in waits if filed.id not in new)
    return _Taken(done=done, left=tuple(filed.id for filed in found), standing=standing, error=error)


def _lines(ws: Workspace, name: str, taken: _Taken) -> list[str]:
    counts = {word: len(ids) for word, ids in taken.done.to_json().items() if ids}
    counts |= {"unfinished": len(taken.left)} if taken.left else {}
    said = ", ".join(f"{count:,} {word}" for word, count in counts.items())
    lines = [f"{name}: {said or 'not done' if taken.error else said or 'nothing to do'}"]
    for one in (*taken.done.held, *taken.done.withheld, *taken.done.failed, *taken.standing):
        filed = ws.ledger.requests.get(one)
        lines.append(f"  {filed.state.value} {one}: {plain(filed.why or '')}; see: expunge status {one}")
    if taken.left and taken.error is None:
        wait_s = ws.config.policy.lease_s
        lines.append(f"  another worker holds the run; if it died, run this again in {wait_s:.0f} s")
    elif isinstance(taken.error, Leftovers):
        lines.append("  the new model is served; nothing is certified until nothing is left over")
    if taken.done.waiting:
        lines.append("  waiting for the batch to fill, or for --now")
    return lines
