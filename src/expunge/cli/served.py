"""What expunge.toml says of a served model: where its rows come from, and how they are removed."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from expunge import datasets
from expunge.cli.inputs import load_model, make_method, read_records
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.unlearn import Method, Retrain, Sisa
from expunge.workflow import Mirror, Workspace


@dataclass(frozen=True, kw_only=True)
class Source:
    """The options of one model, as `register-model` took them; paths are absolute.

    Attributes:
        data: a data set's name, a file or a folder.
        id_column, owner_column, label_column, classes, columns, owners: how to read it.
        method: word for the method; ``auto`` is the exact one that fits.
        set: settings of the method, as ``name=value``.
        fallback: folder of a model that may be served in this one's stead.
        mlflow: address of the database of an MLflow registry that is to serve the model too, under the same name.
    """

    data: str
    id_column: str | None = None
    owner_column: str | None = None
    label_column: str | None = None
    classes: str | None = None
    columns: str | None = None
    owners: int | None = None
    method: str = "auto"
    set: tuple[str, ...] = ()
    fallback: str | None = None
    mlflow: str | None = None

    @classmethod
    def of(cls, workspace: Workspace, name: str) -> Source:
        """The settings of a model; Misuse if there are none, or one that cannot be meant."""
        workspace.ledger.models.served(name)
        said = dict(workspace.config.models.get(name, {}))
        where = f"[models.{name}] of {workspace.root / 'expunge.toml'}"
        odd = set(said) - {one.name for one in fields(cls)}
        if odd:
            known = ", ".join(one.name for one in fields(cls))
            raise Misuse(f'{where} has an unknown setting "{min(odd)}"; it has {known}')
        if not isinstance(said.get("data"), str):
            raise Misuse(f'{where} must say where the rows are; write there, say: data = "/data/customers.csv"')
        for key, value in said.items():
            if not _fits(key, value):
                raise Misuse(f"{key} under {where} is of another kind than register-model writes, got {value!r}")
        settings: list[str] = said.pop("set", [])
        return cls(**said, set=tuple(settings))

    def settings(self) -> dict[str, Any]:
        """What is written into expunge.toml; Misuse for text that it cannot hold."""
        said: Mapping[str, Any] = {**asdict(self), "set": list(self.set) or None}
        for key, value in said.items():
            try:
                tomllib.loads(f"x = {json.dumps('' if value is None else value)}")
            except tomllib.TOMLDecodeError:
                raise Misuse(
                    f"{key} holds a character that expunge.toml cannot keep, got {value!r}; rename it"
                ) from None
        return {key: value for key, value in said.items() if value is not None}

    def records(self) -> Records:
        """The rows, read anew."""
        columns = None if self.columns is None else Path(self.columns)
        table = (self.id_column, self.owner_column, self.label_column, self.classes)
        return read_records(self.data, *table, columns, self.owners)[0]

    def methods(self, trained: Trained) -> tuple[Method, Method]:
        """The method of this model, and the exact one for what is in doubt."""
        quick = Sisa()  # not of shards that another build has trained
        exact = quick if quick.supports(trained) is None else Retrain()
        return make_method(self.method, self.set, trained), exact

    def mirror(self, name: str) -> Mirror | None:
        """The registry elsewhere that serves the model too, if one is named."""
        if self.mlflow is None:
            return None
        from expunge.workflow.mlflow import MlflowMirror

        return MlflowMirror(model=name, tracking_uri=self.mlflow)


def _fits(key: str, value: Any) -> bool:
    if key == "set":
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return type(value) is int if key == "owners" else isinstance(value, str)


def absolute(data: str) -> str:
    """The name of a data set as it is, and any path from the root, so that it is found from everywhere."""
    return data if data in datasets.names() else str(Path(data).absolute())


def served_model(workspace: Workspace, name: str, allowed: bool) -> Trained:
    """The model that is served, its records under their pseudonyms."""
    return load_model(workspace.root / workspace.ledger.models.served(name).folder, allowed)
