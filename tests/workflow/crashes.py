"""Workers that are killed at any instant, by a program that forks them; and the judge of what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from expunge import Records, Request, Retrain, Sharding, Sisa
from expunge.core.errors import Corrupt, Overtaken
from expunge.ledger import check
from expunge.ledger.failpoints import POINTS
from expunge.ledger.keys import Keys
from expunge.ledger.states import State
from expunge.ledger.tables import certificate, outbox
from expunge.workflow import Journey, Workspace, erasure
from tests.workflow import kit

# A package that carries data installs a top-level `tests`, which would come before a folder.
_PROGRAM = """
import sys, types
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [sys.argv[1]]
from tests.workflow import crashes
crashes.serve()
"""
LEASE_S = 1.0
SHARDS = 4


def records() -> Records:
    """1,000 digits of 400 owners."""
    return kit.digits(1000, 400)


def requests(many: int) -> dict[str, Request]:
    """What is asked, by idempotency key: owners, single records of theirs, and the same owners again."""
    rows = records()
    owners = kit.owners_of(rows)
    made: dict[str, Request] = {}
    for number in range(many):
        owner = owners[number // 4 * 3 + number % 4] if number % 4 < 3 else owners[number // 4 * 3]
        single = number % 8 == 1
        ids = tuple(one for one, of in zip(rows.ids, rows.owners, strict=True) if of == owner)
        made[f"key-{number}"] = Request.remove(ids[:1]) if single else Request.remove_owner(owner)
    return made


class Tapped(Keys):
    """Keys that note every statement that they sign: what has been signed may have left the house."""

    note: Path

    def sign_statement(self, payload: bytes) -> dict[str, Any]:
        """Note it, then sign. A file for each: a kill can cut a line in two where it crosses a page."""
        self.note.mkdir(exist_ok=True)
        (self.note / hashlib.sha256(payload).hexdigest()).touch()
        return super().sign_statement(payload)


def opened(root: Path) -> Workspace:
    """The workspace, its signatures noted beside it."""
    keys = Keys.load(root / "keys")
    tapped = Tapped(keys.signing, keys.pepper)
    object.__setattr__(tapped, "note", _signed(root))
    return Workspace(root, keys=tapped)


def journey(workspace: Workspace, **given: Any) -> Journey:
    """The journey of the requests."""
    return Journey(workspace, kit.MODEL, records(), **{"method": Sisa(), "exact": Retrain(), **given})


def begin(root: Path, url: str | None = None, **settings: object) -> None:
    """A workspace that serves a model, one request to a run and short leases."""
    workspace = Workspace.init(root, url=url)
    how = kit.recipe(sharding=Sharding(shards=SHARDS), epochs=1)
    workspace.register(kit.MODEL, kit.from_scratch(how, records()), records())
    workspace.close()
    text = (root / "expunge.toml").read_text(encoding="utf-8")
    (root / "expunge.toml").write_text(text.replace("[policy]", f"[policy]\nlease_s = {LEASE_S}"), encoding="utf-8")
    kit.settle(root, **{"most": 2, **settings})


def work(root: str, worker: str, seconds: float) -> None:
    """Work until nothing is open, or for so long."""
    workspace, until = opened(Path(root)), time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            journey(workspace).run(worker)
        except Overtaken:
            continue
        if not _open(workspace):
            break
        time.sleep(0.02)  # another worker is at it
    workspace.close()


def file(root: str, keys: Sequence[str], many: int) -> None:
    """File these requests, in order; each may have been filed before."""
    workspace, asked = opened(Path(root)), requests(many)
    for key in keys:
        workspace.file(kit.MODEL, asked[key], key=key)
    workspace.close()


def _open(workspace: Workspace) -> bool:
    return any(filed.state in _UNDONE for filed in workspace.ledger.requests.find())


_UNDONE = frozenset({State.RECEIVED, State.SCREENING, State.PENDING, State.RUNNING, State.VERIFYING})


def _signed(root: Path) -> Path:
    return root.with_name(root.name + "-signed")


@dataclass(frozen=True)
class Job:
    """A process to start: a function of this module, and what is done to it, in seconds from the start."""

    what: Callable[..., None]
    given: Mapping[str, Any]
    kill_s: float | None = None
    sends: int = signal.SIGKILL
    fail_at: str | None = None
    stop_s: float | None = None
    stopped_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {**vars(self), "what": self.what.__name__}


class Forker:
    """A process that has imported all that a worker needs; every job is a fork of it, and so starts at once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def play(self, *jobs: Job) -> list[str]:
        """Start these at once; how each ended: ``done``, ``killed``, or the traceback."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([job.to_json() for job in jobs]) + "\n")
        self.process.stdin.flush()
        ended: list[str] = json.loads(self.process.stdout.readline())
        return ended

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def serve() -> None:
    """Fork what is asked for on standard input, until it ends."""
    import psycopg  # noqa: F401  # now, and not in every fork
    import torch
    import torch._dynamo

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    records().digests()
    for line in sys.stdin:
        print(json.dumps(_play(json.loads(line))), flush=True)


def _play(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    begun = time.monotonic()
    started = [_fork(job) for job in jobs]
    signals = []
    for (pid, _), job in zip(started, jobs, strict=True):
        if job["kill_s"] is not None:
            signals.append((job["kill_s"], pid, job["sends"]))
        if job["stop_s"] is not None:
            signals.append((job["stop_s"], pid, signal.SIGSTOP))
            signals.append((job["stop_s"] + job["stopped_s"], pid, signal.SIGCONT))
    for at, pid, which in sorted(signals):
        time.sleep(max(0.0, begun + at - time.monotonic()))
        os.kill(pid, which)  # a process that ended is there until it is waited for
    return [_ended(pid, said) for pid, said in started]


def _ended(pid: int, said: int) -> str:
    with os.fdopen(said, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return "killed" if os.WIFSIGNALED(status) else text


def _fork(job: Mapping[str, Any]) -> tuple[int, int]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, ours
    said = "done"
    try:
        os.close(ours)
        _do(job)
    except KeyboardInterrupt:
        said = "interrupted"
    except BaseException:  # noqa: BLE001
        said = traceback.format_exc()
    finally:
        os.write(theirs, said.encode("utf-8")[-60_000:])
        os._exit(0)


def _do(job: Mapping[str, Any]) -> None:
    if job["fail_at"] is not None:
        os.environ["EXPUNGE_FAIL_AT"] = job["fail_at"]
    if job["sends"] == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _DO[job["what"]](**job["given"])


@dataclass
class Tally:
    """What a loop did."""

    kills: Counter[str] = field(default_factory=Counter)
    stops: int = 0
    rounds: int = 0
    errors: list[str] = field(default_factory=list)


def crash(forker: Forker, root: Path, *, kills: int, seed: int) -> tuple[Tally, dict[str, Request]]:
    """Kill workers so many times, while requests are filed, then let two finish; what was done, and what was asked."""
    rng, tally, many = random.Random(seed), Tally(), 2 * kills + 40
    asked, filed, quiet = requests(many), 4, 0
    while tally.kills["worker"] < kills or not all(tally.kills[point] for point in POINTS):
        if filed == many:
            raise RuntimeError(f"after {tally.rounds} rounds only {tally.kills}")
        jobs = _round(root, rng, tally, list(asked)[:filed], many, quiet)
        ended = forker.play(*jobs)
        filed += ended[0] == "done"  # nothing is open
        quiet = quiet + 1 if ended[0] == "done" else 0
        for job, how in zip(jobs, ended, strict=True):
            _count(tally, job, how)
        tally.rounds += 1
    asked = dict(list(asked.items())[: max(filed, 12)])
    last = [Job(file, {"root": str(root), "keys": list(asked), "many": many})]
    last += [Job(work, {"root": str(root), "worker": name, "seconds": 60.0}) for name in ("a", "b")]
    for jobs in ([last[0]], last[1:], last[1:2]):
        for job, how in zip(jobs, forker.play(*jobs), strict=True):
            _count(tally, job, how)
    return tally, asked


def _round(root: Path, rng: random.Random, tally: Tally, keys: Sequence[str], many: int, quiet: int) -> list[Job]:
    """A worker that is killed, at an instant or at a named point; sometimes beside a second one; and who files.

    A worker that was done before its end came meets it earlier the next time: `quiet` is how many in a row were. So a
    quick machine has as many kills as a slow one.
    """
    number, base = tally.rounds, {"root": str(root)}
    one = {**base, "worker": "a", "seconds": 2.0}
    if number % 3:
        point = min(POINTS, key=lambda point: tally.kills[point])
        jobs = [Job(work, one, fail_at=f"{point}:{rng.randint(1, max(1, _OFTEN.get(point, 2) >> quiet))}")]
    else:
        how = signal.SIGINT if number % 9 == 6 else signal.SIGKILL
        jobs = [Job(work, one, kill_s=rng.uniform(0.0, 0.9 * 0.7**quiet), sends=how)]
    if number % 5 == 1:
        other = {**base, "worker": "b", "seconds": 1.0}
        jobs.append(Job(work, other, stop_s=rng.uniform(0.1, 0.6), stopped_s=1.5 * LEASE_S))
    filing = {**base, "keys": keys[-4:], "many": many}
    jobs.append(Job(file, filing, kill_s=rng.uniform(0.0, 0.2) if number % 4 == 3 else None))
    return jobs


_OFTEN = {"before update": 10, "before commit": 10, "after commit": 10}
"""How often in a run a worker comes there; elsewhere once a run."""


def _count(tally: Tally, job: Job, ended: str) -> None:
    tally.stops += job.stop_s is not None
    if ended == "interrupted":
        tally.kills["Ctrl-C"] += 1
    elif ended == "killed":
        tally.kills["filer" if job.what is file else "worker"] += 1
        tally.kills[job.fail_at.partition(":")[0] if job.fail_at else "an instant"] += 1
    elif ended != "done":
        tally.errors.append(ended)


def faults(root: Path, asked: Mapping[str, Request]) -> Iterator[str]:
    """The judge: what is wrong with a workspace in which all that was asked should be done, one line each."""
    workspace = Workspace(root)
    try:
        yield from workspace.ledger.verify()
        yield from _of_requests(workspace, asked)
        yield from _of_certificates(workspace)
        yield from _of_the_model(workspace, asked)
        yield from _of_files(workspace)
    finally:
        workspace.close()


def _of_requests(workspace: Workspace, asked: Mapping[str, Request]) -> Iterator[str]:
    ledger = workspace.ledger
    filed = {key: ledger.requests.by_key(key) for key in asked}
    yield from (f"{key} was lost" for key, one in filed.items() if one is None)
    if len(ledger.requests.find()) != len(asked):
        yield f"{len(asked)} keys made {len(ledger.requests.find())} requests"
    with ledger.database.read() as connection:
        told = Counter(connection.execute(sa.select(outbox.c.request).where(outbox.c.topic == "completed")).scalars())
    for key, one in filed.items():
        if one is None:
            continue
        completions = [entry for entry in ledger.log.entries(one.id) if entry.kind == "completed"]
        if (one.state, len(completions), told[one.id]) != (State.COMPLETED, 1, 1):
            yield f"{key} is {one.state}, was completed {len(completions)} times and told {told[one.id]} times"
        elif not (checked := check.check_bundle(ledger.certificates.bundle(one.id), workspace.keys.trusted)).passed:
            yield f"{key}: {checked}"


def _of_certificates(workspace: Workspace) -> Iterator[str]:
    with workspace.ledger.database.read() as connection:
        rows = connection.execute(sa.select(certificate).order_by(certificate.c.idx)).all()
    removed = Counter(one for row in rows for one in json.loads(bytes(row.removed)))
    yield from (f"{one[:8]} was certified {times} times" for one, times in removed.items() if times > 1)
    with workspace.ledger.database.read() as connection:
        gone = len(workspace.ledger.commitments.gone(connection, kit.MODEL))
    if len(removed) != gone:
        yield f"{gone} records are gone and {len(removed)} are certified"
    note, fixed = _signed(workspace.root), {hashlib.sha256(bytes(row.payload)).hexdigest() for row in rows}
    signed = {path.name for path in note.iterdir()} if note.exists() else set()
    yield from (f"{one[:8]} was signed, and is no certificate" for one in sorted(signed - fixed))
    served = workspace.ledger.models.served(kit.MODEL)
    last = json.loads(bytes(rows[-1].payload))["subject"][0] if rows else {"digest": {"sha256": served.digest}}
    if last["digest"]["sha256"] != served.digest:
        yield "the served model is not the subject of the last certificate"


def _of_the_model(workspace: Workspace, asked: Mapping[str, Request]) -> Iterator[str]:
    rows = records()
    try:
        served = workspace.load(kit.MODEL, rows)
    except Corrupt as error:
        yield str(error)
        return
    wanted = {
        name
        for request in asked.values()
        for name, owner in zip(rows.ids, rows.owners, strict=True)
        if name in request.ids or owner == request.owner
    }
    if served.gone != wanted or served.ids != set(rows.ids) - wanted:
        yield f"{len(served.gone)} records are gone and {len(served.ids)} stay, of {len(wanted)} to go"
    scratch = kit.from_scratch(served.recipe, rows.where(lambda name, _: name not in wanted))
    if scratch.digest() != served.digest():
        yield "the served bytes are not those of a training on what remains"


def _of_files(workspace: Workspace) -> Iterator[str]:
    served = workspace.root / workspace.ledger.models.served(kit.MODEL).folder
    for folder in sorted(served.parent.iterdir()):
        if folder != served:
            yield f"{folder.name} is still there"
    yield from (f"{path.name} was never finished" for path in sorted(workspace.root.rglob(".*.part")))
    gone = workspace.load(kit.MODEL, records()).gone if served.exists() else frozenset()
    if gone:
        swept = erasure.look(workspace, records().where(lambda name, _: name in gone), records())
        yield from (f"{one.form} is still in {one.path}" for one in swept.leftovers)


_DO = {"begin": begin, "work": work, "file": file}
