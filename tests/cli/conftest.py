"""The command line as its users meet it: words in; exit code, standard output and standard error out."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from expunge.cli import main

TABLE = ("--id-column", "id", "--owner-column", "owner", "--label-column", "left", "--classes", "no,yes")
QUICK = ("--model", "mlp", "--epochs", "2")


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def write_customers(path: Path, *, rows: int = 60, **cells: str) -> Path:
    """A table of customers, two rows an owner; `cells` replaces the second row's values."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        age, spent = rng.normal(), rng.normal()
        line = {"id": f"r-{row}", "owner": f"c-{row // 2}", "age": f"{age:.3f}", "spent": f"{spent:.3f}"}
        lines.append({**line, "left": "yes" if age > spent else "no"})
    lines[1].update(cells)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return path


@pytest.fixture
def expunge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``expunge("train", "--data", ...)`` runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["expunge", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Said(stop.value.code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with customers.csv and models of it: `whole`, `sharded`, and `lost`, which is that without owner c-3.

    `few` was trained on 20 rows only and has lost one.
    """
    folder = tmp_path_factory.mktemp("shop")
    table = write_customers(folder / "customers.csv")
    data = ("--data", str(table), *TABLE)
    few = write_customers(folder / "few.csv", rows=20)
    for words in (
        ("train", *data, *QUICK, "--out", str(folder / "whole")),
        ("train", *data, *QUICK, "--shards", "4", "--out", str(folder / "sharded")),
        ("forget", str(folder / "sharded"), *data, "--owner", "c-3", "--out", str(folder / "lost")),
        ("train", "--data", str(few), *TABLE, *QUICK, "--out", str(folder / "most")),
        ("forget", str(folder / "most"), "--data", str(few), *TABLE, "--id", "r-3", "--out", str(folder / "few")),
    ):
        call(*words)
    return folder


def call(*words: str) -> None:
    """Run a command that must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["expunge", *words])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0, words
