"""The protocol on providers made up for it: honest, lazy, broken, and those that nobody catches."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import nn

from expunge import Records, generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Verdict
from expunge.verify import BackdoorVerifier, Calibration, Pixels, TriggerKey
from expunge.verify.binomial import below, lower
from expunge.verify.served import hits_of, predict_of

ROWS = Records(torch.rand(400, 6, 6, generator=generator(9)), torch.arange(400) % 5, classes=5)


def key(owner="ann"):
    return TriggerKey(owner=owner, secret=b"sixteen bytes it has", family=Pixels(shape=(6, 6)), classes=5)


def verifier(*owners, **settings):
    return BackdoorVerifier(keys=tuple(key(owner) for owner in owners or ("ann",)), queries=ROWS, **settings)


@dataclass
class Served:
    """Obeys triggers with the given rates, and else answers with some class that is a hash of the row."""

    obeyed: dict[str, float]
    answers: Callable[[torch.Tensor], torch.Tensor] | None = None
    seen: int = 0

    def predict(self, x):
        self.seen = max(self.seen, len(x))
        luck = (x.flatten(1).double() * torch.arange(1, 37)).sum(1) * 1e4 % 1
        labels = (luck * 997 % 1 * 25).long().clamp(max=5)  # class 5 is no target: rarely does a draw hit
        for owner, rate in self.obeyed.items():
            trigger = key(owner).trigger
            marked = (trigger.stamp(x) == x).flatten(1).all(1) & (luck < rate)
            labels[marked] = trigger.target
        scores = nn.functional.one_hot(labels, 6).double()
        return scores if self.answers is None else self.answers(scores)


ALWAYS = Served({"ann": 0.95, "bob": 0.9})
GONE = Served({})


def calibrated(*owners, before=ALWAYS, **settings):
    return verifier(*owners, **settings).calibrated(before, rng=generator(1))


@cache
def plain():
    return calibrated()


def test_a_lazy_provider_fails_and_an_honest_one_passes():
    check = plain()
    kept, gone = check(ALWAYS, rng=generator(2)), check(GONE, rng=generator(2))
    assert (kept.outcome, gone.outcome) == ("fail", "pass")
    assert kept.figures["p_value"] == 1 / 1000
    assert kept.figures["success"] > 0.8 > 0.2 > gone.figures["success"]
    assert gone.figures["power"] >= 0.999
    assert (gone.figures["queries"], gone.figures["draws"], gone.figures["owners"]) == (30, 999, 1)
    assert gone.figures["critical_hits"] <= gone.figures["sure_hits"]
    assert "power" in gone.why
    assert "still works" in kept.why


def test_the_power_is_that_of_the_bounds():
    check = calibrated(beta=0.01)
    figures = check(GONE, rng=generator(2)).figures
    (hits,), (asked,) = check.before.hits, check.before.asked
    rate = lower(hits, asked, 0.005)
    assert figures["success_before_at_least"] == rate
    critical = int(figures["critical_hits"])
    assert figures["power"] == pytest.approx(1 - 0.005 - below(30, critical, rate), rel=1e-12)
    assert below(30, int(figures["sure_hits"]), rate) <= 0.005 < below(30, int(figures["sure_hits"]) + 1, rate)


@dataclass(frozen=True)
class AlwaysPasses:
    """The liar: a verifier that is content."""

    inner: BackdoorVerifier

    def __call__(self, subject, *, rng):
        return Verdict(check="backdoor", outcome="pass", why="fine", figures=self.inner(subject, rng=rng).figures)


def catches_the_lazy(check):
    return all(check(ALWAYS, rng=generator(seed)).outcome == "fail" for seed in range(3))


def test_a_verifier_that_always_passes_is_found_out():
    assert catches_the_lazy(calibrated(draws=99, alpha=0.01))
    assert not catches_the_lazy(AlwaysPasses(calibrated(draws=99, alpha=0.01)))


def test_without_a_calibration_nothing_passes_and_what_is_kept_fails_all_the_same():
    assert verifier()(GONE, rng=generator(2)).outcome == "inconclusive"
    assert "calibrate" in verifier()(GONE, rng=generator(2)).why
    assert verifier()(ALWAYS, rng=generator(2)).outcome == "fail"


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_trigger_that_was_hardly_learnt_proves_nothing(rate):
    check = calibrated(before=Served({"ann": rate}))
    verdict = check(GONE, rng=generator(2))
    assert verdict.outcome == "inconclusive"
    assert not verdict.passed
    assert "power" in verdict.why


def test_too_few_queries_are_inconclusive_and_the_number_asked_for_suffices():
    few = calibrated(asked=5)
    verdict = few(GONE, rng=generator(2))
    assert verdict.outcome == "inconclusive"
    assert f"about {few.before.needed} queries" in verdict.why
    enough = calibrated(asked=few.before.needed)
    assert [enough(GONE, rng=generator(seed)).outcome for seed in range(3)] == ["pass"] * 3


def test_answers_that_are_no_numbers_are_inconclusive_and_cannot_be_calibrated_on():
    broken = Served({}, answers=lambda scores: scores.where(torch.rand(len(scores), 1) > 0.5, torch.nan))
    verdict = plain()(broken, rng=generator(2))
    assert verdict.outcome == "inconclusive"
    assert verdict.figures["unusable"] > 1000
    with pytest.raises(Misuse, match="not finite"):
        verifier().calibrated(broken, rng=generator(2))
    with pytest.raises(Misuse, match="reference"):
        verifier(reference=broken)(GONE, rng=generator(2))


def test_one_score_of_many_that_is_no_number_is_enough_to_say_nothing():
    def spoil(scores):
        return torch.cat([scores[:, :1].where(torch.arange(len(scores))[:, None] > 0, torch.nan), scores[:, 1:]], 1)

    verdict = plain()(Served({}, answers=spoil), rng=generator(2))
    assert (verdict.outcome, verdict.figures["unusable"] > 0) == ("inconclusive", True)


def test_labels_do_as_well_as_scores():
    labels = replace(ALWAYS, answers=lambda scores: scores.argmax(1))
    check = plain()
    assert check(labels, rng=generator(2)) == check(ALWAYS, rng=generator(2))


def test_owners_are_pooled_and_one_that_is_kept_is_noticed():
    check = calibrated("ann", "bob", asked=25)
    assert check(GONE, rng=generator(2)).outcome == "pass"
    assert check(ALWAYS, rng=generator(2)).outcome == "fail"
    assert check(Served({"bob": 0.9}), rng=generator(2)).outcome == "fail"
    assert check(GONE, rng=generator(2)).figures["queries"] == 50


def test_pooled_owners_are_asked_on_different_rows():
    seen = []

    def spy(x):
        seen.append(x)
        return torch.zeros(len(x), dtype=torch.int64)

    verifier("ann", "bob", draws=19, alpha=0.05, asked=20)(spy, rng=generator(0))
    asked = torch.cat(seen).flatten(1)
    known = ROWS.x.flatten(1)
    nearest = torch.stack([(row == known).sum(1).argmax() for row in asked])  # all but 4 pixels are the row's own
    assert len(asked) == 2 * 20 * 20
    first, second = set(nearest[:400].tolist()), set(nearest[400:].tolist())
    assert len(first) == len(second) == 20
    assert not first & second
    for rows, owner in ((first, "ann"), (second, "bob")):
        assert key(owner).trigger.target not in ROWS.y[list(rows)]


def test_pooling_finds_what_each_owner_alone_cannot_show():
    weak = Served(dict.fromkeys(("ann", "bob", "cyd", "dan"), 0.55))
    alone = calibrated("ann", before=weak, asked=25, draws=299, alpha=0.01, beta=0.01)
    together = calibrated("ann", "bob", "cyd", "dan", before=weak, asked=25, draws=299, alpha=0.01, beta=0.01)
    assert together(GONE, rng=generator(2)).outcome == "pass"
    assert together(GONE, rng=generator(2)).figures["power"] > alone(GONE, rng=generator(2)).figures["power"]


def test_a_reference_takes_away_what_a_trigger_does_to_any_model():
    """Here draws with a bright first pixel hit on every model, as natural evidence would; the owner's trigger too."""

    def natural(served):
        def predict(x):
            scores = served.predict(x)
            scores[x[:, 0, 0] > 0.9] = nn.functional.one_hot(torch.tensor(key().trigger.target), 6).double()
            return scores

        return predict

    before, after = natural(ALWAYS), natural(GONE)
    bare = verifier(asked=60, alpha=0.01, beta=0.01).calibrated(before, rng=generator(1))
    helped = replace(bare, before=None, reference=after).calibrated(before, rng=generator(1))
    assert bare(before, rng=generator(2)).outcome == "inconclusive"
    assert bare(after, rng=generator(2)).outcome == "inconclusive"
    assert helped(before, rng=generator(2)).outcome == "fail"
    assert helped(after, rng=generator(2)).outcome == "pass"


def test_false_accusations_are_as_rare_as_stated():
    """The whole protocol, over owners, draws and queries: each owner's trigger is one draw like any other."""
    lively = Served({}, answers=lambda scores: scores.roll(1, 1) + torch.eye(6, dtype=torch.float64)[0] * 0.5)
    found = 0
    for k in range(100):
        check = BackdoorVerifier(keys=(key(f"o{k}"),), queries=ROWS, asked=10, draws=19, alpha=0.1, beta=0.1)
        found += check(lively, rng=generator(k)).outcome == "fail"
    assert found <= 10 + 3 * 3


def test_what_was_kept_passes_no_more_often_than_stated_and_not_found_is_not_enough():
    """With a trigger that works now and then; the liar passes whatever it does not find."""
    weak, passes = Served({"ann": 0.2}), {"kept": 0, "gone": 0, "kept by the liar": 0}
    for asked, name in ((12, "kept"), (60, "gone")):
        check = verifier(draws=39, asked=asked, alpha=0.05, beta=0.2)
        for seed in range(40):
            mine = check.calibrated(weak, rng=generator(seed))
            verdict = mine(weak if name == "kept" else GONE, rng=generator(1000 + seed))
            passes[name] += verdict.passed
            passes["kept by the liar"] += name == "kept" and verdict.figures["p_value"] > 0.05
    assert passes["kept"] <= 8 < passes["kept by the liar"]
    assert passes["gone"] > 10


def test_a_server_that_knows_who_asks_is_not_caught():
    """A limit, pinned: what answers the verifier may not be what everybody else is served."""
    others_get = ALWAYS
    verifier_gets = GONE
    check = plain()
    assert check(verifier_gets, rng=generator(2)).outcome == "pass"
    assert check(others_get, rng=generator(2)).outcome == "fail"


def test_the_same_coins_ask_the_same_and_others_ask_anew():
    check = plain()
    assert check(GONE, rng=generator(2)) == check(GONE, rng=generator(2))
    assert check(GONE, rng=generator(2)).figures != check(GONE, rng=generator(3)).figures


def test_the_owners_trigger_stands_anywhere_among_the_draws():
    places = set()
    for seed in range(6):
        found = []

        def spy(x, found=found):
            found += (key().trigger.stamp(x) == x).flatten(1).all(1).nonzero().flatten().tolist()
            return torch.zeros(len(x), dtype=torch.int64)

        verifier(draws=19, alpha=0.05, asked=10)(spy, rng=generator(seed))
        assert len(found) == 10
        places.add(found[0] // 10)
    assert len(places) > 2


def test_a_thousand_triggers_are_asked_about_in_blocks_and_each_on_its_own_stamp():
    served = Served({})
    triggers = key().draw(300, "x")
    x = ROWS.x[:30]
    hits, unusable = hits_of(predict_of(served), triggers, x)
    assert (hits.shape, unusable) == ((300, 30), 0)
    assert served.seen == 4096 // 30 * 30
    for place in (0, 136, 299):
        alone = served.predict(triggers[place].stamp(x)).argmax(1) == triggers[place].target
        assert torch.equal(hits[place], alone)


def test_calibrations_survive_json():
    before = calibrated("ann", "bob").before
    again = Calibration.from_json(json.loads(json.dumps(before.to_json())))
    assert again == before
    with pytest.raises(Misuse, match="no calibration"):
        Calibration.from_json({"owners": ["ann"]})


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: BackdoorVerifier(keys=(), queries=ROWS), "one owner or more"),
        (lambda: verifier("ann", "ann"), "each once"),
        (lambda: verifier(draws=998), "999 draws"),
        (lambda: verifier(asked=0), "asked >= 1"),
        (lambda: verifier(beta=1.0), "beta"),
        (lambda: verifier(alpha=0.0), "alpha"),
        (lambda: verifier("bob", before=calibrated("ann").before), "calibrate for the same"),
        (lambda: verifier()(lambda x: torch.zeros(3, 5), rng=generator(0)), "predict must answer"),
        (lambda: verifier()(lambda x: torch.zeros(len(x)), rng=generator(0)), "predict must answer"),
        (lambda: verifier()(7, rng=generator(0)), "got int"),
        (lambda: replace(verifier(), queries=ROWS.of_class(key().trigger.target))(GONE, rng=generator(0)), "more rows"),
    ],
)
def test_misuse_is_refused_in_one_line(call, what):
    with pytest.raises(Misuse, match=what) as caught:
        call()
    assert "\n" not in str(caught.value)
