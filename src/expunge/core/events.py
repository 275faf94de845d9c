"""What happened, as immutable values. An event's meaning never changes; new meanings get new events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from expunge.core.errors import Misuse


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a model. Holds counts and digests, never rows, ids or owners."""

    def to_json(self) -> dict[str, Any]:
        """The event's name and fields as plain JSON values."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Removed(Event):
    """`rows` rows were removed by `method`, which claims `claim`."""

    method: str
    claim: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Replaced(Event):
    """`rows` rows were replaced by as many others."""

    rows: int


@dataclass(frozen=True, kw_only=True)
class Retrained(Event):
    """Part `part` (-1: the whole model) was trained again on `rows` rows, from slice `from_slice` on."""

    part: int
    rows: int
    from_slice: int = 0


@dataclass(frozen=True, kw_only=True)
class AlreadyRemoved(Event):
    """`rows` of the requested rows were gone before; nothing was left to do for them."""

    rows: int


@dataclass(frozen=True, kw_only=True)
class SecretKept(Event):
    """Something derived from removed rows is kept in memory, never served or saved, and until when.

    Attributes:
        what: what it is, for people.
        requests_left: after at most so many more requests it is computed anew, without the rows removed by then.
        until: Unix time in seconds after which, at the latest, nothing may use it and it must be computed anew.
    """

    what: str
    requests_left: int
    until: float


@dataclass(frozen=True, kw_only=True)
class Release(Event):
    """Something that noise was added to was given out. Holds all that an accountant needs, and no conclusion.

    All its numbers are fixed before the request is known: never a residual, a step count that the data decided, or a
    time.

    Attributes:
        parameters: names of the parameters that were given out with noise.
    """

    parameters: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The event's name and fields as plain JSON values; `release_from_json` reads it."""
        return {**super().to_json(), "parameters": list(self.parameters)}


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Release):
    """N(0, sigma^2 I) was added once to parameters within `sensitivity` (L2) of those of the reference."""

    sensitivity: float
    sigma: float


@dataclass(frozen=True, kw_only=True)
class ClippedSteps(Release):
    """Noisy steps from a clipped start (Koloskova et al., 2025): their gradients were clipped, not the model.

    ``w <- clip(w, start)``; then `steps` times ``w <- w - lr (clip(g, gradient) + weight_decay w) + N(0, sigma^2)``.
    """

    start: float
    gradient: float
    lr: float
    weight_decay: float
    steps: int
    sigma: float


@dataclass(frozen=True, kw_only=True)
class ClippedModels(Release):
    """Noisy steps, the model clipped before each addition of noise (Koloskova et al., 2025).

    `steps` times ``w <- clip(any step(w), radius) + N(0, sigma^2)``.
    """

    radius: float
    steps: int
    sigma: float


@dataclass(frozen=True, kw_only=True)
class PrivateSteps(Release):
    """Training by DP-SGD (Abadi et al., 2016): Poisson batches, rows' gradients clipped, Gaussian noise on their sum.

    Attributes:
        rate: chance of each row to be in a step's batch.
        noise: standard deviation of the noise over the clipping norm.
        steps: steps made.
        group: rows that may be removed together.
    """

    rate: float
    noise: float
    steps: int
    group: int


_RELEASES = {kind.__name__: kind for kind in (GaussianNoise, ClippedSteps, ClippedModels, PrivateSteps)}


def release_from_json(data: Mapping[str, Any]) -> Release:
    """The release that `to_json` wrote; Misuse for any other event."""
    kind = _RELEASES.get(str(data.get("event")))
    if kind is None or set(data) != {"event", *(field.name for field in fields(kind))}:
        raise Misuse(f"this is no release of noise: {dict(data)}; known: {', '.join(_RELEASES)}")
    values = {name: value for name, value in data.items() if name != "event"}
    return kind(**{**values, "parameters": tuple(data["parameters"])})
