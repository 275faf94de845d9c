"""The folder of a study: durable lines, a torn end, another study, another process."""

import json

import pytest

from expunge.core.errors import Corrupt, Misuse, Overtaken
from expunge.study import store

ABOUT = {"settings": {"seeds": [0, 1], "recipe": {"epochs": 3}}, "records": {"rows": 5}}


def fill(folder, count):
    with store.opened(folder, ABOUT) as cells:
        for number in range(count):
            cells.add(("cell", 0.0, "class:3", number), {"value": number})


def test_what_was_added_is_there_the_next_time(tmp_path):
    fill(tmp_path / "s", 3)
    with store.opened(tmp_path / "s", ABOUT) as cells:
        assert ("cell", 0.0, "class:3", 2) in cells
        assert ("cell", 0.0, "class:3", 3) not in cells
        assert cells["cell", 0.0, "class:3", 2]["value"] == 2
        with pytest.raises(Misuse, match="finished already"):
            cells.add(("cell", 0.0, "class:3", 2), {"value": 7})


def test_a_line_is_on_the_disk_before_the_next_is_begun(tmp_path):
    with store.opened(tmp_path / "s", ABOUT) as cells:
        cells.add(("a", 1), {"value": 1})
        assert (tmp_path / "s" / "cells.jsonl").read_text() == '{"key":["a",1],"value":1}\n'


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_cut_off_and_can_be_written_again(tmp_path, cut):
    fill(tmp_path / "s", 2)
    path = tmp_path / "s" / "cells.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with store.opened(tmp_path / "s", ABOUT) as cells:
        assert len(cells.known) == 1
        cells.add(("cell", 0.0, "class:3", 1), {"value": 1})
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_no_torn_end(tmp_path):
    fill(tmp_path / "s", 3)
    path = tmp_path / "s" / "cells.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(Corrupt, match=r"line 2 of .*cells\.jsonl cannot be read"), store.opened(tmp_path / "s", ABOUT):
        pass


def test_another_study_is_refused_and_what_differs_is_named(tmp_path):
    fill(tmp_path / "s", 1)
    before = (tmp_path / "s" / "cells.jsonl").read_bytes()
    other = {**ABOUT, "settings": {"seeds": [0, 1, 2], "recipe": {"epochs": 4}}}
    with (
        pytest.raises(Misuse, match=r"another study, which differs in settings\.seeds, settings\.recipe\.epochs;"),
        store.opened(tmp_path / "s", other),
    ):
        pass
    assert (tmp_path / "s" / "cells.jsonl").read_bytes() == before


def test_what_is_no_study_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Misuse, match="something other than a study"), store.opened(tmp_path / "photos", ABOUT):
        pass
    with pytest.raises(Misuse, match="is a file"), store.opened(tmp_path / "file", ABOUT):
        pass
    fill(tmp_path / "empty", 1)
    (tmp_path / "empty" / "study.json").write_text("{")
    with pytest.raises(Corrupt, match=r"study\.json cannot be read"), store.opened(tmp_path / "empty", ABOUT):
        pass


def test_two_processes_do_not_write_the_same_study(tmp_path):
    with (
        store.opened(tmp_path / "s", ABOUT),
        pytest.raises(Overtaken, match="another process"),
        store.opened(tmp_path / "s", ABOUT),
    ):
        pass
    fill(tmp_path / "s", 1)  # the lock goes with the file


def test_a_study_can_be_read_while_it_is_written(tmp_path):
    with store.opened(tmp_path / "s", ABOUT) as cells:
        cells.add(("a", 1), {"value": 1})
        with (tmp_path / "s" / "cells.jsonl").open("ab") as torn:
            torn.write(b'{"key":["b"')
        about, lines = store.read(tmp_path / "s")
        assert (about, list(lines)) == (ABOUT, [("a", 1)])
    with pytest.raises(Misuse, match="there is no study"):
        store.read(tmp_path)


def test_without_a_folder_nothing_is_kept():
    with store.opened(None, ABOUT) as cells:
        cells.add(("a", 1.5), {"value": (1, 2)})
        assert json.dumps(cells["a", 1.5]["value"]) == "[1, 2]"
