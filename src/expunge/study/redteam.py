"""Every attack against a model, its unlearner and its screens, kept trial by trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expunge.attack.aim import pick_targets
from expunge.attack.judge import Attempt, Judge
from expunge.attack.measured import Tried
from expunge.core.claim import Claim
from expunge.core.coins import child
from expunge.core.digest import sha256_hex
from expunge.core.errors import ExpungeError, Misuse
from expunge.core.protocols import Method, Screen, Target
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import Report
from expunge.screen.conformal import least_draws
from expunge.study.redteam_attacks import Ground, Maker
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_screens import Watch, group_of
from expunge.study.store import Cells, opened


def redteam(
    trained: Trained,
    records: Records,
    test: Records,
    *,
    attacks: Mapping[str, Maker],
    through: Method,
    retrain: Method | None = None,
    others: Mapping[str, Method] | None = None,
    screens: Sequence[Screen] = (),
    targets: int = 30,
    targeted: bool = False,
    budgets: Sequence[float] = (0.001, 0.005, 0.01, 0.02),
    seeds: int = 1,
    rate: float = 0.05,
    draws: int = 200,
    benign: int = 100,
    rng: torch.Generator,
    keep: Path | None = None,
    progress: Report | None = None,
) -> Redteam:
    """Attack a model in every way named, and measure what came of it.

    Args:
        trained: the model; never written to.
        records: the data set that holds its rows.
        test: rows that it was not trained on; targets are drawn from those that it answers rightly.
        attacks: by name, each made for a number of rows; `redteam_attacks.ATTACKS` are those that have names.
        through: the unlearner under attack.
        retrain: exact; see `Judge`.
        others: unlearners that the attack may transfer to.
        screens: each is tried alone, and all together; none: only attacks are measured.
        targets: how many, each attacked apart.
        targeted: want the model's second best class, instead of any but the true one.
        budgets: shares of the model's rows that an attack may ask for; at least one row.
        seeds: trainings that exact retraining is measured on.
        rate: false alarms that screens are calibrated to.
        draws: requests in good faith that they are calibrated on.
        benign: other such requests, on which their false alarms are measured.
        rng: names the coins; nothing is drawn from it.
        keep: folder that every trial is kept in as it is finished; the same call goes on there after a break.
        progress: told (what, trials done, trials in all) before each trial that was not kept before, and at the end.

    Raises:
        Misuse: for nothing to try, a budget out of range, more targets than there are, or another study's folder.

    Cost: attacks x budgets x targets x (one run of `through` and `seeds` exact retrainings for each of three to four
    arms), and for each policy, model and size `draws` requests screened.
    """
    setting = _Setting.checked(trained, attacks, budgets)
    if screens and draws < least_draws(rate):
        raise Misuse(f"{rate:g} false alarms take at least {least_draws(rate)} draws to calibrate on, got {draws}")
    judge = Judge(
        trained=trained,
        records=records,
        test=test,
        through=through,
        retrain=retrain,
        others=dict(others or {}),
        seeds=seeds,
    )
    watch = Watch(screens=tuple(screens), rate=rate, draws=draws, rng=child(rng, "watch")) if screens else None
    aims = pick_targets(trained, test, targets, rng=child(rng, "targets"), targeted=targeted)
    ground = Ground(trained=trained, watch=watch)
    about = _about(judge, setting, rng) | {
        "made": {name: repr(make(setting.budgets[-1], ground)) for name, make in attacks.items()},
        "targets": targets,
        "targeted": targeted,
        "policies": list(watch.policies) if watch else [],
        "screens": [repr(one) for one in screens],
        "rate": rate,
        "draws": draws,
        "benign": benign,
    }
    with opened(keep, about) as cells:
        run = _Run(judge=judge, watch=watch, ground=ground, aims=aims, cells=cells, rng=rng, benign=benign)
        for done, (name, budget, number) in enumerate(setting.trials(targets)):
            if run.kept(name, budget, number):
                continue
            if progress is not None:
                progress(f"{name}, {budget} rows, target {number + 1}", done, setting.count(targets))
            run.trial(name, attacks[name], budget, number)
        if progress is not None:
            progress("done", setting.count(targets), setting.count(targets))
        return Redteam.of(about, cells.known, [_shown(one, records) for one in aims])


@dataclass(frozen=True, kw_only=True)
class _Setting:
    attacks: tuple[str, ...]
    budgets: tuple[int, ...]

    @classmethod
    def checked(cls, trained: Trained, attacks: Mapping[str, Maker], shares: Sequence[float]) -> _Setting:
        if not attacks or not shares:
            raise Misuse("there is nothing to try: name at least one attack and one budget")
        for share in shares:
            if not 0 < share < 0.5:
                raise Misuse(f"a budget is a share of the rows above 0 and below 0.5, got {share}")
        rows = sorted({max(1, round(share * len(trained.ids))) for share in shares})
        return cls(attacks=tuple(attacks), budgets=tuple(rows))

    def trials(self, targets: int) -> Iterator[tuple[str, int, int]]:
        yield from ((name, rows, one) for name in self.attacks for rows in self.budgets for one in range(targets))

    def count(self, targets: int) -> int:
        return len(self.attacks) * len(self.budgets) * targets


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    judge: Judge
    watch: Watch | None
    ground: Ground
    aims: tuple[Target, ...]
    cells: Cells
    rng: torch.Generator
    benign: int

    def kept(self, name: str, budget: int, number: int) -> bool:
        """Whether this trial was kept before."""
        return ("tried", name, budget, number) in self.cells

    def trial(self, name: str, make: Maker, budget: int, number: int) -> None:
        """One attempt, judged, screened and kept."""
        coins = child(self.rng, "trial", name, budget, number)
        attempt, tried = self._tried(name, make, budget, number, coins)
        watched = []
        if attempt is not None and self.watch is not None:
            self._good_faith(attempt, name)
            watched = self.watch.attempt(attempt, name, number, budget)
        group = group_of(attempt, name) if attempt else ""
        key = ("tried", name, budget, number)
        self.cells.add(key, {"tried": tried.to_json(), "watched": [asdict(one) for one in watched], "group": group})

    def _tried(
        self, name: str, make: Maker, budget: int, number: int, coins: torch.Generator
    ) -> tuple[Attempt | None, Tried]:
        empty = Tried(attack=name, target=number, budget=budget)
        try:
            attempt = self.judge.attempt(make(budget, self.ground), self.aims[number], rng=child(coins, "attack"))
            outcomes = self.judge.measure(attempt, rng=child(coins, "judge"))
        except ExpungeError as error:
            return None, replace(empty, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return attempt, replace(
            empty,
            rows=attempt.rows,
            requests=len(attempt.requests),
            brought=len(attempt.brought),
            seconds=attempt.seconds,
            outcomes=outcomes,
        )

    def _good_faith(self, attempt: Attempt, name: str) -> None:
        """What the policies say of requests in good faith, once for each make-up of requests.

        Of an attacker who brought rows: on the model of the first such attempt.
        """
        if self.watch is None or not attempt.requests:
            return
        group = group_of(attempt, name)
        if ("benign", group) not in self.cells:
            found = self.watch.benign(attempt, group, self.benign)
            self.cells.add(("benign", group), {"benign": [asdict(one) for one in found]})


def _about(judge: Judge, setting: _Setting, rng: torch.Generator) -> dict[str, Any]:
    trained = judge.trained
    return {
        "model": trained.recipe.model,
        "parameters": trained.digest(),
        "rows": len(trained.ids),
        "records": sha256_hex(judge.records.digests().tobytes()),
        "test": sha256_hex(judge.test.digests().tobytes()),
        "test_rows": len(judge.test),
        "attacks": list(setting.attacks),
        "budgets": list(setting.budgets),
        "through": repr(judge.through),
        "exact": type(judge.through).claim is Claim.EXACT,
        "retrain": repr(judge.exact),
        "others": {name: repr(one) for name, one in judge.others.items()},
        "seeds": judge.seeds,
        "seed": rng.initial_seed(),
    }


def _shown(target: Target, records: Records) -> dict[str, Any]:
    """A target as JSON, with its picture where rows have the shape of pictures: (h, w), (1, h, w) or (3, h, w)."""
    wanted = None if target.wanted is None else int(target.wanted[0])
    image = len(records.shape) == 2 or (len(records.shape) == 3 and records.shape[0] in (1, 3))
    return {"y": int(target.y[0]), "wanted": wanted, "picture": _pixels(target.x[0]).tolist() if image else None}


def _pixels(row: torch.Tensor) -> torch.Tensor:
    """0 to 255; floats are stretched from their own least to their own greatest."""
    if row.dtype is torch.uint8:
        return row
    least, most = float(row.min()), float(row.max())
    return ((row.double() - least) / max(most - least, 1e-12) * 255).round().to(torch.uint8)
