"""What a study forgets: named, drawn from coins, and the same whatever the order of the rows."""

import pytest
import torch

from expunge import Records, generator
from expunge.core.errors import BadRecords, EmptyRetain, Misuse, UnknownRecord
from expunge.study import Scenario

ROWS = Records(
    torch.randn(50, 3, generator=generator(0)),
    torch.arange(50) % 5,
    [f"r-{i}" for i in range(50)],
    [f"o-{i // 10}" for i in range(50)],
    classes=5,
)


def gone(text, seed=0, records=ROWS):
    return set(Scenario.parse(text).request(records, seed).ids)


def test_a_class_an_owner_and_ids_are_what_they_say():
    assert gone("class:3") == {f"r-{i}" for i in range(50) if i % 5 == 3}
    assert gone("owner:o-2") == {f"r-{i}" for i in range(20, 30)}
    assert set(Scenario.of_ids("mine", ["r-1", "r-7"]).request(ROWS, 0).ids) == {"r-1", "r-7"}


def test_a_share_is_exact_and_another_draw_for_each_seed_and_name():
    assert len(gone("random:0.3")) == 15
    assert gone("random:0.3", 0) != gone("random:0.3", 1)
    assert gone("random:0.3", 0) != set(list(ROWS.ids)[:15])
    assert gone("random:0.3") != gone("random:0.30")  # another name, another draw


def test_a_draw_is_a_function_of_the_ids_and_not_of_their_places():
    backwards = ROWS.select(list(reversed(range(50))))
    for text in ("class:3", "random:0.3", "owner:o-2"):
        assert gone(text) == gone(text, records=backwards)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("class", "needs a number after the colon"),
        ("class:three", "needs a number after the colon"),
        ("random:most", "needs a number"),
        ("random:1", "must be > 0 and < 1, got 1.0"),
        ("random:0", "must be > 0 and < 1, got 0.0"),
        ("random:nan", "must be > 0 and < 1, got nan"),
        ("ids:who.txt", r"give .* for ids, Scenario.of_ids, or ids:FILE on the command line"),
        ("owner:", 'unknown scenario "owner:"'),
        ("clss:3", 'unknown scenario "clss:3"; give class:3, random:0.1 or owner:NAME'),
    ],
)
def test_words_that_say_nothing_are_refused(text, complaint):
    with pytest.raises(Misuse, match=complaint):
        Scenario.parse(text)


def test_a_scenario_says_one_thing():
    with pytest.raises(Misuse, match="in one way"):
        Scenario(name="two", label=3, share=0.1)
    with pytest.raises(Misuse, match='scenario "none" names no record, got 0 ids; give at least one'):
        Scenario.of_ids("none", [])


def test_what_the_records_do_not_hold_is_refused():
    with pytest.raises(UnknownRecord, match="class 7"):
        gone("class:7")
    with pytest.raises(UnknownRecord, match='"o-9"'):
        gone("owner:o-9")
    with pytest.raises(UnknownRecord, match='"r-99"'):
        Scenario.of_ids("mine", ["r-99"]).request(ROWS, 0)
    with pytest.raises(BadRecords, match="of no row"):
        gone("random:0.001")
    with pytest.raises(EmptyRetain):
        Scenario.of_ids("all", ROWS.ids).request(ROWS, 0)
