"""Small workspaces that serve real digits: made once, copied for each test, with a clock that stands still."""

from __future__ import annotations

import base64
import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Generator

from expunge import FineTune, Recipe, Records, Request, Retrain, Sharding, Sisa, Trained, datasets, train
from expunge.core.protocols import Job, NotDone, Passed
from expunge.ledger import check
from expunge.ledger.requests import Filed
from expunge.unlearn.method import Done, Task
from expunge.workflow import Journey, Progress, Workspace
from tests.ledger.kit import DAY_S, KEYS, Time

__all__ = ["DAY_S", "KEYS", "Time"]

MODEL = "digits"
HOUR_S = 3600.0


@cache
def digits(many: int = 160, owners: int = 40) -> Records:
    """The first digits of optdigits, of artificial owners."""
    return datasets.get("optdigits", owners=owners).train.select(range(many))


def recipe(**more: Any) -> Recipe:
    """A softmax regression that trains in milliseconds."""
    given = {"model": "softmax", "epochs": 2, "batch_size": 32, "optimiser_args": {"lr": 0.01}, **more}
    return Recipe(**given)


_KINDS: dict[str, dict[str, Any]] = {
    "shards": {"sharding": Sharding(shards=4)},
    "slices": {"sharding": Sharding(shards=3, slices=3)},
    "whole": {},
    "mlp": {"model": "mlp", "model_args": {"hidden": [8]}, "sharding": Sharding(shards=4)},
}


@cache
def trained(kind: str = "shards") -> Trained:
    """A model of this kind, trained on all `digits`."""
    return from_scratch(recipe(**_KINDS[kind]), digits())


def from_scratch(how: Recipe, records: Records) -> Trained:
    """Training anew, whatever it thinks of the sizes of the shards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(how, records)


def owners_of(records: Records) -> list[str]:
    """The owners, those with most records first."""
    return sorted(set(records.owners), key=lambda owner: (-records.owners.count(owner), owner))


class Place:
    """A workspace that serves one model, its clock, and the journey of its requests."""

    def __init__(self, root: Path, records: Records, **injected: Any) -> None:
        self.root, self.records = root, records
        self.time = injected.pop("now", None) or Time()
        self.workspace = Workspace(root, now=self.time, **injected)
        self.ledger = self.workspace.ledger
        whole = not self.workspace.load(MODEL, records).parts
        self.method: Any = Retrain() if whole else Sisa()

    def ask(self, request: Request, key: str = "", **how: Any) -> str:
        """File a request; its id."""
        return self.workspace.file(MODEL, request, key=key, **how)[0].id

    def journey(self, **given: Any) -> Journey:
        """The journey of the model's requests."""
        records = given.pop("records", self.records)
        return Journey(self.workspace, MODEL, records, **{"method": self.method, "exact": Retrain(), **given})

    def run(self, worker: str = "w", *, now: bool = False, **given: Any) -> Progress:
        """Take all requests as far as they go."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)  # shards that are uneven once rows have gone
            return self.journey(**given).run(worker, now=now)

    def honour(self, request: Request, **given: Any) -> str:
        """File a request and carry it out at once; its id."""
        asked = self.ask(request)
        assert self.run(**given).completed == (asked,)
        return asked

    def filed(self, request: str) -> Filed:
        """Where a request stands."""
        return self.ledger.requests.get(request)

    def state(self, request: str) -> str:
        """The state of a request."""
        return self.filed(request).state.value

    def served(self) -> Trained:
        """The model that is served."""
        return self.workspace.load(MODEL, self.records)

    def said(self, request: str) -> dict[str, Any]:
        """What the certificate of a request says, once its signature is found good."""
        predicate: dict[str, Any] = self.statement(request)["predicate"]
        return predicate

    def statement(self, request: str) -> dict[str, Any]:
        """The whole statement."""
        return self.ledger.certificates.get(request).statement(self.workspace.keys)

    def checked(self, request: str) -> check.Checked:
        """What the checker finds of the bundle of a request."""
        return check.check_bundle(self.ledger.certificates.bundle(request), self.workspace.keys.trusted)

    def stages(self, request: str) -> dict[str, str]:
        """The outcome of each stage, as the certificate has it."""
        return {stage["name"]: stage["outcome"] for stage in self.said(request)["stages"]}

    def kinds(self, request: str | None = None) -> list[str]:
        """The events of a request, or all."""
        return [entry.kind for entry in self.ledger.log.entries(request)]

    def versions(self) -> list[str]:
        """The folders of the model's versions."""
        return sorted(path.name for path in (self.root / "models" / MODEL).iterdir())

    def sound(self) -> bool:
        """Whether the ledger agrees with itself."""
        found = self.ledger.verify()
        assert found == []
        return True

    def close(self) -> None:
        """Let go of the ledger."""
        self.workspace.close()


def settle(root: Path, **settings: object) -> None:
    """Change settings in a workspace's file."""
    path = root / "expunge.toml"
    text = path.read_text(encoding="utf-8")
    for name, value in settings.items():
        text, many = re.subn(rf"(?m)^{name} = .*$", f"{name} = {json.dumps(value)}", text)
        assert many == 1, name
    path.write_text(text, encoding="utf-8")


@dataclass
class Says:
    """A stage that says what it is told to, one thing after another and the last for ever; or raises it."""

    name: str
    outcomes: Sequence[Any] = (Passed(why="fine"),)
    jobs: list[Job] = field(default_factory=list)

    def __call__(self, job: Job, *, rng: Generator) -> Any:
        self.jobs.append(job)
        said = self.outcomes[min(len(self.jobs), len(self.outcomes)) - 1]
        if isinstance(said, BaseException):
            raise said
        return said


def nothing() -> NotDone:
    """What a stage says that could not be done."""
    return NotDone(why="its program is not installed")


@dataclass(frozen=True, kw_only=True)
class CountedSisa(Sisa):
    """Sisa, with a note of every call."""

    calls: list[int] = field(default_factory=list)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        self.calls.append(len(task.forget))
        return super()._apply(task, rng=rng)


@dataclass(frozen=True, kw_only=True)
class CountedRetrain(Retrain):
    """Retrain, with a note of every call."""

    calls: list[int] = field(default_factory=list)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        self.calls.append(len(task.forget))
        return super()._apply(task, rng=rng)


def fine_tune() -> FineTune:
    """A method that claims nothing."""
    return FineTune(epochs=1, lr=0.01)


def files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every path below the folder, and its bytes (none for a folder)."""
    for path in sorted(root.rglob("*")):
        yield str(path.relative_to(root)), path.read_bytes() if path.is_file() else b""


def holding(root: Path, needles: Iterable[bytes]) -> list[tuple[str, bytes]]:
    """Which files below the folder hold which of these byte strings, in their bytes or their names; naively."""
    wanted = sorted(set(needles))
    return [(p, n) for p, data in files(root) for n in wanted if n in data or n in p.encode()]


def traces(records: Records) -> set[bytes]:
    """Byte strings that give rows or their owners away: ids, owners, rows as bytes and as floats, digests."""
    found = {name.encode() for name in (*records.ids, *records.owners)}
    for row, digest in zip(records.x, records.digests(), strict=True):
        for values in (row, row.float(), row.double(), row.float() / 255, row.float() * (1 / 255)):
            found.add(values.contiguous().numpy().tobytes())
        for data in (digest.tobytes(), row.contiguous().numpy().tobytes()):
            found |= {data.hex().encode(), base64.b64encode(data)}
        found.add(digest.tobytes())
        found.add(json.dumps(row.flatten().tolist(), separators=(",", ":"))[1:-1].encode())
    return found


def template(root: Path, kind: str) -> Path:
    """A registered workspace to copy: relative paths inside, nothing open."""
    workspace = Workspace.init(root, keys=KEYS, now=Time())
    workspace.register(MODEL, trained(kind), digits())
    workspace.close()
    return root


def copied(source: Path, root: Path, **settings: object) -> Path:
    """A workspace of the test's own."""
    shutil.copytree(source, root)
    settle(root, **settings)
    return root
