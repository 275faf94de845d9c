"""Requests that mean nothing, or that contradict each other: each layer says so before any work, or does nothing."""

import re
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch

from expunge import (
    FineTune,
    Misuse,
    NeverTrained,
    Recipe,
    Request,
    Retrain,
    UnknownRecord,
    Unsupported,
    generator,
    train,
)
from expunge.attack import (
    Camouflage,
    Judge,
    PerturbRequests,
    ReplaceRequests,
    SelectRequests,
    SequentialRequests,
    SlowDown,
)
from expunge.attack.judge import carry_out
from expunge.cli.inputs import METHODS
from expunge.core.protocols import Job, Target
from expunge.core.request import refuse_contradictions
from expunge.screen import GradientNorm, ScreenStage, defend
from expunge.testing.case import digits
from expunge.unlearn import GradientAscent
from expunge.workflow.carrying import carry_out as carry_out_together

SOFTMAX = Recipe(model="softmax", epochs=2, batch_size=32, weight_decay=1e-3)


@pytest.fixture(scope="module")
def case():
    return digits(careless=0)


@pytest.fixture(scope="module")
def trained(case):
    return train(SOFTMAX, case.records)


@pytest.fixture(scope="module")
def asked(case):
    """Requests about the same first row, and one about others."""
    records = case.records
    one, x, y = records.ids[0], records.x[:1], records.y[:1]
    return {
        "removed": Request.remove(records.ids[:3]),
        "removed with its owner": Request.remove_owner(records.owners[0]),
        "removed with its class": Request.remove_class(int(y[0])),
        "removed by content": Request.remove_rows(records.owners[0], x, y),
        "replaced": Request.replace_rows([one], 1 - x, y),
        "replaced by the same": Request.replace_rows([one, records.ids[1]], 1 - records.x[:2], records.y[:2]),
        "replaced by another": Request.replace_rows([one], x / 2, y),
        "given another label": Request.replace_rows([one], 1 - x, (y + 1) % 10),
        "other rows": Request.remove(records.ids[300:305]),
    }


FINE = frozenset({"replaced", "replaced by the same"})


def contradict(one, other):
    """The rule, said once more: about one row, a removal goes with removals and a replacement with its like."""
    if "other rows" in (one, other) or {one, other} == FINE:
        return False
    return not (one.startswith("removed") and other.startswith("removed"))


def refused(asked, case, *names):
    try:
        refuse_contradictions({name: asked[name] for name in names}, case.records, gone=frozenset())
    except Misuse as error:
        return str(error)
    return ""


def test_two_requests_contradict_each_other_if_they_want_different_things_of_one_row(asked, case):
    for one, other in permutations(asked, 2):
        said = refused(asked, case, one, other)
        assert bool(said) == contradict(one, other), (one, other, said)
        if said:
            assert said.startswith(f'"{one}" and "{other}" contradict each other about ')
            assert "file one of them, or the second once the first is done" in said
            assert case.records.ids[0] not in said
    assert refused(asked, case, "removed", "other rows", "removed with its owner") == ""
    assert "about 1 rows: both replace them, by different rows" in refused(
        asked, case, "replaced", "given another label"
    )
    assert "about 2 rows: one removes them" in refused(asked, case, "removed", "replaced by the same")
    everything = tuple(asked)
    assert 'removed" and "replaced"' in refused(asked, case, *everything)


def test_a_request_for_what_was_never_there_is_left_to_its_own_error(asked, case):
    strangers = {"nobody": Request.remove_owner("nobody"), "new": Request.remove(["row-000~2"]), "a": asked["replaced"]}
    refuse_contradictions(strangers, case.records, gone=frozenset())
    refuse_contradictions({}, case.records, gone=frozenset())


def test_what_is_asked_about_rows_that_are_gone_contradicts_nothing(asked, case, trained):
    both = {name: asked[name] for name in ("removed", "replaced by the same")}
    gone = frozenset(case.records.ids[:2])
    refuse_contradictions(both, case.records, gone=gone)
    with pytest.raises(Misuse, match="about 1 rows"):
        refuse_contradictions(both, case.records, gone=frozenset(case.records.ids[:1]))
    after = Retrain()(trained, case.records, Request.remove(sorted(gone)), rng=generator(0)).trained
    last, spent = carry_out(Retrain(), after, case.records, tuple(both.values()), rng=generator(0))
    assert (last.gone - gone, spent["refused"]) == ({case.records.ids[2]}, ())


@pytest.mark.parametrize("first", ["removed", "replaced"])
def test_the_judge_refuses_contradictory_requests_before_any_work(asked, case, trained, first):
    calls = []

    class Counted(Retrain):
        def _apply(self, task, *, rng):
            calls.append(task)
            return super()._apply(task, rng=rng)

    second = {"removed": "replaced", "replaced": "removed with its owner"}[first]
    both = (asked[first], asked[second])
    with pytest.raises(Misuse, match='"request 1" and "request 2" contradict each other about 1 rows'):
        carry_out(Counted(), trained, case.records, both, rng=generator(0))
    judge = Judge(trained=trained, records=case.records, test=case.test, through=Counted())
    target = Target(x=case.test.x[:1], y=case.test.y[:1])
    with pytest.raises(Misuse, match="contradict each other"):
        judge.attempt(Filing(both), target, rng=generator(0))
    assert calls == []
    after, spent = carry_out(Counted(), trained, case.records, both[:1], rng=generator(0))
    assert (len(calls), spent["refused"]) == (1, ())
    assert case.records.ids[0] in after.gone


class Filing:
    """An attacker with its requests in its pocket."""

    def __init__(self, filed):
        self.filed = filed

    def contribute(self, records, target, *, rng):
        return None

    def requests(self, trained, records, target, *, through, rng):
        return self.filed


def test_the_same_replacement_filed_twice_is_carried_out_once(asked, case, trained):
    twice = (asked["replaced"], replace(asked["replaced"], key="again"))
    after, spent = carry_out(Retrain(), trained, case.records, twice, rng=generator(0))
    assert spent["refused"] == ()
    assert {f"{case.records.ids[0]}~2"} == after.ids - trained.ids


def test_the_screen_refuses_a_job_of_contradictory_requests_before_it_looks_at_the_model(asked, case, trained):
    stage = ScreenStage(screens=(GradientNorm(),), draws=20)
    job = Job(requests=(asked["removed"], asked["replaced"]), before=trained, after=None, records=case.records)
    with pytest.raises(Misuse, match='"request 1" and "request 2" contradict each other about 1 rows'):
        stage(job, rng=generator(0))
    assert stage._desks == []
    stage(replace(job, requests=(asked["removed"], asked["other rows"])), rng=generator(0))
    assert len(stage._desks) == 1


@pytest.mark.parametrize("order", [("removed", "replaced"), ("replaced", "removed")])
def test_a_workspaces_run_refuses_the_replacement_and_so_the_contradiction(asked, case, trained, order):
    with pytest.raises(Unsupported, match="a workspace keeps no rows"):
        carry_out_together(Retrain(), trained, case.records, {name: asked[name] for name in order}, rng=generator(0))


def test_one_request_cannot_contradict_itself(case):
    with pytest.raises(Misuse, match="stands more than once in the request"):
        Request.replace_rows(
            ["row-000", "row-000"], torch.stack([1 - case.records.x[0], case.records.x[1]]), torch.tensor([1, 2])
        )


@pytest.mark.parametrize("method", [Retrain(), FineTune(), GradientAscent()], ids=lambda method: method.name)
def test_a_replacement_by_itself_or_of_what_is_not_there_is_refused(case, trained, method):
    row = case.records.select([0])
    with pytest.raises(Misuse, match="is the record itself; to keep it, leave it out"):
        method(trained, case.records, Request.replace_rows(row.ids, row.x, row.y), rng=generator(0))
    with pytest.raises(UnknownRecord, match='record "new" is not among'):
        method(trained, case.records, Request.replace_rows(["new"], 1 - row.x, row.y), rng=generator(0))
    fewer = train(SOFTMAX, case.records.select(range(1, 300)))
    with pytest.raises(NeverTrained, match=f'never trained on record "{row.ids[0]}"'):
        method(fewer, case.records, Request.replace_rows(row.ids, 1 - row.x, row.y), rng=generator(0))


# The other bad requests


def test_a_target_outside_the_data_is_refused_by_every_attack_and_by_the_judge(case, trained):
    row, own = case.test.x[:1], case.test.y[:1]
    outside = {
        "have shape (3,), the records (64,)": Target(x=torch.zeros(1, 3), y=own),
        "run from 0 to 9, got [10]": Target(x=row, y=torch.tensor([10])),
        "run from 0 to 9, got [11]": Target(x=row, y=own, wanted=torch.tensor([11])),
    }
    attacks = [SelectRequests(count=2), ReplaceRequests(count=2), SequentialRequests(horizon=2, per_step=1)]
    judge = Judge(trained=trained, records=case.records, test=case.test, through=Retrain())
    for why, target in outside.items():
        for attack in attacks:
            with pytest.raises(Misuse, match=re.escape(why)):
                attack.requests(trained, case.records, target, through=Retrain(), rng=generator(0))
        for attack in (PerturbRequests(recipe=SOFTMAX, count=2), Camouflage(surrogate=SOFTMAX, poison=2, camouflage=2)):
            with pytest.raises(Misuse, match=re.escape(why)):
                attack.contribute(case.records, target, rng=generator(0))
        with pytest.raises(Misuse, match=re.escape(why)):
            judge.attempt(Filing(()), target, rng=generator(0))


BUDGETS = {
    "select": (SelectRequests, "count"),
    "replace": (ReplaceRequests, "count"),
    "perturb": (partial(PerturbRequests, recipe=SOFTMAX), "count"),
    "sequential, steps": (SequentialRequests, "horizon"),
    "sequential, rows": (SequentialRequests, "per_step"),
    "slow-down": (SlowDown, "budget"),
    "camouflage": (Camouflage, "poison"),
}


@pytest.mark.parametrize(("kind", "budget"), BUDGETS.values(), ids=BUDGETS)
def test_a_budget_of_zero_is_refused(kind, budget):
    kind(**{budget: 1})
    with pytest.raises(Misuse, match=r"asks for nothing|>= 1"):
        kind(**{budget: 0})


def test_filing_an_empty_request_is_refused_by_the_judge_and_passes_the_screen(case, trained):
    judge = Judge(trained=trained, records=case.records, test=case.test, through=Retrain())
    target = Target(x=case.test.x[:1], y=case.test.y[:1])
    with pytest.raises(Misuse, match="empty request; give it a budget of at least one row"):
        judge.attempt(Filing((Request.remove([]),)), target, rng=generator(0))
    decision = defend(trained, case.records, Request.remove([]), screens=[GradientNorm()], rng=generator(0))
    assert (decision.action, decision.p) == ("carry out", None)


@pytest.mark.parametrize(
    "empty",
    [Request.remove([]), Request.replace_rows([], torch.zeros(0, 64), torch.zeros(0, dtype=torch.int64))],
    ids=["remove", "replace"],
)
@pytest.mark.parametrize("word", sorted(METHODS))
def test_an_empty_request_returns_the_identity(case, trained, word, empty):
    method = METHODS[word]()
    problem = method.supports(trained)
    if problem is not None:
        with pytest.raises(type(problem)):
            method(trained, case.records, empty, rng=generator(0))
        return
    result = method(trained, case.records, empty, rng=generator(0))
    assert result.trained is trained
    assert (result.events, result.cost.gradients) == ((), 0)
