"""A mirror: a registry elsewhere, from which others fetch the model that a workspace serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

PARENT = "unlearn.parent_version"
REQUESTS = "unlearn.request_ids"


class Mirror(Protocol):
    """Where others fetch the model: publish, then serve, then retire, then certify.

    Each call may be made again after a crash at any point, with the same arguments, and ends in the same state. No
    mirror guards against two processes that publish at once: the workspace lets one at a time do so.
    """

    @property
    def name(self) -> str:
        """What it is called in records, such as "mlflow:credit"."""

    def publish(self, folder: Path, digest: str, tags: Mapping[str, str]) -> str:
        """Offer the saved model under a version of its own, not served yet; the version.

        The same digest and the same parent are the same version.

        Args:
            folder: what `Trained.save` wrote.
            digest: the model's own, 64 hexadecimal digits.
            tags: what to say of it; `PARENT` (absent for the first) and `REQUESTS`, joined by commas, are the usual.
        """

    def serve(self, version: str) -> None:
        """Let those who ask for the served model get this version. Comes last, when all of it is in place."""

    def retire(self, keep: str) -> tuple[str, ...]:
        """Delete every other version that was published from here, with the mirror's files of it; their names.

        Raises:
            Misuse: if the version to keep is not there or not the one served.
        """

    def certify(self, version: str, certificate: str) -> None:
        """Say of a version that a certificate, named by its SHA-256 in hexadecimal digits, covers it."""
