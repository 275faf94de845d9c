"""The base of all unlearning methods: checks, copies, times and books; a method only does the work."""

from __future__ import annotations

import copy
import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Generator, nn

from expunge.core.claim import Claim, Exactness, Guarantee
from expunge.core.errors import Misuse, NothingChanged, Unsupported
from expunge.core.events import AlreadyRemoved, Event, Removed, Replaced
from expunge.core.mask import Mask
from expunge.core.protocols import Cost, Need, Unlearned
from expunge.core.records import Records, seal
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.loop import Tally, warm_up
from expunge.learn.pruning import mask_of_zeros


@dataclass(frozen=True, kw_only=True)
class Task:
    """One removal to carry out.

    Attributes:
        trained: the model. For methods that are not exact its module is a private copy, to be written to freely.
        forget: the rows to remove; at least one.
        retain: the rows that stay, replacements included; at least one.
        tally: to be told of row gradients and rows read.
        moves: the entries that may change; `Steps` keeps the others as they are, zero or not. Of a pruned model pruned
            weights are never among them, and whatever a method does to those, the base sets them back. None: all may.
        zeros: the mask of a pruned model: what it holds is pruned, and zero in whatever a method builds in the model's
            stead. None: nothing is pruned. It lets move at least what `moves` does.
    """

    trained: Trained
    forget: Records
    retain: Records
    tally: Tally
    moves: Mask | None = None
    zeros: Mask | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """What `_apply` hands back: the model, and the guarantee and events if there are any.

    A method that proves nothing may keep a log in the model that it hands back, if that names no removed row and holds
    no update that a removed row was read for; `AmnesiacUnlearning` does.
    """

    trained: Trained
    guarantee: Guarantee | None = None
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """An unlearning method: its hyperparameters as fields, its work in `_apply`.

    Calling it checks the request, copies the model, does the work, times it, and books what is gone. The call is
    final; a method that cannot do what was asked raises, and never does something else instead.
    """

    claim: ClassVar[Claim] = Claim.NONE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN})
    source: ClassVar[str] = ""
    not_guaranteed: ClassVar[str] = "anything: what the model still remembers is unknown"

    @property
    def name(self) -> str:
        """The class's name in lower case with hyphens."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__).lower()

    @property
    def exactness(self) -> Exactness | None:
        """For exact methods: in which sense."""
        return None

    @property
    def learns_new(self) -> bool:
        """Whether rows that come as replacements are trained on, labels and all; if not, such requests are refused."""
        return Need.RETAIN in self.needs

    def supports(self, trained: Trained) -> Unsupported | None:
        """None if the method can work on this model, else the error that says why not and what to use."""
        if trained.parts and self.claim is not Claim.EXACT:
            return Unsupported(
                f"{self.name} changes one model, and this one has {len(trained.parts)} shards; use sisa or retrain"
            )
        return None

    @final
    def __call__(
        self, trained: Trained, records: Records, request: Request, *, rng: Generator, tally: Tally | None = None
    ) -> Unlearned:
        """Carry out the request.

        Args:
            trained: the model; never written to.
            records: the whole data set as registered. Rows that are gone may still be in it; they stay out.
            request: what to remove or replace.
            rng: names the coins; nothing is drawn from it.
            tally: counts the work, and is told of every row that training reads.

        Returns:
            The model after, with the claim, what it took, and what happened. A request that names nothing that is
            still there returns the model as it is, unless an exact method can make good what one without a claim did.

        Raises:
            UnknownRecord, NeverTrained, EmptyRetain: before any work; see `Request.split`.
            Unsupported: before any work, if this method cannot work on this model, or would not learn the rows that
                come as replacements; the message names one that can.
            NothingChanged: if a method that proves nothing left every parameter as it was.
            Misuse: if the method's step was so long that a parameter is no longer finite.
        """
        if not isinstance(rng, Generator):
            raise Misuse(f"rng must be a torch.Generator, got {type(rng).__name__}; use expunge.generator(0)")
        problem = self.supports(trained)
        if problem is not None:
            raise problem
        records.digests()  # computed once here, so that the selections made below share them
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        _refuse_other_rows(trained, split)
        if split.added and not self.learns_new:
            raise Unsupported(
                f"{self.name} learns no new rows, so that the {len(split.added):,} replacements would be lost; use "
                "fine-tune or retrain, or ask to have the rows removed"
            )
        noted: tuple[Event, ...] = (AlreadyRemoved(rows=split.already),) if split.already else ()
        warm_up()
        started = time.perf_counter()
        heals = split.already and self.claim is Claim.EXACT and trained.standing is not Claim.EXACT
        if not len(split.forget) and not heals:
            return self._identity(trained, noted)
        tally = Tally() if tally is None else tally
        work = trained if self.claim is Claim.EXACT else replace(trained, module=copy.deepcopy(trained.module))
        if self.claim is not Claim.CERTIFIED:
            work = replace(work, secret={})  # it would be of a model that is no more
        zeros = mask_of_zeros(trained.module) if trained.recipe.pruning is not None else None
        task = Task(trained=work, forget=split.forget, retain=split.retain, tally=tally, moves=zeros, zeros=zeros)
        done = self._apply(task, rng=rng)
        if zeros is not None and self.claim is not Claim.EXACT:
            zeros.prune_(done.trained.module)
        cost = Cost(seconds=time.perf_counter() - started, gradients=tally.gradients, rows_read=tally.rows_read)
        claim = self._claim_of(done)
        if claim is not Claim.EXACT:
            self._refuse_useless(trained.module, done.trained.module)
        events = noted + done.events + self._booked(split, claim)
        return Unlearned(
            trained=_booked_out(done.trained, trained, split, claim, _sense(self, trained)),
            claim=claim,
            exactness=_sense(self, trained) if claim is Claim.EXACT else None,
            guarantee=_with_history(done, trained, len(split.retain)),
            cost=cost,
            events=events,
        )

    @abstractmethod
    def _apply(self, task: Task, *, rng: Generator) -> Done:
        """Do the work on the task's model."""

    def _claim_of(self, done: Done) -> Claim:
        if self.claim is Claim.CERTIFIED and (done.guarantee is None or done.guarantee.basis == "none"):
            return Claim.NONE
        return self.claim

    def _identity(self, trained: Trained, noted: tuple[Event, ...]) -> Unlearned:
        exact = self.claim is Claim.EXACT and trained.standing is Claim.EXACT
        return Unlearned(
            trained=trained,
            claim=Claim.EXACT if exact else Claim.NONE,
            exactness=trained.exactness if exact else None,
            guarantee=None,
            cost=Cost(seconds=0.0),
            events=noted,
        )

    def _refuse_useless(self, before: nn.Module, after: nn.Module) -> None:
        old, new = before.state_dict(), after.state_dict()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new.values()):
            raise Misuse(f"{self.name} took steps so long that parameters are no longer finite; lower its lr")
        if old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old):
            raise NothingChanged(f"{self.name} left every parameter as it was, which removes nothing; see its settings")

    def _booked(self, split: Split, claim: Claim) -> tuple[Event, ...]:
        removed = Removed(method=self.name, claim=claim.value, rows=len(split.forget))
        return (removed, Replaced(rows=len(split.added))) if split.added else (removed,)


_UNCOVERED = (
    "Rows that methods without a claim removed before are covered by nothing here: their models were given out without "
    "noise, or without a bound."
)


_OTHER_BUDGET = (
    "Earlier releases had other noise or another cap: the budget was changed on the way, so that the one named here is "
    "not what was agreed on at first."
)
_LARGE_DELTA = (
    "Delta is not below one in the number of rows: so large a delta would allow giving whole rows away, and the "
    "guarantee is worth little."
)


def _with_history(done: Done, before: Trained, rows: int) -> Guarantee | None:
    """The guarantee, with remarks about what the model's history and size make of it."""
    guarantee = done.guarantee
    if guarantee is None:
        return None
    told = {
        _UNCOVERED: bool(before.gone) and before.standing is Claim.NONE,
        _OTHER_BUDGET: len({replace(release, parameters=()) for release in done.trained.releases}) > 1,
        _LARGE_DELTA: guarantee.delta * rows >= 1,
    }
    return replace(guarantee, remarks=(*guarantee.remarks, *(why for why, so in told.items() if so)))


def _sense(method: Method, before: Trained) -> Exactness | None:
    """Coins drawn anew once stay drawn anew: whoever drew them may have drawn until the result pleased."""
    return "in law" if method.exactness and before.exactness == "in law" else method.exactness


def _refuse_other_rows(trained: Trained, split: Split) -> None:
    """Misuse if the rows given under the model's ids are not those that it was trained on."""
    if trained.seal is None:
        return
    kept = split.retain.where(lambda record_id, _: record_id not in split.added) if split.added else split.retain
    if seal(kept, split.forget, salt=trained.seal.partition(":")[0]) != trained.seal:
        raise Misuse(
            "the records are not those that the model was trained on: under the same ids, content or owners differ; "
            "give the same data, read with the same options (columns, --owners)"
        )


def _booked_out(done: Trained, before: Trained, split: Split, claim: Claim, exactness: Exactness | None) -> Trained:
    """The result with its books kept: ids, gone, standing, and no log of rows that are gone."""
    forgotten = frozenset(split.forget.ids)
    exact = claim is Claim.EXACT
    return replace(
        done,
        ids=(before.ids - forgotten) | split.added,
        gone=before.gone | forgotten,
        log=done.log if exact or done.log is not before.log else None,
        seal=None if before.seal is None else seal(split.retain),
        exactness=exactness or before.exactness,
        releases=done.releases or before.releases,  # an exact method's new model has none; what was given out stays so
        standing=claim if exact else Claim.weaker(claim, before.standing),
    )
