"""The chapters `certificate` and `sweep`: the owners' requests go through a workspace and its ledger."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from expunge.core.claim import Claim
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.demo.story import Story, counted
from expunge.ledger import check
from expunge.ledger.sweep import Needles, Sweep, sweep
from expunge.report import Chapter, Grid
from expunge.unlearn import Sisa
from expunge.workflow import Journey, Workspace


@dataclass(frozen=True, kw_only=True)
class Honoured:
    """What became of the owners' requests.

    Attributes:
        requests: their ids.
        seconds: wall time of the one run that honoured them all, sweep included.
        bundles: the certificate bundle of each request, outside the workspace.
        offline: what the copied checker printed of each, and its exit code.
        forged: what it said of a bundle in which one digit was changed, and its exit code.
        log_size: entries in the log.
        statement: what the first certificate says.
        faults: what the full verification of the ledger found.
    """

    requests: tuple[str, ...]
    seconds: float
    bundles: tuple[Path, ...]
    offline: tuple[tuple[str, int], ...]
    forged: tuple[str, int]
    log_size: int
    statement: dict[str, object]
    faults: tuple[str, ...]


def honour(story: Story) -> Honoured:
    """File the owners' requests, honour them in one run, fetch their certificates, and check those offline."""
    root = story.folder / "workspace"
    if root.exists():
        if not (root / "expunge.toml").exists():
            raise Misuse(f"{root} is there and is no workspace; name another folder: --workspace")
        shutil.rmtree(root)
    story.step("commit to every record")
    workspace = Workspace.init(root, origin="expunge/demo")
    try:
        workspace.register("digits", story.sharded, story.data.train)
        filed = [workspace.file("digits", Request.remove_owner(owner), key=owner)[0] for owner in story.askers]
        story.step("honour the requests, and sweep")
        journey = Journey(workspace, "digits", story.data.train, method=Sisa(), exact=Sisa())
        started = time.perf_counter()
        journey.run("demo", now=True)
        seconds = time.perf_counter() - started
        return _fetched(story, workspace, tuple(one.id for one in filed), seconds)
    finally:
        workspace.close()


def _fetched(story: Story, workspace: Workspace, requests: tuple[str, ...], seconds: float) -> Honoured:
    out = story.folder / "certificates"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    checker = out / "check.py"
    checker.write_bytes(Path(check.__file__).read_bytes())
    (out / "expunge.pub").write_bytes(workspace.keys.public_pem())
    bundles = []
    for request in requests:
        bundles.append(out / f"{request}.json")
        bundles[-1].write_bytes(workspace.ledger.certificates.bundle(request))
    forged = out / "forged.json"
    forged.write_bytes(_one_digit_changed(bundles[0].read_bytes()))
    said = check.check_bundle(bundles[0].read_bytes(), workspace.keys.trusted)
    answer = Honoured(
        requests=requests,
        seconds=seconds,
        bundles=tuple(bundles),
        offline=tuple(_offline(checker, bundle) for bundle in bundles),
        forged=_offline(checker, forged),
        log_size=len(workspace.ledger.log),
        statement=said.statement or {},
        faults=tuple(workspace.ledger.verify()),
    )
    forged.unlink()
    return answer


def _one_digit_changed(bundle: bytes) -> bytes:
    """The same bundle with another digit in the first removed commitment."""
    place = bundle.index(b'"removed":["') + len(b'"removed":["')
    return bundle[:place] + (b"0" if bundle[place : place + 1] != b"0" else b"1") + bundle[place + 1 :]


def _offline(checker: Path, bundle: Path) -> tuple[str, int]:
    """What the copied checker says, run by itself: it knows nothing of this package."""
    command = [sys.executable, "-I", checker.name, bundle.name, "--key", "expunge.pub"]
    done = subprocess.run(command, cwd=checker.parent, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.returncode


def tell_certificate(story: Story) -> Chapter:
    """How the requests went through the ledger, and what their owners hold in the end."""
    done = story.honoured
    good = all(code == 0 for _, code in done.offline) and done.forged[1] == 1 and not done.faults
    verdict = "ok" if good else "NOT OK"
    predicate: dict = done.statement["predicate"]  # type: ignore[assignment, type-arg]
    removed = predicate["dataset"]["before"]["count"] - predicate["dataset"]["after"]["count"]
    rows = tuple(
        (line[5:].partition(": ")[0], line[:4].strip(), line.partition(": ")[2])
        for line in done.offline[0][0].splitlines()
        if line.startswith(("ok  ", "FAIL"))
    )
    return Chapter(
        name="certificate",
        headline=(
            f"{counted(len(done.requests), 'request')} honoured in one run of {done.seconds:.1f} s, certificates "
            f"signed, {done.log_size} log entries, checked offline: {verdict}"
        ),
        text=(
            f"Each owner's request was filed in a workspace under {story.folder}, due within one calendar month; "
            f"one run removed {removed:,} records for all of them, and the new model took the old one's place.",
            "Each owner gets a bundle: the signed certificate, its place in the append-only log, and a proof, by "
            "hashing alone, that the set of records before, less the removed ones, is what training read. A copy "
            "of the checker that knows nothing of this program accepted it; with one digit changed it was refused.",
        ),
        grids=(Grid(caption="The first bundle, offline", headers=("check", "", "what it found"), rows=rows, words=3),),
        shows="That what the certificates say is signed, logged, and consistent with the sets of records.",
        does_not_show=(
            "That the program said truly which rows it read, that copies elsewhere are gone, or what the stages that "
            "are not built yet would have found: the checker prints the whole list."
        ),
        check=f"cd {story.folder}/certificates && python -I check.py {done.bundles[0].name} --key expunge.pub",
        data={
            "requests": list(done.requests),
            "seconds": done.seconds,
            "removed": removed,
            "log_size": done.log_size,
            "offline_ok": [code == 0 for _, code in done.offline],
            "forged_refused": done.forged[1] == 1,
            "faults": list(done.faults),
            "claim": predicate["claim"]["level"] if good else Claim.NONE.value,
            "sound": good,
        },
    )


def tell_sweep(story: Story) -> Chapter:
    """That nothing of the removed records is left in the story's folder."""
    honoured = story.honoured
    story.step("look for what is left")
    found = swept(story)
    retired = honoured.statement["predicate"]["retired"]  # type: ignore[index]
    names = ", ".join(one["name"] for one in retired)
    return Chapter(
        name="sweep",
        headline=(
            f"nothing of the removed records remains in {story.folder} "
            f"({found.files:,} files, {found.size_bytes / 1e6:.0f} MB searched)"
            if found.clean
            else f"{len(found.leftovers):,} leftovers of removed records in {story.folder}"
        ),
        text=(
            f"Retired and deleted: {names}. Then every file was searched for the removed rows: as stored, as "
            "floats, in pictures, in text, compressed or in base64, and for their ids, owners and unsalted digests.",
        ),
        shows="That this program left nothing behind in the folder, in the forms that were searched for.",
        does_not_show="Other places: the data set itself, backups, copies; and other forms than those searched for.",
        check=f"expunge sweep digits --workspace {story.folder}/workspace",
        data={**found.to_json(), "sound": found.clean},
    )


def swept(story: Story) -> Sweep:
    """The story's folder searched for the records that were removed in its workspace."""
    return sweep(story.folder, _needles(story))


@cache
def _needles(story: Story) -> Needles:
    gone = forgotten(story)
    stays = story.data.train.where(lambda _, owner: owner not in story.askers)
    return Needles.of(gone, beside=stays, names=dict.fromkeys(gone.ids, "a removed record"))


def forgotten(story: Story) -> Records:
    """The records that were removed in the workspace."""
    return story.data.train.where(lambda _, owner: owner in story.askers)
