"""What is asked in the same order gives the same bytes on SQLite and on PostgreSQL: log, proofs, certificates, all."""

import random
from datetime import UTC, datetime, timedelta

import pytest

from expunge.core.errors import ExpungeError
from expunge.ledger import check
from expunge.ledger.requests import Submission
from expunge.ledger.states import DENIALS, State
from tests.ledger import kit

ROWS = 60


class Script:
    """One worker and a person who do whatever a seed says; every answer and every refusal is written down."""

    def __init__(self, url, anchor):
        self.time, self.run, self.said, self.ids = kit.Time(), None, [], []
        self.ledger = kit.opened(
            url, now=self.time, new_id=kit.counted("id"), draw_keys=kit.record_keys, anchor=anchor, origin="one/log"
        )
        self.anchor = anchor
        kit.register(self.ledger, ROWS)

    def do(self, seed, many):
        """So many steps, most of which are possible."""
        draw = random.Random(seed)
        for number in range(many):
            self.time.at_s += draw.choice([0.0, 0.25, 3.5, 86_400.0])
            name = draw.choice(
                ["submit", "submit", "batch", "screen", "screen", "decide", "decide", "work", "work", "work"]
            )
            try:
                self.said.append((name, getattr(self, name)(draw, number)))
            except (ExpungeError, check.Refused) as error:
                self.said.append((name, type(error), str(error)))

    def submission(self, draw, name):
        received = datetime.fromtimestamp(self.time.at_s, UTC) - timedelta(hours=draw.randrange(48))
        given = {"key": name, "received_at": received, "identified": draw.random() < 0.8}
        return Submission(model="m", kind="remove", body=kit.asking(name), **given)

    def submit(self, draw, number):
        filed = self.ledger.requests.submit(self.submission(draw, f"r-{draw.randrange(ROWS)}"))
        self.ids.append(filed[0].id)
        return filed

    def batch(self, draw, number):
        names = draw.sample(range(ROWS), draw.randrange(1, 5))
        filed = self.ledger.requests.submit_many([self.submission(draw, f"r-{one}") for one in names])
        self.ids += [one.id for one, _ in filed]
        return filed

    def screen(self, draw, number):
        for one in self.ledger.requests.find(state=[State.RECEIVED])[:3]:
            self.ledger.requests.screening(one.id)
            held = draw.choice([None, None, "odd"])
            self.ledger.requests.screened(one.id, held=held, exact=draw.random() < 0.3, stages=["distance: 0.25"])
        return [one.to_json() for one in self.ledger.requests.find()]

    def decide(self, draw, number):
        one = draw.choice(self.ids[-5:] or ["nobody"])
        how = draw.choice(["cancel", "deny", "extend", "release", "verify_identity"])
        given = {"deny": [draw.choice([*DENIALS, "flagged"])], "extend": ["many requests"]}.get(how, [])
        return getattr(self.ledger.requests, how)(one, *given)

    def work(self, draw, number):
        if self.run is None:
            self.run = self.ledger.runs.claim("m", "w", most=draw.randrange(1, 4))
        elif draw.random() < 0.1 and self.run.step != "switched":
            self.ledger.runs.fail(self.run, "no luck")
            self.run = None
        else:
            self.run = kit.advance(self.ledger, self.run)
            if self.run is None:
                self.ledger.certificates.sign()
                return self.ledger.log.checkpoint()
        return self.run

    def everything(self):
        """All bytes that anybody is shown."""
        note = self.ledger.log.checkpoint()
        assert kit.faults(self.ledger) == []
        done = [one.id for one in self.ledger.requests.find(state=[State.COMPLETED])]
        sizes = [size for size, _ in kit.tables(self.ledger)["checkpoint"]]
        shown = {
            "said": self.said,
            "root": self.ledger.log.tree().root(),
            "checkpoint": note,
            "anchor": self.anchor.read_bytes(),
            "bundles": [self.ledger.certificates.bundle(one) for one in done],
            "record keys": [self.ledger.certificates.record_keys(one) for one in done],
            "consistency": [self.ledger.log.consistency(size) for size in sizes],
            "outbox": self.ledger.requests.outbox(),
            "tables": kit.tables(self.ledger),
        }
        self.ledger.close()
        return shown


def carried_out(url, folder, seed=1, many=120):
    folder.mkdir()
    script = Script(url, folder / "anchor")
    script.do(seed, many)
    return script.everything()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_requests_give_the_same_bytes_on_both_databases(tmp_path, postgres_url, seed):
    here = carried_out(f"sqlite:///{tmp_path}/ledger.db", tmp_path / "sqlite", seed)
    there = carried_out(postgres_url, tmp_path / "postgresql", seed)
    assert here.keys() == there.keys()
    for what in here:
        assert here[what] == there[what], what
    states = {row[6] for row in here["tables"]["request"]}
    assert {"completed", "cancelled", "denied"} <= states
    assert len(here["bundles"]) >= 3
    assert any(isinstance(told[1], type) for told in here["said"])
    for bundle in here["bundles"]:
        assert check.check_bundle(bundle, kit.KEYS.trusted).passed


def test_a_difference_of_one_microsecond_would_be_seen(tmp_path, monkeypatch):
    one = carried_out(f"sqlite:///{tmp_path}/one.db", tmp_path / "one", many=40)
    same = carried_out(f"sqlite:///{tmp_path}/same.db", tmp_path / "same", many=40)
    assert one == same
    monkeypatch.setattr(kit, "START_S", kit.START_S + 1e-6)
    monkeypatch.setattr(kit.Time, "__init__", lambda self: setattr(self, "at_s", kit.START_S))
    other = carried_out(f"sqlite:///{tmp_path}/other.db", tmp_path / "other", many=40)
    assert {what for what in one if one[what] == other[what]} <= {"bundles", "record keys", "outbox"}
