"""Extractors made from other rows than the head's: found to be so by training anew and by comparing rows, not told.

What is found and what not. Training is a function of recipe and rows, to the byte, so that an extractor with the bytes
that training anew gives holds nothing of any other row, whoever made it and whatever is said of it. That none of the
head's rows is among its rows is found by comparing contents. Whether its rows, or their labels, were made from the
head's rows in some other way (a crop, a copy in other colours, labels by a model that saw them) cannot be found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from expunge.certify.before_head import (
    ROWS_SHARED,
    TENSORS_CHANGED,
    Said,
    body_of,
    differing,
    named,
    outside,
)
from expunge.certify.constants import checked, setting, supplied
from expunge.certify.contents import contents
from expunge.core.claim import Claim, Constant
from expunge.core.digest import canonical_json
from expunge.core.errors import Misuse, Unsupported
from expunge.core.records import Records, seal
from expunge.core.trained import State, Trained
from expunge.learn.build import build
from expunge.learn.loop import threads
from expunge.learn.models import MODELS, head_of
from expunge.learn.training import train

_MARK = ".extractor"


@dataclass(frozen=True, kw_only=True, eq=False)
class DisjointExtractor:
    """An extractor with the rows that it was trained on, so that `NewtonHead` can find that they are others.

    At each request, before any work: what comes before the head has the bytes that training the extractor anew on
    `rows` gives, and no row under the head, staying or leaving, equals one of `rows` by content, whatever its label, id
    and owner, and however the same values are stored (see `contents`).

    Not found: near copies (a crop, a recoloured, rescaled or compressed picture); rows or labels of the extractor that
    were made from the head's rows; other rows of the same owner; and that recipe, weight decay, sigma, `outputs` and
    the choice of just this extractor were made without looking at the head's rows.

    Cost: one training of the extractor for each such value, at its first use; then a digest of the extractor's state a
    request. Rows are compared once for each tensor that holds them, streamed rows at each request.

    Attributes:
        trained: the extractor with the head that it was trained with: one of expunge's own networks, by `train`.
        rows: exactly the rows that it is trained on, with their ids and owners.
        outputs: the number of classes (or targets) of the head that stands on it, said without looking at its rows.
        again: train it anew, to see that it comes from `rows`. Without that, somebody vouches for it, and what rests on
            it is conditional.

    Raises:
        Misuse: if `rows` are not those that the model's seal commits to, if another method than training made it, or if
            nothing comes before its head.
        Unsupported: for shards, and for other models than expunge's own, whose making may read anything.
    """

    trained: Trained
    rows: Records
    outputs: int
    again: bool = True
    _clear: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary, init=False, repr=False)

    def __post_init__(self) -> None:
        problem = _problem_of(self.trained)
        if problem is not None:
            raise problem
        if not isinstance(self.outputs, int) or self.outputs < 1:
            raise Misuse(f"outputs must be the number of classes of the head, an integer >= 1, got {self.outputs!r}")
        if self.trained.standing is not Claim.EXACT or self.trained.seal is None:
            raise Misuse(
                f"the extractor must be as train made it on its rows, got standing {self.trained.standing.value} and "
                f"{'no seal' if self.trained.seal is None else 'a seal'}; train it anew"
            )
        salt = self.trained.seal.partition(":")[0]
        if frozenset(self.rows.ids) != self.trained.ids or seal(self.rows, salt=salt) != self.trained.seal:
            raise Misuse(
                "the extractor's seal is of other rows, ids or owners than were given; give exactly the records that "
                "it was trained on, select them with records.take(ids)"
            )
        if not body_of(self.trained.module)[1:]:
            raise Misuse("nothing with parameters comes before the head of this extractor; leave extractor out")

    def examine(self, trained: Trained, *parts: Records) -> Said:
        """What can be said of what comes before this head, which stands on these rows.

        Raises:
            Misuse: if a row is one of the extractor's, if what comes before the head is not the extractor, or if the
                head has another number of outputs than was said.
        """
        outputs = head_of(trained.module)[1].out_features
        if outputs != self.outputs:
            raise Misuse(f"the head has {outputs} outputs, and {self.outputs} were said beforehand; give one of them")
        changed = differing(body_of(trained.module), self._made)
        if changed:
            how = "what training the extractor anew gives" if self.again else "the extractor"
            raise Misuse(
                f'what comes before the head is not {how}: {len(changed)} parts differ, first "{changed[0]}"; it was '
                "changed, or not made from these rows, or on another machine or thread count"
            )
        for records in parts:
            self._refuse_shared(records)
        return Said(constants=self._constants(self._knows_gone(trained)), remarks=self._remarks(trained))

    def counted(self, trained: Trained, *parts: Records) -> dict[str, float]:
        """What `CHECKS` count, counted from nothing that is remembered: the extractor is trained anew once more.

        For `recheck`, by whoever holds the model, the rows under its head, and the extractor with its rows.
        """
        fresh = replace(self, again=True)
        shared = sum(1 for records in parts for _ in fresh._shared(records))
        changed = differing(body_of(trained.module), fresh._made)
        return {ROWS_SHARED.gives: float(shared), TENSORS_CHANGED.gives: float(len(changed))}

    def mark(self, gone: frozenset[str]) -> Tensor:
        """What a head keeps in memory to show that these rows were compared before they were removed."""
        name = canonical_json([self.trained.seal, [list(pair) for pair in self._made], sorted(gone)])
        return torch.tensor(list(hashlib.sha256(name).digest()), dtype=torch.uint8)

    def marked(self, trained: Trained, gone: frozenset[str]) -> State:
        """What a head keeps once `gone` are gone, if all that went before was compared too; else nothing."""
        return {_MARK: self.mark(gone)} if self._knows_gone(trained) else {}

    def _knows_gone(self, trained: Trained) -> bool:
        """Whether all rows that were removed before were compared as these are."""
        kept = trained.secret.get(_MARK)
        return not trained.gone or (kept is not None and torch.equal(kept, self.mark(trained.gone)))

    def _constants(self, knows_gone: bool) -> dict[str, Constant]:
        constants = {
            "extractor_outputs": setting(self.outputs, "method.extractor.outputs"),
            ROWS_SHARED.gives: checked(ROWS_SHARED),
        }
        if self.again:
            constants[TENSORS_CHANGED.gives] = checked(TENSORS_CHANGED)
        else:
            constants["extractor_comes_from_its_rows"] = supplied(1.0)
        if not knows_gone:
            constants["rows_removed_before_are_not_the_extractor_s"] = supplied(1.0)
        return constants

    def _remarks(self, trained: Trained) -> tuple[str, ...]:
        how = "was trained anew here, to the same bytes, on" if self.again else "is said to have been trained on"
        recipe, before = self.trained.recipe.digest()[:16], named(outside(trained.module))
        remarks = (
            f"What comes before the head ({before}) {how} {len(self.rows):,} other rows (recipe {recipe}, rows "
            f"{self.trained.seal}); no row under the head is one of them by content.",
            "Near copies are not found, nor rows or labels of the extractor that were made from rows under the head, "
            "nor the same person in other rows: what it learnt of those stays in it.",
        )
        if self._knows_gone(trained):
            return remarks
        return (
            *remarks,
            "Rows were removed before that were not compared with the extractor's in this process, as when the model "
            "was read from disk: whoever runs this vouches that they were none of them.",
        )

    def _refuse_shared(self, records: Records) -> None:
        clear = None
        if not records.streamed:
            tensor, places = records.shared()
            clear = self._clear.setdefault(tensor, torch.zeros(len(tensor), dtype=torch.bool))
            if bool(clear[places].all()):
                return
        found = list(self._shared(records))
        if found:
            mine, theirs = found[0]
            raise Misuse(
                f'record "{mine}" is by content "{theirs}", which the extractor was trained on ({len(found):,} such); '
                "train the extractor without it, or leave it out of the head's rows"
            )
        if clear is not None:
            clear[places] = True

    def _shared(self, records: Records) -> Iterator[tuple[str, str]]:
        """Ids of rows that are rows of the extractor, each with the extractor's."""
        for position, found in contents(records):
            theirs = next((self._known[one] for one in found if one in self._known), None)
            if theirs is not None:
                yield records.ids[position], self.rows.ids[theirs]

    @cached_property
    def _known(self) -> dict[bytes, int]:
        return {one: position for position, found in contents(self.rows) for one in found}

    @cached_property
    def _made(self) -> tuple[tuple[str, str], ...]:
        """What training anew puts before the head."""
        if not self.again:
            return body_of(self.trained.module)
        log = self.trained.log
        with nullcontext() if log is None else threads(log.threads):
            return body_of(train(self.trained.recipe, self.rows).module)


class Begins(Protocol):
    """A method whose first model is a head on an extractor: `NewtonHead`."""

    @property
    def extractor(self) -> DisjointExtractor | None:
        """What the head stands on."""

    def begin(self, trained: Trained, records: Records) -> Trained:
        """The model with its head fitted and noise on it."""


def head_on(method: Begins, records: Records, *, weight_decay: float, loss: str = "cross_entropy") -> Trained:
    """A new head on the method's extractor, fitted to these rows, which the extractor never reads in training.

    Args:
        method: a `NewtonHead` with an `extractor`.
        records: what the head is fitted to and stands on; as many classes as the extractor's value says, or fewer.
        weight_decay: of the head's objective (lambda), chosen without looking at the rows.
        loss: of the head's objective.

    Returns:
        The model with noise on its head, as `NewtonHead.begin` gives it. Its recipe says how the head is fitted;
        methods that train the whole network by it would train the extractor on these rows, and the next certified
        request refuses such a model.

    Raises:
        Misuse: as `DisjointExtractor.examine`, and without an extractor.
        Unsupported: as `NewtonHead.supports`.
    """
    extractor = method.extractor
    if extractor is None:
        raise Misuse("head_on needs a method with an extractor; give NewtonHead(extractor=DisjointExtractor(...))")
    theirs = extractor.trained.recipe
    recipe = replace(
        theirs,
        model_args={**theirs.model_args, "outputs": extractor.outputs},
        loss=loss,
        weight_decay=weight_decay,
        pruning=None,
        max_norm=None,
    ).completed(records)
    module = build(recipe).to(records.device)
    head = (f"{head_of(module)[0]}.weight", f"{head_of(module)[0]}.bias")
    body = {name: tensor for name, tensor in extractor.trained.module.state_dict().items() if name not in head}
    module.load_state_dict(body, strict=False)
    bare = Trained(module=module.eval(), recipe=recipe, ids=frozenset(records.ids), seal=seal(records))
    return method.begin(bare, records)


def _problem_of(trained: Trained) -> Unsupported | None:
    if trained.parts or trained.recipe.sharding is not None:
        return Unsupported("shards cannot be an extractor, as their votes have no features; train one model")
    known = MODELS.get(trained.recipe.model)
    if known is None or type(trained.module) is not known:
        return Unsupported(
            f'an extractor is one of {", ".join(MODELS)}, got "{trained.recipe.model}", whose making may read anything '
            "else; vouch for it with public_extractor=True, which is conditional"
        )
    return None
