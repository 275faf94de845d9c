"""The journey of a request: screened, carried out, verified, released, erased, certified. Resumable at every step.

A worker may die at any instant. What it did is either committed, and another worker goes on from there, or it never
was. Computing may happen twice; its effect happens once, in one transaction that only the holder of the run can make.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from threading import Event, Thread
from typing import Any, Final

from expunge.core.claim import Claim
from expunge.core.coins import generator, seed_of
from expunge.core.digest import sha256_hex
from expunge.core.errors import (
    Corrupt,
    ExpungeError,
    Impossible,
    Misuse,
    NothingChanged,
    NotNow,
    Overtaken,
    Unsupported,
    Unwritable,
)
from expunge.core.protocols import Failed, Held, Job, Method, NotDone, Passed, Stage
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.ledger.check import canonical
from expunge.ledger.database import moment, stamp
from expunge.ledger.failpoints import failpoint
from expunge.ledger.jobs import Run, Statement
from expunge.ledger.models import Served
from expunge.ledger.requests import Filed
from expunge.ledger.states import State
from expunge.workflow import erasure
from expunge.workflow.carrying import Carried, carry_out, refuse_replacement
from expunge.workflow.fallback import FallBack
from expunge.workflow.mirror import PARENT, REQUESTS, Mirror
from expunge.workflow.statements import claim_of, method_of, statement
from expunge.workflow.workspace import Workspace

BEFORE: Final = ("screen",)
AFTER: Final = ("certify", "verify", "audit", "value", "assure")
"""The stages before and after unlearning, in order. One that is not given is shown as not done, never as passed."""

Outcome = Passed | Held | Failed | NotDone
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What one call of `Journey.run` did, by request ids."""

    completed: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """True if nothing was held, withheld or failed."""
        return not (self.held or self.withheld or self.failed)

    def to_json(self) -> dict[str, list[str]]:
        """All fields as plain JSON values."""
        return {name: list(getattr(self, name)) for name in self.__dataclass_fields__}


class Journey:
    """Honours the requests about one model of a workspace."""

    def __init__(
        self,
        workspace: Workspace,
        model: str,
        records: Records,
        *,
        method: Method,
        exact: Method,
        stages: Sequence[Stage] = (),
        mirror: Mirror | None = None,
        tell: Tell = lambda *_: None,
    ) -> None:
        """The journey of this model's requests.

        Args:
            workspace: where the model is served.
            model: its name.
            records: its whole data set, removed records included as long as they are in the source.
            method: carries out what nobody doubts.
            exact: carries out what a screen flagged or a check withheld; must be an exact method.
            stages: what is done beside unlearning; see `BEFORE` and `AFTER` for their names.
            mirror: a registry elsewhere that is to serve the model too.
            tell: hears (what, done, in all).

        Raises:
            Misuse: for a stage of another name, or an `exact` that is not.
        """
        if exact.claim is not Claim.EXACT:
            raise Misuse(f"doubtful requests go to an exact method, got {method_of(exact)['name']}; give Retrain()")
        self.stages = {stage.name: stage for stage in stages}
        for name in self.stages:
            if name not in BEFORE + AFTER:
                raise Misuse(f'there is no stage "{name}"; stages are {", ".join(BEFORE + AFTER)}')
        self.workspace, self.model, self.records = workspace, model, records
        self.method, self.exact, self.mirror, self.tell = method, exact, mirror, tell
        self.ledger = workspace.ledger
        self.policy = workspace.config.policy

    def run(self, worker: str, *, now: bool = False) -> Progress:
        """Take every request as far as it goes; go on with what another worker left behind.

        Args:
            worker: a name of this process, that no other has.
            now: begin a run though the policy would wait for more requests.

        Raises:
            Overtaken: if another worker took over; nothing of this one's was lost or done twice.
            Leftovers: if something of a removed record is still in the workspace; the run goes on when it is gone.
            Corrupt: if model or records are not what the ledger says.
        """
        self.ledger.certificates.sign()
        self._end_old()
        held = [filed.id for filed in self._waiting(State.RECEIVED, State.SCREENING) if self.screen(filed)]
        done: dict[str, list[str]] = {"completed": [], "withheld": [], "failed": []}
        while (run := self._claim(worker, now)) is not None:
            done[self._carry(run)] += run.requests
        self._tidy()
        waiting = tuple(filed.id for filed in self._waiting(State.PENDING))
        self.ledger.certificates.sign()
        self.ledger.log.checkpoint()
        return Progress(held=tuple(held), waiting=waiting, **{name: tuple(ids) for name, ids in done.items()})

    def fall_back(self, model: Trained, worker: str) -> Progress:
        """Retire the model: serve this one in its place, which never read the records that must go.

        Carries out every withheld request. What the other model does not stand on leaves the set of records too.

        Raises:
            Misuse: if there is nothing withheld.
        """
        withheld = self._waiting(State.WITHHELD)
        if not withheld:
            raise Misuse(
                f'no request about "{self.model}" is withheld, so its model is not retired; see: expunge status'
            )
        other = copy.copy(self)
        other.method = other.exact = FallBack(model=model)
        for filed in withheld:
            self.ledger.requests.release(filed.id)
        return other.run(worker, now=True)

    @cached_property
    def _names(self) -> Mapping[str, str]:
        return self.workspace.names(self.records)

    def _served(self) -> Trained:
        return self.workspace.serving(self.model, self._names)

    def _waiting(self, *states: State) -> list[Filed]:
        return self.ledger.requests.find(model=self.model, state=states)

    def _end_old(self) -> None:
        """What time alone brings about: unverified requests end, keys to removed records are destroyed."""
        with self.ledger.database.read() as connection:
            now = moment(self.ledger.database.utc(connection))
        with suppress(NotNow):  # another worker is at it
            self.ledger.requests.expire(now - timedelta(days=self.policy.identity_days))
        for run in self.ledger.runs.finished(stamp(now - timedelta(days=self.policy.keys_days))):
            self.ledger.destroy_keys(run)

    def screen(self, filed: Filed) -> bool:
        """Screen one request; True if it is held for a person to look at."""
        try:
            return self._screen(filed)
        except NotNow:  # another worker was quicker, or it was cancelled meanwhile
            return False

    def _screen(self, filed: Filed) -> bool:
        self.ledger.requests.screening(filed.id)
        self.tell(f"screen {filed.id}", 0, 1)
        request = self.workspace.asked(filed.id)
        trained = self._served()
        try:
            refuse_replacement(request)
            request.split(self.records, ids=trained.ids, gone=trained.gone)
        except ExpungeError as error:
            self.ledger.requests.screened(filed.id, held=f"cannot be carried out as it stands: {error}")
            return True
        job = Job(requests=(request,), before=trained, after=None, records=self.records)
        outcomes = {name: self._outcome(name, job, filed.id) for name in BEFORE}
        stages = [f"{name}: {_word(outcome)}" for name, outcome in outcomes.items()]
        held = next((o.why for o in outcomes.values() if isinstance(o, (Held, Failed))), None)
        if held is not None and self.policy.on_flag == "exact":
            self.ledger.requests.screened(filed.id, held=None, exact=True, stages=stages)
            return False
        self.ledger.requests.screened(filed.id, held=held, stages=stages)
        return held is not None

    def _outcome(self, name: str, job: Job, of: str) -> Outcome:
        stage = self.stages.get(name)
        if stage is None:
            return NotDone(why=_NOT_DONE)
        return stage(job, rng=generator(seed_of("stage", name, of)))

    def _claim(self, worker: str, now: bool) -> Run | None:
        """The run to go on with, or a new one if the policy says that it is time."""
        most = self.policy.most if now or self._due() else 0
        return self.ledger.runs.claim(self.model, worker, lease_s=self.policy.lease_s, most=most)

    def _due(self) -> bool:
        pending = self._waiting(State.PENDING)
        if not pending:
            return False
        with self.ledger.database.read() as connection:
            oldest = moment(self.ledger.database.utc(connection)) - timedelta(hours=self.policy.wait_hours)
        urgent = any(filed.exact or moment(filed.updated_at) <= oldest for filed in pending)
        return urgent or len(pending) >= self.policy.count

    def _carry(self, run: Run) -> str:
        """Take a run through all steps that it has not made yet; how it ended."""
        try:
            with self._held(run):
                if run.step == "claimed":
                    run = self._unlearn(run)
                if run.step == "unlearned":
                    run, ended = self._verify(run)
                    if ended is not None:
                        return ended
                if run.step == "verified":
                    run = self._switch(run)
                if run.step == "switched":
                    run = self._erase(run)
                self._complete(run)
        except (Misuse, Unsupported, Impossible, NothingChanged, Corrupt) as error:
            if run.step not in ("claimed", "unlearned", "verified"):  # the new model is served: only forward from here
                self._let_go(run)
                raise
            self.ledger.runs.fail(run, str(error))
            self._drop(run)
            return "failed"
        except BaseException:
            self._let_go(run)
            raise
        return "completed"

    def _tidy(self) -> None:
        """Delete what workers left behind that were killed or taken over, while no run is active and none can begin."""
        served = self.ledger.models.served(self.model)
        if not erasure.litter(self.workspace, self.model, served.folder):
            return
        with self.ledger.database.write() as connection:
            if not self.ledger.runs.active(connection, self.model):
                erasure.retire(self.workspace, self.model, self.ledger.models.served(self.model).folder, ())

    def _let_go(self, run: Run) -> None:
        """Let the next attempt go on at once; if that cannot be written, it goes on when the lease has run out."""
        with suppress(ExpungeError):
            self.ledger.runs.let_go(run)

    @contextmanager
    def _held(self, run: Run) -> Iterator[None]:
        """Within: the lease is renewed in the background, so that long training does not lose it."""
        stop = Event()

        def renew() -> None:
            while not stop.wait(self.policy.lease_s / 3):
                try:
                    self.ledger.runs.renew(run, self.policy.lease_s)
                except Overtaken:  # the next write of the worker itself says so
                    return
                except ExpungeError:  # the disk is full, or the server away for a moment: try again
                    continue

        thread = Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _unlearn(self, run: Run) -> Run:
        served = self.ledger.models.served(self.model)
        self.tell(f"unlearn for {len(run.requests)} requests", 0, 1)
        trained = self._served()
        requests = {name: self.workspace.asked(name) for name in run.requests}
        method = self.exact if run.exact else self.method
        rng = generator(seed_of("run", run.id))
        with self.ledger.database.read() as connection:
            before = self.ledger.models.standing_on(connection, self.model)
            anchor = self.ledger.models.anchored(connection, self.model).index
            openings = self.ledger.commitments.openings(connection, self.model)
        carried = carry_out(method, trained, self.records, requests, rng=rng)
        name = self.workspace.keys.pseudonym
        left = trained.ids - carried.trained.ids
        read = None
        if carried.witness is not None:
            over = map(name, carried.carried_over())
            read = carried.witness.commitments(self.workspace.keys, openings, over).root().to_json()
        folder = served.folder
        if carried.changed:
            # The fence is part of the name: a worker that was taken over may still be saving its own.
            folder = f"models/{self.model}/v{served.version + 1:04d}-{run.id[:8]}-{run.fence}"
            self._keep(run, carried.trained, folder)
        failpoint("after save")
        digest, version = carried.trained.digest(), served.version + carried.changed
        found = {
            "before": {"digest": served.digest, "version": served.version},
            "after": {"digest": digest, "version": version, "folder": folder},
            "anchor": anchor,
            "set_before": before.root().to_json(),
            "rows_read": read,
            "left": sorted(map(name, left)),
            "removed": {of: sorted(map(name, ids)) for of, ids in carried.mine.items()},
            "named": sorted(map(name, self._named(requests.values(), trained) & carried.trained.gone)),
            "already": dict(carried.already),
            "method": method_of(method),
            "claim": self._claim_of(carried),
        }
        try:
            return self.ledger.runs.record(run, "unlearned", **found)
        except Overtaken:
            if carried.changed:
                shutil.rmtree(self.workspace.root / folder, ignore_errors=True)
            raise

    def _keep(self, run: Run, trained: Trained, folder: str) -> None:
        try:
            self.workspace.keep(trained, folder)
        except Unwritable:  # whoever took the run over deletes what this worker is still writing: then Overtaken
            self.ledger.runs.renew(run, self.policy.lease_s)
            raise

    def _claim_of(self, carried: Carried) -> dict[str, Any]:
        if not carried.changed:
            caveat = "Nothing was left to remove: the records were removed before, under certificates of their own."
            return claim_of(Claim.NONE, None, None, caveat)
        caveat = carried.claim.caveat(carried.exactness)
        return claim_of(carried.claim, carried.exactness, carried.guarantee, caveat)

    def _verify(self, run: Run) -> tuple[Run, str | None]:
        """Let every later stage look at the result; how the run ended, if one of them withholds it."""
        self.ledger.runs.verifying(run)
        after = self._after(run)
        requests = tuple(self.workspace.asked(name) for name in run.requests)
        before = self._served()
        job = Job(requests=requests, before=before, after=after, records=self.records)
        outcomes: dict[str, Outcome] = {}
        for number, name in enumerate(AFTER):
            self.tell(f"{name}", number, len(AFTER))
            outcomes[name] = self._outcome(name, job, run.id)
        for name, outcome in outcomes.items():
            if isinstance(outcome, Failed):
                self.ledger.runs.fail(run, f"{name}: {outcome.why}")
                self._drop(run)
                return run, "failed"
            if isinstance(outcome, Held):
                self.ledger.runs.withhold(run, f"{name}: {outcome.why}")
                self._drop(run)
                return run, "withheld"
        stages = [{"name": name, "outcome": _word(outcome), "why": _why(outcome)} for name, outcome in outcomes.items()]
        return self.ledger.runs.record(run, "verified", stages=stages), None

    def _after(self, run: Run) -> Trained:
        after = run.detail["after"]
        return self.workspace.read(after["folder"], after["digest"], self._names)

    def _drop(self, run: Run) -> None:
        """Delete a result that is not released, once its run has ended: before, another worker may have taken it."""
        after = run.detail.get("after")
        if after is not None and after["folder"] != self.ledger.models.served(self.model).folder:
            shutil.rmtree(self.workspace.root / after["folder"], ignore_errors=True)

    def _switch(self, run: Run) -> Run:
        """Serve the new version."""
        after = run.detail["after"]
        if after["version"] == run.detail["before"]["version"]:
            return self.ledger.runs.record(run, "switched", set_after=run.detail["set_before"])
        self._after(run)  # the bytes on disk are those that were verified
        served = Served(name=self.model, version=after["version"], digest=after["digest"], folder=after["folder"])
        run = self.ledger.models.switch(run, served, frozenset(run.detail["left"]))
        failpoint("after switch")
        return run

    def _erase(self, run: Run) -> Run:
        """Erase all that derives from the removed records, and look for what is left."""
        self.tell("erase and sweep", 0, 1)
        self.ledger.runs.erase_bodies(run)
        after = run.detail["after"]
        gone = frozenset(name for names in run.detail["removed"].values() for name in names)
        self._after(run)  # the old version is not deleted before the new one can be read
        version, mirrored = self._mirror(run)
        due = [*run.detail.get("retired", ()), *erasure.due(self.workspace, self.model, after["folder"], gone)]
        run = self.ledger.runs.record(run, "switched", retired=_distinct(due))  # said first: it may die amid it
        with self.ledger.database.write() as connection:  # until it ends nobody can take over, and serve another
            self.ledger.runs.hold(connection, run)
            retired = due + erasure.retire(self.workspace, self.model, after["folder"], gone)
        rows = self._rows(frozenset(run.detail["named"]))
        found = None
        if len(rows):
            found = erasure.look(self.workspace, rows, self.records, lambda: self._asked_still(rows))
        with self.ledger.database.read() as connection:
            set_after = self.ledger.models.standing_on(connection, self.model).root().to_json()
        found_so_far = {"retired": _distinct(retired + mirrored), "set_after": set_after, "mirror": version}
        run = self.ledger.runs.record(run, "switched", **found_so_far)
        if found is not None:
            erasure.refuse_leftovers(found)
        failpoint("after erase")
        summary = None if found is None else {"files": found.files, "bytes": found.size_bytes, "clean": found.clean}
        return self.ledger.runs.record(run, "erased", sweep=summary)

    def _mirror(self, run: Run) -> tuple[str | None, list[dict[str, Any]]]:
        if self.mirror is None:
            return None, []
        after = run.detail["after"]
        tags = {PARENT: str(run.detail["before"]["version"]), REQUESTS: ",".join(run.requests)}
        version = self.mirror.publish(self.workspace.root / after["folder"], after["digest"], tags)
        self.mirror.serve(version)
        retired = self.mirror.retire(version)
        return version, [{"what": "mirror version", "name": name} for name in retired]

    def _rows(self, gone: frozenset[str]) -> Records:
        mine = {self._names[name] for name in gone if name in self._names}
        return self.records.where(lambda record_id, _: record_id in mine)

    def _named(self, requests: Iterable[Request], trained: Trained) -> set[str]:
        """Ids of all records that these requests mean, those included that were gone before."""
        found = (request.named(self.records, trained.gone, trained.ids) for request in requests)
        return {one for named in found for one in named}

    def _asked_still(self, gone: Records) -> frozenset[str]:
        """Ids and owners of removed records that stand in a request which waits: its own run will look for them."""
        found: set[str] = set()
        for filed in self.ledger.requests.find(state=[state for state in State if not state.final]):
            with suppress(ExpungeError):  # it was done meanwhile, or means no record that is gone
                request = self.workspace.asked(filed.id)
                found |= {*request.ids, request.owner or ""}
                found |= set(request.named(gone))
        return frozenset(found)

    def _complete(self, run: Run) -> None:
        statements: dict[str, Statement] = {}
        with self.ledger.database.read() as connection:
            completed_at = self.ledger.database.utc(connection)
            names = [name for mine in run.detail["removed"].values() for name in mine]
            known = self.ledger.commitments.of(connection, self.model, [*names, *run.detail["left"]])
        for request in run.requests:
            filed = self.ledger.requests.get(request)
            removed = [known[name] for name in run.detail["removed"][request]]
            stages = [self._screened(request), *run.detail["stages"]]
            already = run.detail["already"][request]
            payload = statement(filed, run.detail, stages, removed, already, completed_at, run.id)
            statements[request] = Statement(payload=payload, removed=removed)
        self.ledger.runs.complete(run, statements, self._difference(run, known))
        self.ledger.certificates.sign()
        self.ledger.log.checkpoint()
        self._certify_mirror(run, statements)

    def _screened(self, request: str) -> dict[str, str]:
        """What became of a request's screening, as the log has it."""
        kinds = {entry.kind: entry.body for entry in self.ledger.log.entries(request)}
        if "screen" not in self.stages:
            return {"name": "screen", "outcome": "not done", "why": _NOT_DONE}
        if "held" in kinds:
            return {"name": "screen", "outcome": "held", "why": "it was flagged, and a person released it"}
        if kinds["screened"]["exact"]:
            return {"name": "screen", "outcome": "held", "why": "it was flagged, and carried out by an exact method"}
        return {"name": "screen", "outcome": "passed", "why": "nothing was flagged"}

    def _certify_mirror(self, run: Run, statements: Mapping[str, Statement]) -> None:
        """Name the certificates where others fetch the model."""
        version = run.detail.get("mirror")
        if self.mirror is not None and version is not None:
            payloads = b"".join(statements[name].payload for name in sorted(statements))
            self.mirror.certify(version, sha256_hex(payloads))

    def _difference(self, run: Run, known: Mapping[str, bytes]) -> bytes:
        """Proof that the set after is the set before without the removed records."""
        left = sorted(known[name] for name in run.detail["left"])
        with self.ledger.database.read() as connection:
            before = self.ledger.commitments.present(connection, self.model).plus(left)
        removal = before.removal(left) if left else []
        return canonical({"removed": [one.hex() for one in left], "removal": removal, "added": [], "addition": []})


_NOT_DONE = "no such stage was configured"


def _word(outcome: Outcome) -> str:
    return {Passed: "passed", Held: "held", Failed: "failed", NotDone: "not done"}[type(outcome)]


def _why(outcome: Outcome) -> str:
    """What may be published of a stage's outcome: of one that looked at records, only that it let them pass."""
    return outcome.why if isinstance(outcome, NotDone) else "nothing was found against the release"


def _distinct(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each once, in order: an attempt that was interrupted may have retired some before."""
    return [one for place, one in enumerate(found) if one not in found[:place]]
