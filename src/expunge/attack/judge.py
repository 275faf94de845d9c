"""Measures an attack, apart from the attacker: what its requests did, beside as large ones that need no model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expunge.attack.aim import adversarial_loss, check_target, margin
from expunge.attack.judge_arms import Requests, controls, size_of
from expunge.attack.measured import Outcome
from expunge.attack.strangers import naive
from expunge.core.claim import Claim
from expunge.core.coins import child
from expunge.core.errors import ExpungeError, Misuse, NeverTrained, UnknownRecord
from expunge.core.protocols import Attack, Method, Target
from expunge.core.records import Records
from expunge.core.request import Request, refuse_contradictions
from expunge.core.trained import Trained
from expunge.learn.predict import outputs
from expunge.learn.training import train
from expunge.unlearn.retrain import Retrain
from expunge.unlearn.sisa import Sisa


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempt:
    """An attack's requests, and the model that they are filed against.

    Attributes:
        target: what it is after.
        trained: the model, on the attacker's rows too if it brought some.
        records: all rows, the attacker's too.
        requests: in order.
        brought: ids of the attacker's rows.
        seconds: that the attacker took, the training on its rows not counted.
    """

    target: Target
    trained: Trained
    records: Records
    requests: Requests
    brought: frozenset[str]
    seconds: float

    @property
    def rows(self) -> int:
        """How many rows the requests ask for together."""
        return sum(size_of(one, self.records) for one in self.requests)


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """Carries an attack's requests out and measures the target, in every world and arm.

    Worlds: ``through``, the unlearner under attack; ``retrain``, exact retraining, at each seed; and each of `others`,
    to which the attack may transfer. Of replacements also ``purge``, exact retraining without either row, and of rows
    given by content ``naive``, the unlearner of a provider that takes strangers for members.

    Arms: ``attack``; ``random``, ``neighbours`` and, of replacements, ``noise``, see `judge_arms.controls`;
    ``nothing``, the model before; and of an attacker who brought rows ``clean``, the model that never saw them.

    At seed 0 the model is the one given; at others one trained anew by its recipe under another seed, on which the
    requests made for the first are carried out: so a difference between arms is never one of seeds.

    Attributes:
        trained: the model.
        records: the data set that holds its rows.
        test: rows that it was not trained on; accuracy elsewhere is over those that are not the target.
        through: the unlearner under attack.
        retrain: exact; None: `Sisa` of a sharded model, else `Retrain`.
        others: unlearners by name.
        seeds: trainings that exact retraining is measured on. The other worlds are measured at seed 0 alone.
    """

    trained: Trained
    records: Records
    test: Records
    through: Method
    retrain: Method | None = None
    others: Mapping[str, Method] = field(default_factory=dict)
    seeds: int = 1
    _models: dict[int, Trained] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise Misuse(f"seeds must be >= 1, got {self.seeds}")
        if type(self.exact).claim is not Claim.EXACT:
            raise Misuse(f"retrain must be an exact method, got {type(self.exact).__name__}; use Retrain()")
        taken = {"through", "retrain", "purge", "naive"} & set(self.others)
        if taken:
            raise Misuse(f'another unlearner cannot be called "{min(taken)}"; choose another name')

    @property
    def exact(self) -> Method:
        """The exact method."""
        return self.retrain or (Sisa() if self.trained.parts else Retrain())

    @cached_property
    def _stands_on(self) -> Records:
        """What an attacker makes rows from: not from rows held out, of which its target may be one."""
        inside = self.records.where(lambda one, _: one in self.trained.ids)
        return self.records if len(inside) == len(self.records) else inside

    def attempt(self, attack: Attack, target: Target, *, rng: torch.Generator) -> Attempt:
        """Let the attacker bring rows, train on them if it does, and let it file its requests, or none.

        Raises:
            Misuse: for a target that the model cannot be asked about, a request for nothing, or requests that
                contradict each other.
            ExpungeError: whatever the attack raises.
        """
        check_target(target, self.records)
        started = time.perf_counter()
        brought = attack.contribute(self._stands_on, target, rng=child(rng, "contribute"))
        seconds = time.perf_counter() - started
        records, trained = self.records, self.trained
        if brought is not None and len(brought):
            records = self.records.plus(brought)
            trained = self._trained(0, records, frozenset(brought.ids))
        started = time.perf_counter()
        filed = attack.requests(trained, records, target, through=self.through, rng=child(rng, "requests"))
        seconds += time.perf_counter() - started
        if not all(size_of(one, records) for one in filed):
            raise Misuse("the attack filed an empty request; give it a budget of at least one row")
        _refuse_contradictions(trained, records, filed)
        ids = frozenset() if brought is None else frozenset(brought.ids)
        return Attempt(
            target=target, trained=trained, records=records, requests=tuple(filed), brought=ids, seconds=seconds
        )

    def measure(self, attempt: Attempt, *, rng: torch.Generator) -> tuple[Outcome, ...]:
        """Every arm in every world.

        Cost: one run of each unlearner and, a seed, one exact retraining for each arm; and at each seed but the first
        one training, of an attack that brings rows for each attempt.
        """
        stands = attempt.trained.ids - attempt.brought
        pool = self.records.where(lambda one, _: one in stands)
        arms = {"attack": attempt.requests}
        arms |= controls(attempt.requests, pool, attempt.records, attempt.target, rng=child(rng, "controls"))
        return tuple(self._outcomes(attempt, arms, rng))

    def _outcomes(self, attempt: Attempt, arms: Mapping[str, Requests], rng: torch.Generator) -> Iterator[Outcome]:
        elsewhere = without_target(self.test, attempt.target)
        for world, method, seed in self._worlds():
            try:
                before = self._before(attempt, seed)
            except ExpungeError as error:
                raise Misuse(f"no model of seed {seed} can be trained ({error}); use seeds=1") from error
            seen = _Seen(world=world, seed=seed, target=attempt.target, elsewhere=elsewhere)
            yield seen.outcome("nothing", before)
            if attempt.brought:
                yield seen.outcome("clean", self._clean(seed))
            for arm, requests in arms.items():
                after, spent = carry_out(method, before, attempt.records, requests, rng=child(rng, world, seed))
                yield replace(seen.outcome(arm, after), rows=attempt.rows, **spent)
        purged = _purged(attempt.requests)
        if purged != attempt.requests:  # what is left of the harm when a replacement goes with the row that it replaces
            after, spent = carry_out(self.exact, attempt.trained, attempt.records, purged, rng=child(rng, "purge"))
            seen = _Seen(world="purge", seed=0, target=attempt.target, elsewhere=elsewhere)
            yield replace(seen.outcome("attack", after), rows=attempt.rows, **spent)
        if any(one.kind == "remove_rows" for one in attempt.requests):
            coins = child(rng, "naive")
            after, spent = carry_out(
                self.through, attempt.trained, attempt.records, attempt.requests, rng=coins, blind=True
            )
            seen = _Seen(world="naive", seed=0, target=attempt.target, elsewhere=elsewhere)
            yield replace(seen.outcome("attack", after), rows=attempt.rows, **spent)

    def _worlds(self) -> Iterator[tuple[str, Method, int]]:
        yield "through", self.through, 0
        yield from (("retrain", self.exact, seed) for seed in range(self.seeds))
        yield from ((name, method, 0) for name, method in self.others.items())

    def _before(self, attempt: Attempt, seed: int) -> Trained:
        if not seed:
            return attempt.trained
        return self._trained(seed, attempt.records, attempt.brought) if attempt.brought else self._clean(seed)

    def _clean(self, seed: int) -> Trained:
        """The model of this seed that never saw an attacker's row."""
        if not seed:
            return self.trained
        if seed not in self._models:
            self._models[seed] = self._trained(seed, self.records, frozenset())
        return self._models[seed]

    def _trained(self, seed: int, records: Records, brought: frozenset[str]) -> Trained:
        recipe = replace(self.trained.recipe, seed=self.trained.recipe.seed + 7919 * seed)
        stands = records.where(lambda one, _: one in self.trained.ids or one in brought)
        return replace(train(recipe, stands), gone=self.trained.gone)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """Where a model is looked at."""

    world: str
    seed: int
    target: Target
    elsewhere: Records

    def outcome(self, arm: str, trained: Trained) -> Outcome:
        out = answers(trained, self.target)
        margins = margin(out, self.target)
        right = outputs(trained.module, self.elsewhere).argmax(1).cpu() == self.elsewhere.y.cpu()
        return Outcome(
            world=self.world,
            arm=arm,
            seed=self.seed,
            hit=float((margins > 0).double().mean()),
            margin=float(margins.double().mean()),
            loss=float(adversarial_loss(out, self.target)),
            accuracy=float(right.double().mean()),
            said=tuple(round(one, 6) for one in out[0].double().softmax(0).tolist()),
        )


def answers(trained: Trained, target: Target) -> Tensor:
    """(n, classes) outputs for the target's rows, on the CPU."""
    device = next(trained.module.parameters()).device
    rows = Records(target.x.to(device), target.y, classes=None)
    return outputs(trained.module, rows).cpu()


def carry_out(
    method: Method,
    trained: Trained,
    records: Records,
    requests: Sequence[Request],
    *,
    rng: torch.Generator,
    blind: bool = False,
) -> tuple[Trained, dict[str, Any]]:
    """The model after all requests in order, and the fields of an `Outcome` that say what it took.

    A request that the method refuses changes nothing and is recorded: its error's class and text. Requests by id are
    carried out by an exact method in one, which gives the same model. With `blind`, rows that the model was never
    trained on are taken for members, as by a provider that does not look.

    Raises:
        Misuse: before any work, if requests contradict each other; see `refuse_contradictions`.
    """
    _refuse_contradictions(trained, records, requests)
    seconds, gradients, refused = 0.0, 0, []
    for place, request in enumerate(_in_one(method, trained, requests)):
        try:
            if blind and request.kind == "remove_rows":
                trained, records, request = _taken_for_members(trained, records, request)
            came = _replacements(request, trained, records)
            answer = method(trained, records, request, rng=child(rng, "request", place))
        except ExpungeError as error:
            refused.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            continue
        trained, records = answer.trained, records if came is None else records.plus(came)
        seconds, gradients = seconds + answer.cost.seconds, gradients + answer.cost.gradients
    return trained, {"seconds": seconds, "gradients": gradients, "refused": tuple(refused)}


def _refuse_contradictions(trained: Trained, records: Records, requests: Sequence[Request]) -> None:
    by_place = {f"request {place}": one for place, one in enumerate(requests, start=1)}
    refuse_contradictions(by_place, records, ids=trained.ids, gone=trained.gone)


def _taken_for_members(trained: Trained, records: Records, request: Request) -> tuple[Trained, Records, Request]:
    try:
        request.split(records, ids=trained.ids, gone=trained.gone)
    except (UnknownRecord, NeverTrained):
        return naive(trained, records, request)
    return trained, records, request


def _replacements(request: Request, trained: Trained, records: Records) -> Records | None:
    """The rows that come in the stead of others, so that later requests find them."""
    if request.kind != "replace":
        return None
    split = request.split(records, ids=trained.ids, gone=trained.gone)
    return split.retain.where(lambda one, _: one in split.added) if split.added else None


def _in_one(method: Method, trained: Trained, requests: Sequence[Request]) -> Sequence[Request]:
    plain = all(one.kind == "remove" and one.by_id and set(one.ids) <= trained.ids for one in requests)
    if len(requests) < 2 or not plain or type(method).claim is not Claim.EXACT:
        return requests
    return (Request.remove(dict.fromkeys(name for one in requests for name in one.ids)),)


def _purged(requests: Requests) -> Requests:
    return tuple(Request.remove(one.ids) if one.kind == "replace" else one for one in requests)


def without_target(test: Records, target: Target) -> Records:
    """The test rows that are none of the target's, by content; Misuse if none is left."""
    own = {row.tobytes() for row in Records(target.x, target.y, classes=test.classes).digests()}
    left = test.select([i for i, row in enumerate(test.digests()) if row.tobytes() not in own])
    if not len(left):
        raise Misuse("all test rows are the target; give more, for accuracy elsewhere is measured on them")
    return left
