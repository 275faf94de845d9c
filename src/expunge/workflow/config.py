"""A workspace's settings: `expunge.toml`, every key explained in the file itself."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from expunge.core.errors import Misuse, UnreadableFile
from expunge.ledger.clock import REGIMES, Clock

TEMPLATE = """\
# The settings of this expunge workspace.

[ledger]
# Where requests, events and certificates are kept: a file in this folder, or postgresql://user@host/database.
url = {url}
# The log's name on every checkpoint. Never change it: owners hold checkpoints that carry it.
origin = {origin}
# Where the last signed checkpoint is kept. Put it on another disk, so that a restored old backup is noticed.
anchor = "last-checkpoint"

[clock]
# gdpr: one calendar month, two more if extended; ccpa: 45 days, 45 more.
regime = "gdpr"
# Days end in this zone.
zone = "UTC"
# Days that are no working days, beside weekends, as 2026-12-25. Only gdpr asks.
holidays = []

[batch]
# One unlearning run honours many requests: it begins when so many wait ...
count = 1
# ... or when the oldest has waited so long ...
wait_hours = 24
# ... and honours at most so many.
most = 1000

[policy]
# What happens to a request that a screen flags: "hold" it for a person, or send it to "exact" retraining at once.
on_flag = "hold"
# Requests are screened for attacks at this false-alarm rate, the share of honest ones that is flagged too; 0: they
# are not screened. 0.05 is usual.
screen = 0.0
# Exact retraining leaves a transcript beside the model, and this share of its training is trained again before the
# release, drawn after the transcript was committed to; 0: no transcript is left, and nothing is replayed. 1: all of
# it, which at least doubles the cost.
replay = 0.0
# A request whose sender has not proved who they are ends after so many days.
identity_days = 30
# Owners can fetch the keys to their records for so many days after completion; then they are destroyed.
keys_days = 30

# Models are added below by: expunge register-model
"""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a run begins, and what follows from a screen's flag.

    Attributes:
        count: a run begins when so many requests wait,
        wait_hours: or the oldest has waited so long.
        most: requests in one run.
        on_flag: ``hold`` or ``exact``.
        screen: false-alarm rate at which requests are screened for attacks; 0: they are not.
        replay: share of an exact retraining that is trained again, from its transcript; 0: there is none.
        identity_days: after which an unverified request ends.
        keys_days: after which the keys to removed records are destroyed.
        lease_s: a worker that is not heard of for so long may be replaced.
    """

    count: int = 1
    wait_hours: float = 24.0
    most: int = 1000
    on_flag: str = "hold"
    screen: float = 0.0
    replay: float = 0.0
    identity_days: float = 30.0
    keys_days: float = 30.0
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        if self.on_flag not in ("hold", "exact"):
            raise Misuse(f'on_flag must be "hold" or "exact", got {self.on_flag!r}; a flagged request is never dropped')
        if type(self.screen) not in (int, float) or not 0 <= self.screen <= 0.5:
            raise Misuse(f"screen must be a false-alarm rate from 0 (no screening) to 0.5, got {self.screen!r}")
        if type(self.replay) not in (int, float) or not 0 <= self.replay <= 1:
            raise Misuse(f"replay must be a share of the training from 0 (none) to 1 (all), got {self.replay!r}")
        for name in ("count", "most"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise Misuse(f"{name} must be >= 1 and a whole number, got {getattr(self, name)!r}")
        for name in ("wait_hours", "identity_days", "keys_days"):
            if type(getattr(self, name)) not in (int, float) or not 0 <= getattr(self, name) < math.inf:
                raise Misuse(f"{name} must be >= 0 and a number, got {getattr(self, name)!r}")
        if type(self.lease_s) not in (int, float) or not 0 < self.lease_s < math.inf:
            raise Misuse(f"lease_s must be > 0 and a number, got {self.lease_s!r}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `expunge.toml` says.

    Attributes:
        url: of the ledger; relative SQLite paths start from the workspace.
        origin: the log's name.
        anchor: where the last checkpoint is kept, outside the database.
        clock: when requests are due.
        policy: when and how runs begin.
        models: for each model: where its data comes from, and its method, as the command line reads them.
    """

    url: str
    origin: str
    anchor: str
    clock: Clock
    policy: Policy
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read the file; UnreadableFile or Misuse, naming the key, for what cannot be meant."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Misuse(f"{path.parent} is no workspace; make one with: expunge init {path.parent}") from None
        except (OSError, ValueError) as error:
            raise UnreadableFile(f"{path} cannot be read ({error}); mend it") from None
        _refuse_unknown(path, data)
        ledger = {"anchor": "last-checkpoint", **data.get("ledger", {})}
        for name in sorted(_KNOWN["ledger"]):
            if name not in ledger:
                raise Misuse(f"{path} lacks '{name}' under [ledger]; see the file that expunge init writes")
            if not isinstance(ledger[name], str) or not ledger[name]:
                raise Misuse(f"{name} under [ledger] must be text, got {ledger[name]!r}; mend {path}")
        return cls(
            **ledger,
            clock=_clock(data.get("clock", {})),
            policy=Policy(**data.get("batch", {}), **data.get("policy", {})),
            models=data.get("models", {}),
        )


_KNOWN: Mapping[str, frozenset[str]] = {
    "ledger": frozenset({"url", "origin", "anchor"}),
    "clock": frozenset({"regime", "zone", "holidays"}),
    "batch": frozenset({"count", "wait_hours", "most"}),
    "policy": frozenset({"on_flag", "screen", "replay", "identity_days", "keys_days", "lease_s"}),
}
"""The parts of the file, and the settings in each; the models' parts are the command line's."""


def _refuse_unknown(path: Path, data: Mapping[str, Any]) -> None:
    parts = [*_KNOWN, "models"]
    for part, settings in data.items():
        if part not in parts:
            raise Misuse(f"{path} has an unknown part [{part}]; it has {', '.join(sorted(parts))}")
        if not isinstance(settings, dict):
            raise Misuse(f"{part} must be a part, [{part}], with settings of its own, got {settings!r}; mend {path}")
        for name, value in settings.items():
            if part == "models" and not isinstance(value, dict):
                raise Misuse(f"{name} under [models] must be a part, [models.{name}], got {value!r}; mend {path}")
            if part != "models" and name not in _KNOWN[part]:
                known = ", ".join(sorted(_KNOWN[part]))
                raise Misuse(f"{path} has an unknown setting {name} under [{part}]; settings there are {known}")


def _clock(data: Mapping[str, Any]) -> Clock:
    regime, holidays = data.get("regime", "gdpr"), data.get("holidays", [])
    if not isinstance(regime, str) or regime not in REGIMES:
        raise Misuse(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}")
    if not isinstance(holidays, list):
        raise Misuse(f"holidays must be a list of dates, got {holidays!r}; write [2026-12-25]")
    days = [day.isoformat() if isinstance(day, date) else day for day in holidays]
    base = Clock(regime=REGIMES[regime]).to_json()
    return Clock.from_json({**base, "zone": data.get("zone", "UTC"), "holidays": days})
