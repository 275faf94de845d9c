"""Imports point one way: a room may import rooms on lower floors and itself, never one beside it or above."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import expunge

# The table of the rooms; a new room must be entered here, on its floor.
FLOORS = {
    **dict.fromkeys(["cli"], 8),
    **dict.fromkeys(["service"], 7),
    **dict.fromkeys(["demo"], 6),  # tells its story in the tables and plots of report, and so stands above it
    **dict.fromkeys(["report"], 5),
    **dict.fromkeys(["workflow", "study"], 4),
    **dict.fromkeys(["certify", "attack", "assure", "testing"], 3),
    **dict.fromkeys(["unlearn", "screen", "verify", "audit", "value"], 2),
    **dict.fromkeys(["learn", "calculus", "ledger", "datasets"], 1),
    **dict.fromkeys(["core"], 0),
}
OUTSIDE = {"__init__", "__main__", "_version"}  # the root re-exports by hand; the version is a number
ROOT = Path(expunge.__file__).parent


def imports_of(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below the package) of every import of the package's own modules; the root is ""."""
    inside = path.relative_to(package).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == package.name:
                    yield node.lineno, rest
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = [package.name, *inside[:-1]][: 1 + len(inside) - node.level]
                place = ".".join([*start, *([node.module] if node.module else [])])
            else:
                place = node.module or ""
            first, _, rest = place.partition(".")
            if first == package.name:
                yield from ((node.lineno, rest or alias.name) for alias in node.names)


def problems(package: Path) -> list[str]:
    """What is wrong with the imports of the package in this folder, one line each."""
    root = package / "__init__.py"
    shown = {name.partition(".")[0] for _, name in imports_of(root, package)} if root.exists() else set()
    top = max((FLOORS[room] for room in shown if room in FLOORS), default=-1)
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).with_suffix("").parts
        room = inside[0]
        if room in OUTSIDE:
            continue
        if room not in FLOORS:
            found.append(f"{path.relative_to(package)} stands on no floor; enter its room into the table")
            continue
        for line, name in imports_of(path, package):
            other = name.partition(".")[0]
            where = f"{path.relative_to(package)}:{line}"
            if other == room or other == "_version":
                continue
            if other in FLOORS:
                if FLOORS[other] > FLOORS[room]:
                    found.append(f"{where} climbs from {room} to {other}")
                elif FLOORS[other] == FLOORS[room]:
                    found.append(f"{where} crosses from {room} to {other}")
            elif top >= FLOORS[room]:
                found.append(f"{where} imports {name or 'everything'} from the root, which stands on floor {top}")
    return list(dict.fromkeys(found))


def test_no_import_climbs_or_crosses():
    assert problems(ROOT) == []


def test_something_was_looked_at():
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in ROOT.rglob("*.py")} - OUTSIDE
    assert {"core", "learn", "unlearn"} <= rooms
    names = {name for path in ROOT.rglob("*.py") for _, name in imports_of(path, ROOT)}
    assert {"core.records", "learn.training", "unlearn"} <= names


LIES = [
    ("core/a.py", "import expunge.learn.loop", "core/a.py:1 climbs from core to learn"),
    ("core/a.py", "from expunge.learn import loop", "core/a.py:1 climbs from core to learn"),
    ("core/a.py", "from expunge import learn", "core/a.py:1 climbs from core to learn"),
    ("core/a.py", "from ..learn.loop import fit", "core/a.py:1 climbs from core to learn"),
    ("core/a.py", "from .. import learn", "core/a.py:1 climbs from core to learn"),
    ("core/deep/a.py", "from ...learn import x", "core/deep/a.py:1 climbs from core to learn"),
    ("core/__init__.py", "from ..audit import x", "core/__init__.py:1 climbs from core to audit"),
    ("core/a.py", "def f():\n    import expunge.cli", "core/a.py:2 climbs from core to cli"),
    ("core/a.py", "if TYPE_CHECKING:\n    from expunge.audit import x", "core/a.py:2 climbs from core to audit"),
    ("unlearn/a.py", "import os, expunge.audit.metrics as m", "unlearn/a.py:1 crosses from unlearn to audit"),
    ("datasets.py", "from expunge.learn import loop", "datasets.py:1 crosses from datasets to learn"),
    ("study.py", "from expunge import workflow", "study.py:1 crosses from study to workflow"),
    ("learn/a.py", "from expunge import Sisa", "learn/a.py:1 imports Sisa from the root, which stands on floor 2"),
    ("learn/a.py", "import expunge", "learn/a.py:1 imports everything from the root, which stands on floor 2"),
    ("helpers/a.py", "import os", "helpers/a.py stands on no floor; enter its room into the table"),
]
TRUTHS = [
    ("core/a.py", "from expunge.core.b import x\nfrom . import b\nfrom .b import x\nimport os, torch, expungement"),
    (
        "learn/a.py",
        "from expunge.core import records\nfrom ..core.records import Records\nfrom expunge._version import v",
    ),
    ("core/deep/a.py", "from . import learn\nfrom ..learn import x"),  # core.learn, not learn
    ("study.py", "from expunge import Sisa, audit\nimport expunge"),
    ("cli/a.py", "from expunge import demo, report, workflow\nfrom expunge.service import app"),
    ("__main__.py", "from expunge.cli import main"),
]


def tree(folder: Path, name: str, text: str) -> Path:
    path = folder / "expunge" / name
    path.parent.mkdir(parents=True)
    (folder / "expunge" / "__init__.py").write_text("from expunge.unlearn import Sisa\n")
    path.write_text(text)
    return folder / "expunge"


@pytest.mark.parametrize(("name", "text", "complaint"), LIES)
def test_a_climbing_or_crossing_import_is_reported(tmp_path, name, text, complaint):
    assert problems(tree(tmp_path, name, text)) == [complaint]


@pytest.mark.parametrize(("name", "text"), TRUTHS)
def test_an_import_that_goes_down_is_not_reported(tmp_path, name, text):
    assert problems(tree(tmp_path, name, text)) == []
