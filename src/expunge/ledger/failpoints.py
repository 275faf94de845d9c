"""Named instants at which a test kills the process, to show that nothing is lost whenever it dies.

``EXPUNGE_FAIL_AT="before commit:3"`` kills it, as if by ``kill -9``, the third time that it comes there.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

POINTS = ("before update", "before commit", "after commit", "after save", "after switch", "after erase", "after sign")

_seen: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Die here if the environment says so; else nothing."""
    wanted = os.environ.get("EXPUNGE_FAIL_AT")
    if wanted is None:
        return
    point, _, count = wanted.partition(":")
    if point == name:
        _seen[name] += 1
        if _seen[name] >= int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
