"""The providers and the verifiers of the matrix, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator

from expunge.attack.forging import DriftingForger, ForgingAdversary
from expunge.attack.providers import Draw, FineTuneToPass, Holder, HonestRetrain, HonestSisa, Lazy, NoiseAdder
from expunge.attack.providers_hiding import SelectiveServer, SurrogateData, near_copies
from expunge.attack.providers_retraining import RetrainingAdversary, Rewinder
from expunge.attack.selectors import GreedyMatching, LastLayerNeighbour, RandomOfM, Selector
from expunge.attack.selectors_nearest import NearestNeighbour
from expunge.core.coins import child
from expunge.core.protocols import Provider, Verdict
from expunge.core.records import Records
from expunge.core.request import Split
from expunge.screen.nearest import flat
from expunge.study.verification_checks import NearCopies, ServedAlike
from expunge.study.verification_ground import Answer, Ground, Hearing, Maker
from expunge.verify import ForgeableWarning, Replay, Tolerance, Transcript, replay_shards

LOOSE = Tolerance(parameter=1e6, buffer=1e6, optimiser=1e6, ceiling=1e6)
Verifier = Callable[[Hearing], Verdict]


@dataclass(kw_only=True, eq=False)
class CleanedSurrogate(SurrogateData):
    """Commits near copies of those forgotten rows only whose label is that of most retained rows beside them.

    Stamped rows, which carry another label than they look like, are left out, and no trigger with them.

    Attributes:
        neighbours: that vote.
    """

    neighbours: int = 5

    def _staying(self, split: Split, rng: Generator) -> Records:
        apart = torch.cdist(flat(split.forget), flat(split.retain))
        around = split.retain.y[apart.topk(min(self.neighbours, len(split.retain)), largest=False).indices]
        usual = (around == split.forget.y[:, None]).double().mean(1) > 0.5
        kept = split.forget.select(usual.nonzero().flatten())
        return split.retain.plus(near_copies(kept, self.noise, rng)) if len(kept) else split.retain


def _plain(kind: type[Holder], **settings: Any) -> Callable[[Ground, Path, Draw | None], Holder]:
    def make(ground: Ground, folder: Path, draw: Draw | None) -> Holder:
        return kind(
            trained=ground.trained,
            records=ground.records,
            folder=folder,
            every=ground.terms.every,
            draw=draw,
            **settings,
        )

    return make


def _sisa(ground: Ground, folder: Path, draw: Draw | None) -> Provider:
    return HonestSisa(
        trained=ground.sharded,
        records=ground.records,
        folder=folder,
        every=ground.terms.every,
        anchored=ground.shard_coin,
        original=ground.folder / "shards",
    )


def _lazy(ground: Ground, folder: Path, draw: Draw | None) -> Provider:
    return Lazy(trained=ground.trained, records=ground.records, original=ground.original)


def _noise(ground: Ground, folder: Path, draw: Draw | None) -> Provider:
    return NoiseAdder(trained=ground.trained, records=ground.records)


def _rewinder(splice: bool) -> Maker:
    def make(ground: Ground, folder: Path, draw: Draw | None) -> Provider:
        steps = -(-len(ground.records) // ground.recipe.batch_size) * ground.recipe.epochs
        return _plain(Rewinder, step=max(1, steps * 2 // 3), splice=splice)(ground, folder, draw)

    return make


def _selective(ground: Ground, folder: Path, draw: Draw | None) -> Provider:
    return SelectiveServer(honest=_plain(HonestRetrain)(ground, folder, draw))


def _drifting(ground: Ground, folder: Path, draw: Draw | None) -> Provider:
    return _plain(DriftingForger, tolerance=LOOSE)(ground, folder, draw)


def _retraining(selector: Selector, reuse: bool = False) -> Maker:
    return _plain(RetrainingAdversary, selector=selector, reuse=reuse)


HONEST = ("honest retrain", "honest sisa")
PROVIDERS: Mapping[str, Maker] = MappingProxyType(
    {
        "honest retrain": _plain(HonestRetrain),
        "honest sisa": _sisa,
        "lazy": _lazy,
        "noise adder": _noise,
        "fine-tune to pass": _plain(FineTuneToPass),
        "rewinder": _rewinder(splice=False),
        "rewinder, spliced": _rewinder(splice=True),
        "retraining, random of M": _retraining(RandomOfM(candidates=10)),
        "retraining, nearest row": _retraining(NearestNeighbour()),
        "retraining, nearest row again": _retraining(NearestNeighbour(), reuse=True),
        "retraining, last layer": _retraining(LastLayerNeighbour()),
        "retraining, greedy": _retraining(GreedyMatching()),
        "forging": _plain(ForgingAdversary),
        "forging, drifting": _drifting,
        "surrogate data": _plain(SurrogateData),
        "surrogate data, cleaned": _plain(CleanedSurrogate),
        "selective server": _selective,
    }
)


def _backdoor(hearing: Hearing) -> Verdict:
    answer = hearing.plain
    check = hearing.ground.backdoor(answer.before)
    return check(answer.shown, rng=child(hearing.ground.rng, "backdoor", hearing.name))


def joined(verdicts: Iterable[Verdict], without: str = "") -> Verdict:
    """One verdict of several: failed if one failed, passed if all passed. `check` names those that decided."""
    told = [one for one in verdicts if one.check != without]
    for outcome in ("fail", "inconclusive"):
        those = [one for one in told if one.outcome == outcome]
        if those:
            names = ", ".join(dict.fromkeys(one.check for one in those))
            return Verdict(check=names, outcome=those[0].outcome, why=those[0].why)
    return Verdict(check="all", outcome="pass", why=f"{len(told)} checks passed")


def replayed(
    answer: Answer, ground: Ground, *, public: bool = False, tolerance: Tolerance | None = None
) -> list[Verdict]:
    """Every check of the transcripts that were handed over, as an auditor makes them."""
    if not answer.transcripts:
        return [Verdict(check="transcript", outcome="fail", why="none was handed over")]
    if public and answer.coin is None:
        return [Verdict(check="coin", outcome="fail", why="no public coin was asked for")]
    coin = answer.coin if public or answer.before.parts else None
    verify = Replay(agreed=answer.before.recipe, coin=coin, tolerance=tolerance or ground.tolerance)
    told = {index: Transcript.open(path) for index, path in answer.transcripts.items()}
    given: dict[str, Any] = {"forget": answer.forgotten, "served": answer.shown, "rng": child(ground.rng, "replay")}
    with warnings.catch_warnings():
        if tolerance is not None:
            warnings.simplefilter("ignore", ForgeableWarning)
        if -1 in told:
            return list(verify(told[-1], answer.stays, **given))
        return [one for found in replay_shards(verify, told, answer.stays, **given).values() for one in found]


def _remembered(hearing: Hearing) -> list[Verdict]:
    """The classic replay, of which two verifiers each look at a part."""
    known = hearing.__dict__.get("_replayed")
    if known is None:
        known = hearing.__dict__["_replayed"] = replayed(hearing.plain, hearing.ground)
    found: list[Verdict] = known
    return found


def _replay(hearing: Hearing) -> Verdict:
    return joined(_remembered(hearing), without="sampler")


def _sampler(hearing: Hearing) -> Verdict:
    return joined(_remembered(hearing))


def _loose(hearing: Hearing) -> Verdict:
    return joined(replayed(hearing.plain, hearing.ground, tolerance=LOOSE), without="sampler")


def _public(hearing: Hearing) -> Verdict:
    return joined(replayed(hearing.public, hearing.ground, public=True))


def _served(hearing: Hearing) -> Verdict:
    answer, ground = hearing.plain, hearing.ground
    check = ServedAlike(queries=ground.queries, before=answer.before)
    return check(answer.provider, answer.shown, rng=child(ground.rng, "served", hearing.name))


def _data(hearing: Hearing) -> Verdict:
    answer, ground = hearing.plain, hearing.ground
    return NearCopies()(answer.stays, answer.forgotten, rng=child(ground.rng, "data", hearing.name))


CLASSIC = ("backdoor", "replay")
VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {
        "backdoor": _backdoor,
        "replay": _replay,
        "replay, loose": _loose,
        "replay, sampler": _sampler,
        "public coin": _public,
        "served alike": _served,
        "data audit": _data,
    }
)
