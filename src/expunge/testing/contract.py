"""Checks of the contract that every method keeps, whatever it claims."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.digest import digest_tensors
from expunge.core.errors import ExpungeError, NeverTrained, UnknownRecord, Unsupported
from expunge.core.protocols import Unlearned, Verdict
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import row_losses
from expunge.learn.predict import outputs
from expunge.learn.training import adopt
from expunge.testing.case import Case, private_copy
from expunge.testing.trial import (
    NamedCheck,
    Trial,
    differing,
    distance,
    footprint,
    footprint_of_rows,
    noise_hides,
    other_global_coins,
    state_of,
)
from expunge.testing.watch import WriteWatch


class InputUntouched(NamedCheck):
    """After the call, model, records and request are as they were: values, flags, gradients, books."""

    name: ClassVar[str] = "input-untouched"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Compare footprints taken before and after one call."""
        trained, records, request = subject.start(), subject.case.records, subject.case.request
        model, rows, asked = footprint(trained), footprint_of_rows(records), dict(vars(request))
        subject.call(trained)
        changed = differing(model, footprint(trained)) + differing(rows, footprint_of_rows(records))
        changed += [name for name, was in asked.items() if getattr(request, name) is not was]
        return self.unless([f"{name} changed" for name in changed], "model, records and request are as they were")


class ReferenceFixed(NamedCheck):
    """During the call nothing is written to the model that was passed in, not even for a while."""

    name: ClassVar[str] = "reference-fixed"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Watch every tensor operation of one call."""
        trained = subject.start()
        with WriteWatch([trained.module, *(part.module for part in trained.parts)]) as watch:
            subject.call(trained)
        first = watch.writes[:1]
        problems = [f"{len(watch.writes):,} writes to the model passed in, first: {write}" for write in first]
        return self.unless(problems, "no operation wrote to the model passed in", writes=len(watch.writes))


class Deterministic(NamedCheck):
    """The same coins give the same bytes, wherever the global generators stand, and leave those alone.

    Of a certified method: the same state before noise, and never the same noise.
    """

    name: ClassVar[str] = "deterministic"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Run twice with one generator object, the global generators moved in between."""
        coins = generator(11)
        with other_global_coins(1):
            one, moved = self._run(subject, coins)
        with other_global_coins(2):
            other, moved_again = self._run(subject, coins)
        problems = [f"moves the global generator of {name}" for name in sorted({*moved, *moved_again})]
        if not noise_hides(one) and digest_tensors(state_of(one)) != digest_tensors(state_of(other)):
            problems.append("the same coins gave other bytes")
        if one.claim is Claim.CERTIFIED and one.trained.digest() == other.trained.digest():
            problems.append("two certified releases carry the same noise")
        return self.unless(problems, "same coins, same bytes; global generators left alone")

    @staticmethod
    def _run(subject: Trial, coins: Generator) -> tuple[Unlearned, list[str]]:
        before = _global_coins()
        result = subject.call(subject.start(), coins=coins)
        after = _global_coins()
        return result, [name for name, state in before.items() if after[name] != state]


def _global_coins() -> dict[str, object]:
    state = np.random.get_state()  # noqa: NPY002 - only looks whether somebody else uses it
    return {"torch": torch.get_rng_state().numpy().tobytes(), "python": random.getstate(), "numpy": repr(state)}


class IdentityOnEmpty(NamedCheck):
    """A request that names nothing, or only what is gone already, returns parameters and books as they are."""

    name: ClassVar[str] = "identity-on-empty"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Ask for nothing, then ask for the same removal a second time."""
        start, first = subject.start(), private_copy(subject.first.trained)
        problems = []
        for what, before, ids in (("nothing", start, ()), ("what is gone", first, subject.case.forget.ids)):
            was = before.digest()
            after = subject.call(before, ids).trained
            changed = ["parameters"] * (after.digest() != was)
            changed += [name for name in ("ids", "gone") if getattr(after, name) != getattr(before, name)]
            problems += [f"asked for {what}, it changed {name}" for name in changed]
        return self.unless(problems, "asked for nothing, or for what is gone, it changes nothing")


class RowOrder(NamedCheck):
    """The order of the rows in the records, and of the ids in the request, changes nothing.

    Order that matters ties a result to positions, and positions shift when a row is removed.
    """

    name: ClassVar[str] = "row-order"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Run on permuted rows with reversed ids."""
        records = subject.case.records
        shuffled = records.select(torch.randperm(len(records), generator=rng))
        other = subject.call(subject.start(), subject.case.forget.ids[::-1], records=shuffled)
        return self.alike(subject, subject.first, other, "another order of rows")


class UnknownRefused(NamedCheck):
    """An unknown id raises UnknownRecord, a never-trained one NeverTrained, also among good ids; nothing changes."""

    name: ClassVar[str] = "unknown-refused"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Ask for one good id and one bad."""
        case = subject.case
        records = case.records.plus(_renamed(case.test.select([0]), "expunge-stranger"))
        trained = subject.start()
        before = footprint(trained)
        problems = []
        for bad, wanted in (("expunge-nobody", UnknownRecord), ("expunge-stranger", NeverTrained)):
            raised = _raised(lambda bad=bad: subject.call(trained, [case.forget.ids[0], bad], records=records))  # type: ignore[misc]
            if raised is not wanted:
                problems.append(f'"{bad}" gave {raised.__name__ if raised else "no error"}, not {wanted.__name__}')
        problems += [
            f"{name} changed although the request was refused" for name in differing(before, footprint(trained))
        ]
        return self.unless(problems, "unknown and never-trained ids are refused before any work")


def _renamed(rows: Records, name: str) -> Records:
    return Records(rows.x, rows.y, [name], [name], classes=rows.classes)


def _raised(call: Callable[[], object]) -> type[ExpungeError] | None:
    try:
        call()
    except ExpungeError as error:
        return type(error)
    return None


class NoSilentFallback(NamedCheck):
    """What `supports` says cannot be done raises Unsupported when asked for; nothing else is done in its stead."""

    name: ClassVar[str] = "no-silent-fallback"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Try the case's recipes, and a model that was trained elsewhere."""
        case = subject.case
        models = {f"recipe {place}": case.model(subject.train, recipe) for place, recipe in enumerate(case.recipes)}
        models["adopted"] = adopt(models["recipe 0"].module, case.recipes[0], case.records)
        refused = {name: model for name, model in models.items() if subject.method.supports(model) is not None}
        problems = []
        for name, model in refused.items():
            raised = _raised(lambda model=model: subject.call(model))  # type: ignore[misc]
            if raised is None or not issubclass(raised, Unsupported):
                problems.append(f"says it does not support {name}, and then does something with it")
        return self.unless(problems, f"refuses {len(refused)} of {len(models)} kinds of model, as it says")


class NotANoop(NamedCheck):
    """Removing rows changes the parameters, or raises; returning the model as it was is not called done."""

    name: ClassVar[str] = "not-a-noop"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Compare the parameters before and after; of a certified result, those before noise."""
        before = subject.start().module.state_dict()
        try:
            after = state_of(subject.first)
        except ExpungeError as error:
            return self.passed(f"refuses: {error}")
        moved = distance(before, after)
        return self.unless(["the parameters are as they were"] * (moved == 0), "the parameters changed", moved=moved)


class ReplacementsLearnt(NamedCheck):
    """A request to replace rows is refused, naming what to use, or the rows that come are learnt.

    Learnt: they are booked, with other labels they give another model, and they are answered better than after the
    removal of the old ones alone. Else the books name rows as trained on that no training read.
    """

    name: ClassVar[str] = "replacements-learnt"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Replace the case's rows by test rows with wrong labels, then by the same with their own."""
        case, trained = subject.case, subject.start()
        wrong, right = (_replacing(case, wrong) for wrong in (True, False))
        before = footprint(trained)
        try:
            one = subject.call(trained, wrong)
        except Unsupported as error:
            problems = [
                f"{name} changed although the request was refused" for name in differing(before, footprint(trained))
            ]
            problems += ["refuses without saying what to use"] * ("use " not in str(error))
            return self.unless(problems, f"refuses: {error}")
        new = wrong.split(case.records, ids=trained.ids, gone=trained.gone).added
        problems = ["the rows that came are not booked"] * (
            one.trained.ids != (trained.ids - set(case.forget.ids)) | new
        )
        if noise_hides(one):
            return Verdict(check=self.name, outcome="inconclusive", why="the result keeps no state without noise")
        other = subject.call(subject.start(), right)
        if digest_tensors(state_of(one)) == digest_tensors(state_of(other)):
            problems.append("whatever their labels, the rows that came give the same model: they are not trained on")
        learnt, removed = (_loss(result, wrong) for result in (one, subject.first))
        if not learnt < removed:
            problems.append(
                f"the rows that came are answered no better for it: loss {learnt:.4g}, and {removed:.4g} without"
            )
        return self.unless(problems, "the rows that came are learnt", learnt=learnt, removed=removed)


def _replacing(case: Case, wrong: bool) -> Request:
    """The case's rows replaced by test rows, each with another class than its own (regression: with one more)."""
    pool = case.test.select(range(min(len(case.test), len(case.forget))))
    place = torch.arange(len(case.forget)) % len(pool)
    x, y = pool.x[place], pool.y[place]
    if wrong:
        y = y + 1 if case.records.classes is None else (y + 1) % case.records.classes
    return Request.replace_rows(case.forget.ids, x, y)


def _loss(result: Unlearned, request: Request) -> float:
    """Mean loss of the request's rows on what the coins determine of a result."""
    copied = private_copy(result.trained)
    copied.module.load_state_dict(dict(state_of(result)))
    x, y = _rows(request)
    answers = outputs(copied.module, Records(x, y))
    return float(row_losses(copied.recipe)(answers, y).double().mean())


def _rows(request: Request) -> tuple[Tensor, Tensor]:
    if request.x is None or request.y is None:
        raise ValueError("a request to replace rows has rows")
    return request.x, request.y


CONTRACT: tuple[NamedCheck, ...] = (
    InputUntouched(),
    ReferenceFixed(),
    Deterministic(),
    IdentityOnEmpty(),
    RowOrder(),
    UnknownRefused(),
    NoSilentFallback(),
    NotANoop(),
    ReplacementsLearnt(),
)
