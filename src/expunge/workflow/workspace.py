"""A workspace: one folder with settings, keys, ledger, models and artefacts, in which requests are honoured."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from expunge.core.errors import Corrupt, Misuse, UnreadableFile, Unwritable
from expunge.core.records import Records, seal
from expunge.core.request import Request
from expunge.core.store import Store, write_atomically
from expunge.core.trained import Trained
from expunge.learn.training import load
from expunge.ledger.check import canonical
from expunge.ledger.keys import Keys
from expunge.ledger.ledger import Ledger
from expunge.ledger.models import Served
from expunge.ledger.requests import Filed, Submission
from expunge.workflow.config import TEMPLATE, Config
from expunge.workflow.transcripts import move_in

SETTINGS = "expunge.toml"


class Workspace:
    """A folder in which models are served and requests honoured. Holds pseudonyms, never ids, of records.

    Attributes:
        root: the folder.
        config: its settings.
        keys: what signs and names.
        ledger: requests, events, certificates.
        store: artefacts, each with the pseudonyms of the records that it derives from.
    """

    def __init__(self, root: str | Path, **injected: Any) -> None:
        """Open a workspace; see `Ledger` for errors. `injected` replaces the ledger's time, ids and keys in tests."""
        self.root = Path(root)
        self.config = Config.read(self.root / SETTINGS)
        self.keys = injected.pop("keys", None) or Keys.load(self.root / "keys")
        self.ledger = Ledger(
            self._url(),
            self.keys,
            origin=self.config.origin,
            anchor=self.root / self.config.anchor,
            clock=self.config.clock,
            **injected,
        )
        self.store = Store(self.root / "store")

    @classmethod
    def init(cls, root: str | Path, *, url: str | None = None, origin: str | None = None, **injected: Any) -> Workspace:
        """Make a workspace in a new or empty folder, with keys of its own.

        Args:
            root: the folder.
            url: of the ledger's database; a SQLite file in the folder if None.
            origin: the log's name; ``expunge/`` and some random digits if None.

        Raises:
            Misuse: if the folder holds a workspace, or other files, already.
        """
        root = Path(root)
        name = origin or f"expunge/{secrets.token_hex(6)}"
        if not name.isprintable() or " " in name or "+" in name:
            raise Misuse(f"the log's name stands on checkpoints: no spaces, line breaks or plus signs, got {name!r}")
        refuse_url(url or "sqlite:///ledger.db")
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise Misuse(f"{root} is not empty; name a new folder for the workspace")
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
        keys = injected.get("keys") or Keys.generate()
        keys.save(root / "keys")
        settings = TEMPLATE.format(url=json.dumps(url or "sqlite:///ledger.db"), origin=json.dumps(name))
        write_atomically(root / SETTINGS, settings.encode("utf-8"))  # last: from now on it is a workspace
        return cls(root, **injected)

    def _url(self) -> str:
        refuse_url(self.config.url)
        url = make_url(self.config.url)
        if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).is_absolute():
            url = url.set(database=str((self.root / url.database).resolve()))
        return url.render_as_string(hide_password=False)

    def register(
        self, name: str, trained: Trained, records: Records, settings: Mapping[str, Any] | None = None
    ) -> Served:
        """Begin to serve a model: keeps it under pseudonyms, commits to its records, anchors their set in the log.

        Args:
            name: letters, digits, hyphens and underscores.
            trained: the model; its training log of batches is not kept.
            records: its data set; only the records that it stands on are committed to.
            settings: written into expunge.toml as ``[models.NAME]``.

        Raises:
            Misuse: if the name is taken or unusable, or the records are not those that the model was trained on.
        """
        if not re.fullmatch("[A-Za-z0-9_-]{1,80}", name):
            raise Misuse(f'a model is called by letters, digits, "-" and "_", 80 at most, got {name[:90]!a}')
        if any(one.name == name for one in self.ledger.models.all()):
            raise Misuse(f'there is a model "{name}" already; choose another name')
        standing = records.take(sorted(trained.ids))
        if trained.seal is not None and seal(standing, salt=trained.seal.partition(":")[0]) != trained.seal:
            raise Misuse(
                "these are not the records that the model was trained on: under the same ids, content or owners "
                "differ; give the same data, read with the same options"
            )
        folder = f"models/{name}/v0001"
        if (self.root / folder).exists():  # of a registration that did not get to its end, or is going on
            folder += f"-{secrets.token_hex(4)}"
        if settings is not None:
            self._write_settings(name, settings)  # first: settings of no model say nothing, a model without cannot run
        self.keep(_without_batches(trained), folder)
        self.ledger.models.register(name, trained.digest(), folder, standing)
        for path in (self.root / folder).parent.iterdir():  # the name is ours now, so these were interrupted
            if path != self.root / folder:
                shutil.rmtree(path, ignore_errors=True)
        return self.ledger.models.served(name)

    def _write_settings(self, name: str, settings: Mapping[str, Any]) -> None:
        """Write ``[models.NAME]``, in the stead of one that an interrupted registration left."""
        path = self.root / SETTINGS
        text, section = path.read_text(encoding="utf-8"), f"[models.{name}]"
        before, there, rest = text.partition(f"\n{section}\n")
        if there:
            text = before + ("\n[" + rest.partition("\n[")[2] if "\n[" in rest else "")
        new = text.rstrip("\n") + "\n" + _section(section, settings)
        try:
            tomllib.loads(new)
        except tomllib.TOMLDecodeError as error:
            raise Misuse(f"{path.name} cannot keep the settings of {name} ({error}); rename what they name") from None
        write_atomically(path, new.encode("utf-8"))
        self.config = Config.read(path)

    def keep(self, trained: Trained, folder: str, told: Path | None = None) -> None:
        """Save a model below the workspace, durably, its records under their pseudonyms.

        Args:
            trained: the model.
            folder: a new one, below the workspace.
            told: the transcript of its training, which is moved in beside it.

        Raises:
            Unwritable: if the disk is full or read-only, or the transcript is gone.
        """
        try:
            saved = trained.renamed(self.keys.pseudonym).save(self.root / folder)
            if told is not None:
                move_in(told, saved)
            _sync(saved)
        except (OSError, SafetensorError) as error:
            raise Unwritable(f"the model could not be saved in {self.root / folder} ({error}); make room") from error

    def names(self, records: Records) -> dict[str, str]:
        """The id behind each pseudonym, of these records. Cost: about 2 microseconds a record."""
        return {self.keys.pseudonym(record_id): record_id for record_id in records.ids}

    def load(self, name: str, records: Records) -> Trained:
        """The model that is served, with the ids of its records.

        Records that are gone and no longer in `records` keep their pseudonyms.

        Raises:
            Corrupt: if it is not the model that the ledger says is served.
            Misuse: if `records` lacks some that the model stands on.
        """
        return self.serving(name, self.names(records))

    def serving(self, name: str, real: Mapping[str, str]) -> Trained:
        """The same, with the ids behind pseudonyms given; see `load` for errors."""
        while True:
            served = self.ledger.models.served(name)
            try:
                return self.read(served.folder, served.digest, real)
            except Corrupt:  # a worker may have served another meanwhile, and deleted this one
                if self.ledger.models.served(name) == served:
                    raise

    def read(self, folder: str, digest: str, real: Mapping[str, str]) -> Trained:
        """A model that `keep` kept, with the ids behind its pseudonyms; Corrupt if it is not the one of this digest."""
        try:
            kept = load(self.root / folder)
        except (UnreadableFile, OSError, SafetensorError) as error:
            raise Corrupt(f"the model in {self.root / folder} cannot be read: {error}") from None
        if kept.digest() != digest:
            raise Corrupt(f"the model in {self.root / folder} is not the one that the ledger names; restore it")
        lost = [name for name in kept.ids if name not in real]
        if lost:
            raise Misuse(f"the model stands on {len(lost):,} records that are not given; give the whole data set")
        return kept.renamed(lambda name: real.get(name, name))

    def file(self, model: str, request: Request, *, key: str = "", identified: bool = True) -> tuple[Filed, bool]:
        """File a request about a model. Returns it, and whether it is new (not filed before under this key)."""
        self.ledger.models.served(model)
        return self.ledger.requests.submit(submission(model, request, key=key, identified=identified))

    def asked(self, request_id: str) -> Request:
        """What was asked; UnknownRecord once it has been erased."""
        return Request.from_json({**_NO_TIMES, **json.loads(self.ledger.requests.body(request_id))})

    def close(self) -> None:
        """Let go of the ledger."""
        self.ledger.close()


def refuse_url(url: str) -> None:
    """Misuse for text that names no database."""
    try:
        make_url(url)
    except ArgumentError:
        raise Misuse(f'"{url}" names no database; give sqlite:///ledger.db or postgresql://user@host/name') from None


def _sync(folder: Path) -> None:
    """Let a saved folder outlive a loss of power: after it the ledger says that this model is served."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


_NO_TIMES = {"received_at": None, "due_at": None}


def submission(model: str, request: Request, *, key: str = "", identified: bool = True) -> Submission:
    """A request as the ledger takes it; a key given goes before the request's own."""
    return Submission(
        model=model,
        kind=request.kind,
        body=canonical(_without_times(request.to_json())),
        key=key or request.key,
        received_at=request.received_at,
        identified=identified,
    )


def _without_times(data: dict[str, Any]) -> dict[str, Any]:
    """The same request sent again is the same, though it arrives later."""
    return {name: value for name, value in data.items() if name not in _NO_TIMES}


def _section(name: str, settings: Mapping[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items() if value is not None]
    return "\n".join(["", name, *lines, ""])


def _without_batches(trained: Trained) -> Trained:
    """The same model without the ids of its batches, whole and in parts."""
    log = None if trained.log is None else replace(trained.log, batches=())
    return replace(trained, log=log, parts=tuple(map(_without_batches, trained.parts)))
