"""The fallback: what is served when a model cannot be mended and is retired."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Generator

from expunge.core.claim import Claim
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Cost, Need, Unlearned
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained


@dataclass(frozen=True, kw_only=True, eq=False)
class FallBack:
    """Serve another model, which never read the records that must go. Claims nothing: it is no unlearning.

    Attributes:
        model: the other model, trained on some of the same records.
    """

    claim: ClassVar[Claim] = Claim.NONE
    needs: ClassVar[frozenset[Need]] = frozenset()
    model: Trained

    @property
    def name(self) -> str:
        """The method's name."""
        return "fall-back"

    def supports(self, trained: Trained) -> Unsupported | None:
        """It can stand in for any model."""
        return None

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """The other model, with the books of this one.

        Raises:
            Misuse: if it was trained on a record that must go, or on one that the model does not stand on.
        """
        started = time.perf_counter()
        forget = frozenset(request.split(records, ids=trained.ids, gone=trained.gone).forget.ids)
        if self.model.standing is not Claim.EXACT:
            raise Misuse(
                "nobody can tell what the fallback has read, for it was changed after training; declare another"
            )
        if self.model.ids & forget:
            raise Misuse("the fallback was trained on records that must go; declare one that was not")
        if self.model.ids - trained.ids:  # gone ones among them
            raise Misuse("the fallback was trained on records that the model does not stand on; declare another")
        after = replace(self.model, gone=trained.gone | forget, releases=trained.releases)
        return Unlearned(
            trained=after,
            claim=Claim.NONE,
            exactness=None,
            guarantee=None,
            cost=Cost(seconds=time.perf_counter() - started),
        )
