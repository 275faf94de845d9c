"""The journey of a request: screened, carried out, verified, released, erased, certified. Resumable at every step.

A worker may die at any instant. What it did is either committed, and another worker goes on from there, or it never
was. Computing may happen twice; its effect happens once, in one transaction that only the holder of the run can make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Event, Thread

from expunge.core.claim import Claim
from expunge.core.errors import (
    Corrupt,
    ExpungeError,
    Impossible,
    Misuse,
    NothingChanged,
    NotNow,
    Overtaken,
    Unsupported,
)
from expunge.core.protocols import Failed, Held, Job, Method, Stage
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.ledger.database import moment, stamp
from expunge.ledger.jobs import Run
from expunge.ledger.requests import Filed
from expunge.ledger.states import State
from expunge.workflow import erasure
from expunge.workflow.carrying import refuse_replacement
from expunge.workflow.fallback import FallBack
from expunge.workflow.mirror import Mirror
from expunge.workflow.statements import method_of
from expunge.workflow.steps import AFTER, BEFORE, Outcome, Steps, Tell, word_of
from expunge.workflow.workspace import Workspace


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
        named = {stage.name: stage for stage in stages}
        for name in named:
            if name not in BEFORE + AFTER:
                raise Misuse(f'there is no stage "{name}"; stages are {", ".join(BEFORE + AFTER)}')
        self.steps = Steps(
            workspace=workspace,
            model=model,
            records=records,
            method=method,
            exact=exact,
            stages=named,
            mirror=mirror,
            tell=tell,
        )
        self.model, self.workspace = model, workspace
        self.ledger, self.policy = workspace.ledger, workspace.config.policy

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
            before = run.requests
            ended, run = self._carry(run)
            done[ended] += run.requests
            done["failed"] += [one for one in before if one not in run.requests]
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
        here, other = self.steps, FallBack(model=model)
        for filed in withheld:
            self.ledger.requests.release(filed.id)
        self.steps = replace(here, method=other, exact=other)
        try:
            return self.run(worker, now=True)
        finally:
            self.steps = here

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
        steps = self.steps
        steps.tell(f"screen {filed.id}", 0, 1)
        trained = steps.served()
        try:
            request = self.workspace.asked(filed.id)
            refuse_replacement(request)
            trained = steps.knowing(trained, [request])
            request.split(steps.records, ids=trained.ids, gone=trained.gone)
        except ExpungeError as error:
            self.ledger.requests.screened(filed.id, held=f"cannot be carried out as it stands: {error}")
            return True
        job = Job(requests=(request,), before=trained, after=None, records=steps.records)
        outcomes = {name: steps.outcome(name, job, filed.id) for name in BEFORE}
        stages = [f"{name}: {word_of(outcome)}{_told(outcome)}" for name, outcome in outcomes.items()]
        held = next((o.why for o in outcomes.values() if isinstance(o, (Held, Failed))), None)
        if held is not None and self.policy.on_flag == "exact":
            self.ledger.requests.screened(filed.id, held=None, exact=True, stages=stages)
            return False
        self.ledger.requests.screened(filed.id, held=held, stages=stages)
        return held is not None

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

    def _carry(self, run: Run) -> tuple[str, Run]:
        """Take a run through all steps that it has not made yet; how it ended, and with which requests."""
        try:
            with self._held(run):
                if run.step == "claimed":
                    run = self.steps.unlearn(run)
                if run.step == "unlearned":
                    run, ended = self.steps.verify(run)
                    if ended is not None:
                        return ended, run
                if run.step == "verified":
                    run = self.steps.switch(run)
                if run.step == "switched":
                    run = self.steps.erase(run)
                self.steps.complete(run)
        except (Misuse, Unsupported, Impossible, NothingChanged, Corrupt) as error:
            if run.step not in ("claimed", "unlearned", "verified"):  # the new model is served: only forward from here
                self._let_go(run)
                raise
            self.ledger.runs.fail(run, str(error))
            self.steps.drop(run)
            return "failed", run
        except erasure.Leftovers as error:
            self.ledger.runs.note(run, str(error))
            self._let_go(run)
            raise
        except BaseException:
            self._let_go(run)
            raise
        return "completed", run

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


def _told(outcome: Outcome) -> str:
    """What the log may keep of what a stage found: only what the stage gives for that, as the rest may name records."""
    told = getattr(outcome, "evidence", {}).get("told")
    return f": {' '.join(told.split())[:_TOLD]}" if isinstance(told, str) and told.strip() else ""


_TOLD = 400
"""Characters; the log is for ever."""
