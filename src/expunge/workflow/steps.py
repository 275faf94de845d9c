"""The steps of one run: unlearn, verify, switch, erase, complete. Each is committed before the next begins.

Any of them may happen twice, if its worker dies before it is recorded; its effect happens once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from expunge.core.claim import Claim
from expunge.core.digest import sha256_hex
from expunge.core.errors import Corrupt, Misuse, Overtaken, Unwritable
from expunge.core.protocols import Failed, Held, Job, Method, NotDone, Passed, Stage
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.ledger import check
from expunge.ledger.check import canonical
from expunge.ledger.failpoints import failpoint
from expunge.ledger.jobs import Run, Statement
from expunge.ledger.ledger import Ledger
from expunge.ledger.models import Served
from expunge.ledger.sweep import Sweep
from expunge.verify.stage import VerifyStage
from expunge.workflow import erasure
from expunge.workflow.carrying import Carried, carry_out
from expunge.workflow.mirror import PARENT, REQUESTS, Mirror
from expunge.workflow.statements import claim_of, method_of, statement
from expunge.workflow.transcripts import TRANSCRIPT, transcribing
from expunge.workflow.workspace import Workspace

BEFORE: Final = ("screen",)
AFTER: Final = ("certify", "verify", "audit", "value", "assure")
"""The stages before and after unlearning, in order. One that is not given is shown as not done, never as passed."""

Outcome = Passed | Held | Failed | NotDone
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """What the steps of any run about one model need; see `Journey` for the attributes."""

    workspace: Workspace
    model: str
    records: Records
    method: Method
    exact: Method
    stages: Mapping[str, Stage]
    mirror: Mirror | None
    tell: Tell

    @property
    def ledger(self) -> Ledger:
        """The workspace's."""
        return self.workspace.ledger

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The id behind each pseudonym."""
        return self.workspace.names(self.records)

    def served(self) -> Trained:
        """The model that is served now."""
        return self.workspace.serving(self.model, self.names)

    def knowing(self, trained: Trained, requests: Iterable[Request]) -> Trained:
        """The model, its books naming the gone records that these requests name by ids that left the data set."""
        asked = {one for request in requests for one in request.ids}
        name = self.workspace.keys.pseudonym
        return replace(trained, gone=trained.gone | {one for one in asked if name(one) in trained.gone})

    def outcome(self, name: str, job: Job, of: str, version: Path | None = None) -> Outcome:
        """What a stage says of a job; `of` names its coins, and `version` is the folder of the model after."""
        stage = self.stages.get(name)
        if stage is None:
            return NotDone(why=NOT_DONE)
        if isinstance(stage, VerifyStage) and version is not None:
            stage = stage.at(version / TRANSCRIPT)
        return stage(job, rng=self.workspace.keys.coins("stage", name, of))

    def unlearn(self, run: Run) -> Run:
        """Carry the requests out, and save the result, which nobody is served yet."""
        served = self.ledger.models.served(self.model)
        self.tell(f"unlearn for {len(run.requests)} requests", 0, 1)
        requests = {name: self.workspace.asked(name) for name in run.requests}
        trained = self.knowing(self.served(), requests.values())
        run, requests = self._possible(run, requests, trained)
        method = self.exact if run.exact else self.method
        rng = self.workspace.keys.coins("run", run.id)
        with self.ledger.database.read() as connection:
            before = self.ledger.models.standing_on(connection, self.model)
            anchor = self.ledger.models.anchored(connection, self.model).index
            openings = self.ledger.commitments.openings(connection, self.model)
        name = self.workspace.keys.pseudonym
        if set(map(name, trained.ids)) != set(openings):
            raise Corrupt(
                f"the served model says that it stands on {len(trained.ids):,} records, and the ledger on others"
            )
        # The fence is part of the name: a worker that was taken over may still be saving its own.
        folder = f"models/{self.model}/v{served.version + 1:04d}-{run.id[:8]}-{run.fence}"
        root, share, read = self.workspace.root, self.workspace.config.policy.replay, None
        with (
            self._saving(run),
            transcribing(method, trained, root / folder, root / served.folder, share) as (carrying, told),
        ):
            carried = carry_out(carrying, trained, self.records, requests, rng=rng)
            if carried.witness is not None:
                over = map(name, carried.carried_over())
                read = carried.witness.commitments(self.workspace.keys, openings, over).root().to_json()
            if carried.changed:
                self.workspace.keep(carried.trained, folder, told)
        left, folder = trained.ids - carried.trained.ids, folder if carried.changed else served.folder
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

    def _possible(self, run: Run, requests: Mapping[str, Request], trained: Trained) -> tuple[Run, dict[str, Request]]:
        """The run without the requests that cannot be carried out any more: they fail, and the others go on."""
        possible = dict(requests)
        for name, request in requests.items():
            try:
                request.split(self.records, ids=trained.ids, gone=trained.gone)
            except Misuse as error:
                if len(possible) == 1:
                    raise
                run = self.ledger.runs.let_fail(run, name, str(error))
                del possible[name]
        return run, possible

    @contextmanager
    def _saving(self, run: Run) -> Iterator[None]:
        try:
            yield
        except Unwritable:  # whoever took the run over deletes what this worker is still writing: then Overtaken
            self.ledger.runs.renew(run, self.workspace.config.policy.lease_s)
            raise

    def _claim_of(self, carried: Carried) -> dict[str, Any]:
        if not carried.changed:
            caveat = "Nothing was left to remove: the model as served did not stand on these records any more."
            return claim_of(Claim.NONE, None, None, caveat)
        caveat = carried.claim.caveat(carried.exactness)
        return claim_of(carried.claim, carried.exactness, carried.guarantee, caveat)

    def verify(self, run: Run) -> tuple[Run, str | None]:
        """Let every later stage look at the result; how the run ended, if one of them withholds it."""
        self.ledger.runs.verifying(run)
        after = self._after(run)
        requests = tuple(self.workspace.asked(name) for name in run.requests)
        before = self.knowing(self.served(), requests)
        job = Job(requests=requests, before=before, after=after, records=self.records)
        outcomes: dict[str, Outcome] = {}
        for number, name in enumerate(AFTER):
            self.tell(f"{name}", number, len(AFTER))
            outcomes[name] = self.outcome(name, job, run.id, self.workspace.root / run.detail["after"]["folder"])
        for name, outcome in outcomes.items():
            if isinstance(outcome, Failed):
                self.ledger.runs.fail(run, f"{name}: {outcome.why}")
                self.drop(run)
                return run, "failed"
            if isinstance(outcome, Held):
                self.ledger.runs.withhold(run, f"{name}: {outcome.why}")
                self.drop(run)
                return run, "withheld"
        stages = [{"name": name, "outcome": word_of(one), "why": _why(one)} for name, one in outcomes.items()]
        return self.ledger.runs.record(run, "verified", stages=stages), None

    def _after(self, run: Run) -> Trained:
        after = run.detail["after"]
        return self.workspace.read(after["folder"], after["digest"], self.names)

    def drop(self, run: Run) -> None:
        """Delete a result that is not released, once its run has ended: before, another worker may have taken it."""
        after = run.detail.get("after")
        if after is not None and after["folder"] != self.ledger.models.served(self.model).folder:
            shutil.rmtree(self.workspace.root / after["folder"], ignore_errors=True)

    def switch(self, run: Run) -> Run:
        """Serve the new version."""
        after = run.detail["after"]
        if after["version"] == run.detail["before"]["version"]:
            return self.ledger.runs.record(run, "switched", set_after=run.detail["set_before"])
        self._after(run)  # the bytes on disk are those that were verified
        served = Served(name=self.model, version=after["version"], digest=after["digest"], folder=after["folder"])
        run = self.ledger.models.switch(run, served, frozenset(run.detail["left"]))
        failpoint("after switch")
        return run

    def erase(self, run: Run) -> Run:
        """Erase all that derives from the removed records, and look for what is left."""
        self.tell("erase and sweep", 0, 1)
        self.ledger.runs.erase_bodies(run)
        after = run.detail["after"]
        gone = frozenset(name for names in run.detail["removed"].values() for name in names)
        self._after(run)  # the old version is not deleted before the new one can be read
        self.ledger.runs.renew(run, self.workspace.config.policy.lease_s)  # not in the mirror either, if it was lost
        version, mirrored = self._mirror(run)
        due = [*run.detail.get("retired", ()), *erasure.due(self.workspace, self.model, after["folder"], gone)]
        run = self.ledger.runs.record(run, "switched", retired=_distinct(due))  # said first: it may die amid it
        with self.ledger.database.write() as connection:  # until it ends nobody can take over, and serve another
            self.ledger.runs.hold(connection, run)
            retired = due + erasure.retire(self.workspace, self.model, after["folder"], gone)
        rows = self._rows(frozenset(run.detail["named"]))
        found, lost = None, len(run.detail["named"]) - len(rows)
        if len(rows):
            waiting = partial(erasure.asked_still, self.workspace, rows)
            found = erasure.look(self.workspace, rows, self._stays(rows), waiting)
        with self.ledger.database.read() as connection:
            set_after = self.ledger.models.standing_on(connection, self.model).root().to_json()
        found_so_far = {"retired": _distinct(retired + mirrored), "set_after": set_after, "mirror": version}
        run = self.ledger.runs.record(run, "switched", **found_so_far)
        if found is not None:
            erasure.refuse_leftovers(found)
        failpoint("after erase")
        return self.ledger.runs.record(run, "erased", sweep=None if found is None else _summary(found, lost))

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
        mine = {self.names[name] for name in gone if name in self.names}
        return self.records.where(lambda record_id, _: record_id in mine)

    def _stays(self, forget: Records) -> Records:
        """The rows that the model still stands on: what these share with the removed ones is theirs."""
        with self.ledger.database.read() as connection:
            gone = self.ledger.commitments.gone(connection, self.model)
        out = {*forget.ids, *(self.names[name] for name in gone if name in self.names)}
        return self.records.where(lambda record_id, _: record_id not in out)

    def _named(self, requests: Iterable[Request], trained: Trained) -> set[str]:
        """Ids of all records that these requests mean, those included that were gone before."""
        found = (request.named(self.records, trained.gone, trained.ids) for request in requests)
        return {one for named in found for one in named}

    def complete(self, run: Run) -> None:
        """State what was done for each request, commit it, and sign it."""
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
        difference = self._difference(run, known)
        _refuse_unsound(statements.values(), difference)
        self._certify_mirror(run, statements)  # before the commit: who dies in between does it again
        self.ledger.runs.complete(run, statements, canonical(difference))
        self.ledger.certificates.sign()
        self.ledger.log.checkpoint()

    def _screened(self, request: str) -> dict[str, str]:
        """What became of a request's screening, as the log has it."""
        judged = [entry for entry in self.ledger.log.entries(request) if entry.kind in ("screened", "held")][-1]
        word = dict(said.split(": ", 1) for said in judged.body["stages"]).get("screen", "not done").partition(": ")[0]
        if word == "passed":
            return {"name": "screen", "outcome": "passed", "why": "nothing was flagged"}
        if word == "not done":
            return {"name": "screen", "outcome": "not done", "why": NOT_DONE}
        after = "a person released it" if judged.kind == "held" else "it was sent to an exact method"
        before = "it was flagged" if word == "held" else "the screen itself failed"
        return {"name": "screen", "outcome": "held", "why": f"{before}, and {after}"}

    def _certify_mirror(self, run: Run, statements: Mapping[str, Statement]) -> None:
        """Name the certificates where others fetch the model."""
        version = run.detail.get("mirror")
        if self.mirror is not None and version is not None:
            payloads = b"".join(statements[name].payload for name in sorted(statements))
            self.mirror.certify(version, sha256_hex(payloads))

    def _difference(self, run: Run, known: Mapping[str, bytes]) -> dict[str, Any]:
        """Proof that the set after is the set before without the removed records."""
        left = sorted(known[name] for name in run.detail["left"])
        with self.ledger.database.read() as connection:
            before = self.ledger.commitments.present(connection, self.model).plus(left)
        removal = before.removal(left) if left else []
        return {"removed": [one.hex() for one in left], "removal": removal, "added": [], "addition": []}


NOT_DONE = "no such stage was configured"


def word_of(outcome: Outcome) -> str:
    """The outcome in one word, as certificates have it."""
    return {Passed: "passed", Held: "held", Failed: "failed", NotDone: "not done"}[type(outcome)]


def _why(outcome: Outcome) -> str:
    """What may be published of a stage's outcome: of one that looked at records, only that it let them pass."""
    if isinstance(outcome, NotDone):
        return NOT_DONE if outcome.why == NOT_DONE else "the stage says that it was not done"
    return "nothing was found against the release"


def _summary(found: Sweep, lost: int) -> dict[str, Any]:
    """What a certificate says of a sweep: how much was searched, and for how many only in part."""
    return {
        "files": found.files,
        "bytes": found.size_bytes,
        "clean": found.clean,
        "records": found.records,
        "notInSource": lost,
        "notByContent": found.not_searched_by_content,
        "notAsText": found.not_searched_as_text,
        "namesOnlyAsQuotedText": found.not_searched_by_id,
    }


def _refuse_unsound(statements: Iterable[Statement], difference: dict[str, Any]) -> None:
    """Corrupt if who checks the certificates would refuse one: then none is committed.

    All are about the same sets, so that the proof between these is checked once, for all that was removed.
    """
    every: list[str] = []
    said: dict[str, Any] = {}
    try:
        for one in statements:
            said, removed = check.parse(one.payload), [member.hex() for member in sorted(one.removed)]
            check.check_form(said)
            check.check_removed({"removed": {"commitments": removed}}, said)
            every += removed
        check.check_difference({"removed": {"commitments": every}, "difference": difference}, said)
    except check.Refused as error:
        raise Corrupt(
            f"what was done does not add up ({error}), so nothing is certified; check: expunge log --verify"
        ) from None


def _distinct(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each once, in order: an attempt that was interrupted may have retired some before."""
    return [one for place, one in enumerate(found) if one not in found[:place]]
