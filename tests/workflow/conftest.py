"""Workspaces for the tests: each kind of model is registered once, and every test works on a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ledger.conftest import postgres_server, postgres_url
from tests.workflow import kit

__all__ = ["postgres_server", "postgres_url"]


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The registered workspace of a kind of model, made when it is first asked for."""
    made: dict[str, Path] = {}
    home = tmp_path_factory.mktemp("templates")

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = kit.template(home / kind, kind)
        return made[kind]

    return of


@pytest.fixture
def place(tmp_path: Path, templates: Callable[[str], Path]) -> Iterator[Callable[..., kit.Place]]:
    """``place(kind, setting=value, ...)`` is a workspace of the test's own that serves a model of this kind."""
    opened: list[kit.Place] = []

    def of(kind: str = "shards", **settings: Any) -> kit.Place:
        root = kit.copied(templates(kind), tmp_path / f"workspace-{len(opened)}", **settings)
        opened.append(kit.Place(root, kit.digits()))
        return opened[-1]

    yield of
    for one in opened:
        one.close()
