"""An MLflow model registry as a mirror."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from sqlalchemy.exc import SQLAlchemyError

from expunge.core.digest import sha256_hex
from expunge.core.errors import Misuse, Stopped, UnreadableFile, Unsupported
from expunge.workflow.mirror import PARENT
from expunge.workflow.transcripts import TRANSCRIPT

DIGEST = "state_dict.sha256"
SUPERSEDED = "unlearn.superseded_by"
RETIRED = "unlearn.retired"
CERTIFICATE = "unlearn.certificate"

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_MODEL = re.compile(r"\w[\w .-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COPY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}(\.part)?")
_SILENT = "MLFLOW_DISABLE_TELEMETRY"


@dataclass(frozen=True, kw_only=True)
class MlflowMirror:
    """One registered model of an MLflow registry; its versions are the models published from here.

    Ours is a version with a tag ``state_dict.sha256``. Every other version of the registered model is outside: it is
    never changed, deleted or named, whatever rows it remembers, and whoever made it must retire it. So are copies that
    others have fetched, and backups of the database.

    Deleting is MLflow's: its database keeps the row of a deleted version, with its tags, times and the place where its
    files lay, marked as deleted; and any alias of a deleted version goes with it.

    The saved folder is published whole, with `trained.json`, which names records by their ids, those gone too.

    Not guaranteed: anything if two processes publish the same model at once; durability of the copied files at a power
    failure. MLflow's usage statistics are left off if it is first imported here. Cost: a second or two for that
    import; then each call reads all versions of the model, and publishing reads, and may copy, the folder.

    Attributes:
        model: name of the registered model, which is made if it is not there.
        tracking_uri: address of the MLflow tracking database.
        registry_uri: address of the registry's database, if another. It must be a database: a server takes no folder.
        alias: what those who fetch ask for.
        artifacts: a local folder of this mirror alone, to copy the models' files to; retiring deletes them there.
            None if versions point at the folders given to `publish`, which their owner must delete.

    Raises:
        Unsupported: if MLflow is not installed, or the registry is no database.
        Misuse: if the name is none for a registered model and for a folder.
    """

    model: str
    tracking_uri: str = field(repr=False)
    registry_uri: str | None = field(default=None, repr=False)
    alias: str = "champion"
    artifacts: Path | None = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise Unsupported("a mirror in MLflow needs mlflow, which is missing; run: pip install 'expunge[mlflow]'")
        if not _MODEL.fullmatch(self.model):
            raise Misuse(f"model must be letters, digits, blanks, dots and dashes, got {self.model!r}; rename it")
        scheme = urlparse(self._registry).scheme.partition("+")[0]
        if scheme not in _DATABASES:
            raise Unsupported(
                f'an MLflow registry at "{scheme}:" takes no folder of this disk; give the address of its database'
            )

    @property
    def name(self) -> str:
        """What it is called in records, such as "mlflow:credit"."""
        return f"mlflow:{self.model}"

    def publish(self, folder: Path, digest: str, tags: Mapping[str, str]) -> str:
        """Offer a saved model as a version with all its tags, not served yet; the version's number.

        A version of ours with this digest and parent that nothing has superseded is that version, and gets the tags
        that it lacks.

        Raises:
            Misuse: if the folder holds another model, if the tags are not the caller's to set, or if the version is
                there already with its files elsewhere.
            Stopped: if the registry or the disk does not do it; call again.
        """
        wanted = _tags_of(folder, digest, tags)
        with self._asking() as client:
            source = self._place(folder, f"{digest}-{sha256_hex(wanted.get(PARENT, '').encode())[:16]}")
            self._ensure_model(client)
            there = [one for one in self._ours(client) if _is_same(one, wanted)]
            if not there:
                return str(client.create_model_version(self.model, source=source, tags=wanted).version)
            version = str(there[0].version)
            if there[0].source != source:
                raise Misuse(f"{self.name}/{version} holds this model at {there[0].source}; publish it from there")
            for key, value in wanted.items():
                if there[0].tags.get(key) != value:
                    client.set_model_version_tag(self.model, version, key, value)
            return version

    def serve(self, version: str) -> None:
        """Move the alias to a version of ours.

        Raises:
            Misuse: if it is not there, or superseded.
            Stopped: if the registry does not do it; call again.
        """
        with self._asking() as client:
            chosen = self._find(self._ours(client), version)
            if SUPERSEDED in chosen.tags:
                raise Misuse(f"{self.name}/{version} is superseded by {chosen.tags[SUPERSEDED]}; serve that one")
            if self._served(client) != version:
                client.set_registered_model_alias(self.model, self.alias, version)

    def retire(self, keep: str) -> tuple[str, ...]:
        """Delete all versions of ours but one, and every copy in `artifacts` but that one's.

        They are marked as superseded first; then go the files, then the versions. Files that were not copied by this
        mirror stay: see `artifacts`.

        Returns:
            All that were ever retired for the one kept, such as "mlflow:credit/3", in order; the same when asked again.

        Raises:
            Misuse: if the one to keep is not ours, or does not carry the alias; if copies lie outside of `artifacts`.
            Stopped: if the registry or the disk does not do it; call again.
        """
        with self._asking() as client:
            ours = self._ours(client)
            kept = self._find(ours, keep)
            served = self._served(client)
            if served != keep:
                raise Misuse(f"{self.alias} of {self.name} is {served or 'none'}, not {keep}; serve that one first")
            self._refuse_lost_copies(ours)
            old = [str(one.version) for one in ours if one is not kept]
            retired = sorted({*kept.tags.get(RETIRED, "").split(","), *old} - {""}, key=int)
            if old:
                client.set_model_version_tag(self.model, keep, RETIRED, ",".join(retired))
            for version in old:
                client.set_model_version_tag(self.model, version, SUPERSEDED, keep)
            self._sweep(kept.source)
            for version in old:
                client.delete_model_version(self.model, version)
            return tuple(f"{self.name}/{version}" for version in retired)

    def certify(self, version: str, certificate: str) -> None:
        """Tag a version of ours with the SHA-256 of its certificate; the last one given stays.

        Raises:
            Misuse: if the version is not there, or this is no SHA-256.
            Stopped: if the registry does not do it; call again.
        """
        if not _SHA256.fullmatch(certificate):
            raise Misuse(f"a certificate is named by 64 hexadecimal digits, its SHA-256, got {certificate[:80]!r}")
        with self._asking() as client:
            if self._find(self._ours(client), version).tags.get(CERTIFICATE) != certificate:
                client.set_model_version_tag(self.model, version, CERTIFICATE, certificate)

    @property
    def _registry(self) -> str:
        return self.registry_uri or self.tracking_uri

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """A client; what MLflow or the disk refuses inside becomes one line that says how to go on."""
        refused = _mlflow("mlflow.exceptions").MlflowException
        try:
            yield connect(self.tracking_uri, self._registry)
        except (refused, SQLAlchemyError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise Stopped(f"{self.name} did not do it ({reason}); run it again, nothing is done twice") from error

    def _ensure_model(self, client: Any) -> None:
        try:
            client.get_registered_model(self.model)
        except _mlflow("mlflow.exceptions").MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            client.create_registered_model(self.model)

    def _ours(self, client: Any) -> list[Any]:
        """The versions published from here, oldest first."""
        found: list[Any] = []
        token = None
        while True:
            page = client.search_model_versions(f"name = '{self.model}'", page_token=token)
            found += [one for one in page if DIGEST in one.tags]
            token = page.token
            if not token:
                return sorted(found, key=lambda one: int(one.version))

    def _find(self, ours: list[Any], version: str) -> Any:
        for one in ours:
            if str(one.version) == version:
                return one
        known = ", ".join(str(one.version) for one in ours) or "none"
        raise Misuse(f"{self.name} has no version {version!r} that was published from here; it has {known}")

    def _served(self, client: Any) -> str:
        """The version that carries the alias, empty if none does."""
        return str(client.get_registered_model(self.model).aliases.get(self.alias, ""))

    def _place(self, folder: Path, key: str) -> str:
        """Where the version's files are; the copy appears whole or not at all."""
        if self.artifacts is None:
            return folder.resolve().as_uri()
        target = self.artifacts.resolve() / self.model / key
        if not target.is_dir():
            part = target.with_name(f"{key}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(folder, part, ignore=lambda _, names: {TRANSCRIPT} & set(names))  # that is for auditors
            os.replace(part, target)
        return target.as_uri()

    def _refuse_lost_copies(self, ours: list[Any]) -> None:
        """A copy that this mirror would not find must not be forgotten with its version."""
        shelf = None if self.artifacts is None else self.artifacts.resolve() / self.model
        for one in ours:
            path = _path_of(one.source)
            if path is not None and _COPY.fullmatch(path.name) and path.parent != shelf:
                raise Misuse(
                    f"the files of {self.name}/{one.version} were copied to {path}; give artifacts={path.parent.parent}"
                )

    def _sweep(self, kept: str) -> None:
        """Delete all copies but one: those that a crash left without a version as well."""
        if self.artifacts is None or not (self.artifacts / self.model).is_dir():
            return
        stays = _path_of(kept)
        for path in sorted((self.artifacts.resolve() / self.model).iterdir(), reverse=True):  # a .part before its whole
            if _COPY.fullmatch(path.name) and path != stays:
                half = path.with_name(path.name.removesuffix(".part") + ".part")
                os.replace(path, half)  # a copy that is half deleted must never pass for a whole one
                shutil.rmtree(half)


def connect(tracking_uri: str, registry_uri: str) -> Any:
    """A client of MLflow; nothing but these two addresses decides where it asks."""
    mlflow = _mlflow("mlflow")
    with warnings.catch_warnings():
        # MLflow's tables use what SQLAlchemy 2.1 deprecates, which is not the caller's to mend.
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning)
        return mlflow.MlflowClient(tracking_uri=tracking_uri, registry_uri=registry_uri)


def _mlflow(name: str) -> Any:
    """A module of MLflow, imported so that it sends no usage statistics, unless it was imported before."""
    before = os.environ.get(_SILENT)
    os.environ[_SILENT] = "true"  # read at import: else it writes to the home folder, and calls its makers later
    try:
        return importlib.import_module(name)
    finally:
        os.environ.pop(_SILENT)
        if before is not None:
            os.environ[_SILENT] = before


def _tags_of(folder: Path, digest: str, tags: Mapping[str, str]) -> dict[str, str]:
    """All tags of the version, once the folder is seen to hold the model that they speak of."""
    taken = sorted({DIGEST, SUPERSEDED, RETIRED, CERTIFICATE} & set(tags))
    if taken:
        raise Misuse(f'the tag "{taken[0]}" is set by the mirror; leave it out')
    if not _SHA256.fullmatch(digest):
        raise Misuse(f"digest must be 64 hexadecimal digits, got {digest[:80]!r}; give that of Trained.digest()")
    try:
        held = json.loads((folder / "trained.json").read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableFile(f"{folder} is no saved model ({error}); make one with Trained.save") from None
    if held != digest:
        raise Misuse(f"{folder} holds the model {held}, not {digest}; give the folder of the one to publish")
    return {**tags, DIGEST: digest}


def _is_same(one: Any, wanted: Mapping[str, str]) -> bool:
    tags = one.tags
    return SUPERSEDED not in tags and all(tags.get(key, "") == wanted.get(key, "") for key in (DIGEST, PARENT))


def _path_of(source: str) -> Path | None:
    """The local path of a version's files, None if they are not on this disk."""
    parsed = urlparse(source)
    return Path(url2pathname(parsed.path)) if parsed.scheme == "file" else None
