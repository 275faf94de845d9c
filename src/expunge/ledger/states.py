"""The states of a request, the steps between them, and the only reasons for which one may be denied."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from expunge.core.errors import Impossible, Misuse, NotNow


class State(StrEnum):
    """Where a request stands."""

    RECEIVED = "received"
    IDENTITY_UNVERIFIED = "identity_unverified"
    SCREENING = "screening"
    HELD = "held"
    PENDING = "pending"
    RUNNING = "running"
    VERIFYING = "verifying"
    WITHHELD = "withheld"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DENIED = "denied"

    @property
    def final(self) -> bool:
        """True if nothing follows."""
        return not STEPS[self]


_S = State
_OPEN = frozenset({_S.CANCELLED, _S.DENIED})
STEPS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        _S.RECEIVED: _OPEN | {_S.SCREENING, _S.IDENTITY_UNVERIFIED},
        _S.IDENTITY_UNVERIFIED: _OPEN | {_S.RECEIVED, _S.EXPIRED},
        _S.SCREENING: _OPEN | {_S.PENDING, _S.HELD},
        _S.HELD: _OPEN | {_S.PENDING, _S.SCREENING},
        _S.PENDING: _OPEN | {_S.RUNNING},
        _S.RUNNING: frozenset({_S.VERIFYING, _S.FAILED}),
        _S.VERIFYING: frozenset({_S.COMPLETED, _S.WITHHELD, _S.FAILED}),
        _S.WITHHELD: frozenset({_S.PENDING, _S.VERIFYING}),
        _S.FAILED: _OPEN | {_S.PENDING},
        _S.COMPLETED: frozenset(),
        _S.CANCELLED: frozenset(),
        _S.EXPIRED: frozenset(),
        _S.DENIED: frozenset(),
    }
)

DENIALS: Mapping[str, str] = MappingProxyType(
    {
        "insuf_verification": "who asked could not be identified",
        "suspected_fraud": "who asked seems to be somebody else; only while the identity is unverified",
        "no_match": "no record of who asked is held",
        "claim_not_covered": "the law invoked gives no right to this erasure (a legal duty to keep the data, say)",
        "outside_jurisdiction": "the law invoked does not apply to who asked",
        "too_many_requests": "manifestly excessive repetition (GDPR, article 12(5)); the burden of proof is yours",
    }
)
"""The denial reasons of the Data Rights Protocol that are legal or of identity, and what each means here."""

_OF_A_SCREEN = frozenset(
    {"flagged", "screen", "screening", "screened_out", "malicious", "attack", "poison", "influence"}
)


def refuse_step(request: str, now: State, to: State) -> None:
    """NotNow if a request cannot go from one state to the other."""
    if to not in STEPS[now]:
        can = ", ".join(sorted(step.value for step in STEPS[now])) or "nothing: it is final"
        raise NotNow(f"request {request} is {now.value} and cannot become {to.value}; it can become {can}")


def refuse_denial(request: str, now: State, reason: str) -> None:
    """Refuse every reason to deny a request that is neither legal nor of identity.

    Raises:
        Impossible: for a screen's flag: a valid erasure is carried out by an exact method, never refused.
        Misuse: for any other word that is not among `DENIALS`.
    """
    if reason in _OF_A_SCREEN or (reason == "suspected_fraud" and now is not State.IDENTITY_UNVERIFIED):
        raise Impossible(
            f'request {request} cannot be denied as "{reason}": that an erasure looks dangerous is no reason to refuse '
            "it; release it, with --exact if in doubt, and it is carried out by exact retraining"
        )
    if reason not in DENIALS:
        raise Misuse(f'"{reason}" is no reason to deny an erasure; reasons are {", ".join(DENIALS)}')
