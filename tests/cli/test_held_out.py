"""`--test` never reads rows that a built-in set trains on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from expunge import datasets
from expunge.cli import inputs
from expunge.core.errors import Misuse

NOTHING = (None,) * 6


def test_a_named_set_gives_its_test_rows_and_none_that_are_trained_on():
    found, own = inputs.read_held_out("optdigits", *NOTHING), datasets.get("optdigits")
    assert found.ids == own.test.ids
    assert not set(found.ids) & set(own.train.ids)


def test_a_named_set_without_test_rows_is_refused(monkeypatch):
    rows = datasets.get("optdigits").train
    monkeypatch.setattr(inputs, "read_records", lambda *_: (rows, None))
    with pytest.raises(Misuse, match="optdigits brings no test rows; give a file"):
        inputs.read_held_out("optdigits", *NOTHING)


def test_files_give_all_their_rows(monkeypatch):
    rows = datasets.get("optdigits").train
    monkeypatch.setattr(inputs, "read_records", lambda *_: (rows, None))
    assert inputs.read_held_out("mine.csv", *NOTHING) is rows


def test_every_command_reads_its_test_rows_in_this_way():
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(inputs.__file__).parent.glob("*.py")}
    assert sum("read_held_out(" in text for text in texts.values()) >= 6
    assert [name for name, text in texts.items() if re.search(r"read_records\((self\.)?test\b.*\)\[0\]", text)] == []
