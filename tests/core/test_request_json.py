"""Requests as JSON: what was asked is read back to the bit, and anything else is refused in one line."""

import base64
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import Misuse
from expunge.core.request import Request
from expunge.ledger.check import canonical

WHEN = datetime(2026, 3, 29, 1, 30, 0, 5, tzinfo=timezone(timedelta(hours=2)))
ROWS, LABELS = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2), torch.tensor([0, 2, 1])
ABOUT = {"asked_by": "Ann <a@b>", "key": "k-1", "received_at": WHEN, "due_at": datetime(2026, 4, 29, tzinfo=UTC)}

REQUESTS = {
    "ids": Request.remove(["b", "a"], **ABOUT),
    "no ids": Request.remove([]),
    "owner": Request.remove_owner("Zoë \u2028 \U0001f600"),
    "class": Request.remove_class(0, **ABOUT),
    "replace": Request.replace_rows(["x", "y", "z"], ROWS, LABELS, **ABOUT),
    "rows": Request.remove_rows("ann", ROWS.float() / 3, LABELS),
    "no rows": Request.remove_rows("ann", ROWS[:0], LABELS[:0]),
    "float targets": Request.remove_rows("ann", ROWS, torch.tensor([[0.1, -0.0], [1e-45, 2.0], [float("inf"), 3.0]])),
    "a transposed view": Request.remove_rows("ann", ROWS.transpose(1, 2), LABELS),
}


def alike(one, other):
    plain = ("kind", "ids", "owner", "label", "asked_by", "key", "received_at", "due_at")
    assert [getattr(one, name) for name in plain] == [getattr(other, name) for name in plain]
    for name in ("x", "y"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert mine.contiguous().numpy().tobytes() == theirs.contiguous().numpy().tobytes()
    return True


@pytest.mark.parametrize("what", REQUESTS, ids=[what.replace(" ", "-") for what in REQUESTS])
def test_what_was_asked_is_read_back_to_the_bit(what):
    asked = REQUESTS[what]
    assert alike(Request.from_json(json.loads(json.dumps(asked.to_json()))), asked)
    assert canonical(asked.to_json()) == canonical(Request.from_json(asked.to_json()).to_json())


@pytest.mark.parametrize("name", ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool"])
def test_rows_of_every_number_type_come_back(name):
    x = (torch.arange(6).reshape(2, 3) % 2).to(getattr(torch, name))
    back = Request.from_json(Request.remove_rows("o", x, torch.tensor([0, 1])).to_json())
    assert back.x.dtype is x.dtype
    assert torch.equal(back.x, x)


def test_rows_of_brain_floats_come_back():
    x = torch.tensor([[1.5, -2.0], [0.1, 3e38]], dtype=torch.bfloat16)
    back = Request.from_json(Request.remove_rows("o", x, torch.tensor([0, 1])).to_json())
    assert back.x.dtype is torch.bfloat16
    assert torch.equal(back.x, x)


def test_rows_are_base64_of_their_little_endian_bytes():
    said = Request.remove_rows("o", torch.tensor([[1, 258]], dtype=torch.int16), torch.tensor([7])).to_json()
    assert said["x"] == {"dtype": "int16", "shape": [1, 2], "data": base64.b64encode(b"\1\0\2\1").decode()}
    assert said["y"]["data"] == base64.b64encode(b"\7" + bytes(7)).decode()


def test_what_was_read_back_can_be_written_to():
    back = Request.from_json(REQUESTS["rows"].to_json())
    back.x[0] = 0
    assert float(REQUESTS["rows"].x[0].sum()) > 0


@settings(max_examples=50, deadline=None)
@given(
    ids=st.lists(st.text(max_size=8), max_size=5, unique=True),
    by=st.text(max_size=8),
    at=st.none() | st.datetimes(timezones=st.just(UTC)),
)
def test_all_texts_and_times_come_back(ids, by, at):
    asked = Request.remove(ids, asked_by=by, received_at=at)
    assert alike(Request.from_json(json.loads(json.dumps(asked.to_json()))), asked)


GOOD = REQUESTS["rows"].to_json()
BAD = {
    "nothing": {},
    "no kind": {name: value for name, value in GOOD.items() if name != "kind"},
    "no times": {name: value for name, value in GOOD.items() if name != "due_at"},
    "another kind": {**GOOD, "kind": "forget"},
    "no labels": {**GOOD, "y": None},
    "ids of nothing": {**GOOD, "ids": None},
    "twice": {**GOOD, "kind": "remove", "owner": None, "ids": ["a", "a"]},
    "two ways": {**GOOD, "kind": "remove", "label": 3},
    "no time": {**GOOD, "received_at": "tomorrow"},
    "a time of nothing": {**GOOD, "received_at": 3},
    "no base64": {**GOOD, "x": {**GOOD["x"], "data": "%%%"}},
    "torn base64": {**GOOD, "x": {**GOOD["x"], "data": GOOD["x"]["data"][:-5]}},
    "another shape": {**GOOD, "x": {**GOOD["x"], "shape": [3, 2, 3]}},
    "a negative shape": {**GOOD, "x": {**GOOD["x"], "shape": [3, -2, -2]}},
    "no shape": {**GOOD, "x": {"dtype": "float32", "data": GOOD["x"]["data"]}},
    "no dtype": {**GOOD, "x": {**GOOD["x"], "dtype": "Tensor"}},
    "a private dtype": {**GOOD, "x": {**GOOD["x"], "dtype": "__class__"}},
    "rows of nothing": {**GOOD, "x": 3},
}


@pytest.mark.parametrize("what", BAD, ids=[what.replace(" ", "-") for what in BAD])
def test_what_is_no_request_is_refused_in_one_line(what):
    with pytest.raises(Misuse) as caught:
        Request.from_json(BAD[what])
    assert "\n" not in str(caught.value)


def test_a_shape_that_does_not_fit_is_refused_by_name():
    with pytest.raises(Misuse, match="no request as to_json writes it"):
        Request.from_json(BAD["another shape"])
