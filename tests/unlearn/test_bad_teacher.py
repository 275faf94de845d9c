import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import Misuse, NothingChanged, Unsupported
from expunge.core.recipe import Pruning
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.build import build
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import adopt, train
from expunge.testing import conformance, digits
from expunge.testing.watch import WriteWatch
from expunge.unlearn import bad_teacher
from expunge.unlearn.bad_teacher import BadTeacher, share_of
from expunge.unlearn.distil import Teacher
from tests.unlearn.kit import FORGET, RECIPE, RECORDS, vector

ONE_STEP = {"lr": 0.2, "momentum": 0.0, "epochs": 1, "batch_size": 96}


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


@pytest.fixture
def taught(monkeypatch):
    """Copies of the modules whose answers a call takes, and those answering, in order: original, untrained."""
    seen = []

    class Watched(Teacher):
        def __init__(self, module):
            super().__init__(module)
            seen.append((copy.deepcopy(module), self.module))

    monkeypatch.setattr(bad_teacher, "Teacher", Watched)
    return seen


def apart_by_hand(t, s, temperature):
    p, q = ((z / temperature).exp() / (z / temperature).exp().sum(1, keepdim=True) for z in (t, s))
    return temperature**2 * (p * (p.log() - q.log())).sum() / len(t)


def step_by_hand(student, good, bad, retain, *, weight, temperature):
    """One whole-batch step; good and bad are functions of rows, the student is changed."""
    forget = RECORDS.take(FORGET)
    loss = apart_by_hand(good(retain.x), student(retain.x), temperature)
    loss = loss + weight * apart_by_hand(bad(forget.x), student(forget.x), temperature)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])
    here = vector(student)
    nn.utils.vector_to_parameters(here - 0.2 * (gradient + 1e-3 * here), student.parameters())


@pytest.mark.parametrize("kind", ["untrained", "uniform"])
@pytest.mark.parametrize(("epochs", "temperature"), [(1, 1.0), (3, 2.5)])
def test_steps_are_the_hand_written_ones(kind, epochs, temperature, trained, taught):
    settings = {"weight": 0.7, "temperature": temperature}
    method = BadTeacher(**{**ONE_STEP, "epochs": epochs}, **settings, share=1.0, teacher=kind)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(4)).trained
    student = copy.deepcopy(trained.module)

    def untrained(x):
        return taught[1][0](x).detach()

    def uniform(x):
        return torch.zeros(len(x), 4, dtype=torch.float64)

    bad = uniform if kind == "uniform" else untrained
    for _ in range(epochs):
        step_by_hand(student, lambda x: trained.module(x).detach(), bad, RECORDS.without(FORGET), **settings)
    torch.testing.assert_close(vector(after.module), vector(student), rtol=0, atol=1e-12)
    assert len(taught) == (2 if kind == "untrained" else 1)


def test_a_step_reads_its_share_of_the_retained_rows_alone(trained):
    method = BadTeacher(**ONE_STEP, weight=1.0, teacher="uniform", share=0.3)
    result = method(trained, RECORDS, Request.remove(FORGET), rng=generator(4))
    some = share_of(RECORDS.without(FORGET), 0.3, generator(4))
    student = copy.deepcopy(trained.module)
    step_by_hand(
        student,
        lambda x: trained.module(x).detach(),
        lambda x: torch.zeros(len(x), 4, dtype=torch.float64),
        some,
        weight=1.0,
        temperature=1.0,
    )
    torch.testing.assert_close(vector(result.trained.module), vector(student), rtol=0, atol=1e-12)
    assert result.cost.gradients == result.cost.rows_read == 26 + 10


def test_the_share_belongs_to_rows_and_coins_and_not_to_positions():
    first = share_of(RECORDS, 0.25, generator(1))
    assert len(first) == 24
    mixed = RECORDS.select(torch.randperm(96, generator=generator(2)))
    assert set(share_of(mixed, 0.25, generator(1)).ids) == set(first.ids)
    assert set(share_of(RECORDS, 0.25, generator(2)).ids) != set(first.ids)
    fewer = share_of(RECORDS.without(["r0"]), 0.25, generator(1))
    assert len(set(fewer.ids) ^ set(first.ids)) <= 2
    assert set(share_of(RECORDS, 1.0, generator(1)).ids) == set(RECORDS.ids)
    assert len(share_of(RECORDS, 1e-9, generator(1))) == 1


def test_the_bad_teacher_is_untrained_and_not_the_beginning_of_the_trained_model(trained, taught):
    method = BadTeacher(**ONE_STEP)
    for seed in (0, 1, RECIPE.seed):
        method(trained, RECORDS, Request.remove(FORGET), rng=generator(seed))
    again = replace(trained, recipe=replace(trained.recipe, seed=9))
    method(again, RECORDS, Request.remove(FORGET), rng=generator(0))
    bad = [vector(module) for module, _ in taught[1::2]]
    for place, one in enumerate(bad):
        assert not torch.equal(one, vector(trained.module))
        assert not torch.equal(one, vector(build(trained.recipe)))
        assert not torch.equal(one, vector(build(again.recipe)))
        assert not any(torch.equal(one, other) for other in bad[:place])
        assert one.dtype == torch.float64
    assert all(torch.equal(vector(module), vector(trained.module)) for module, _ in taught[::2])


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_teachers_and_the_given_model_never_move(norm, taught):
    model = train(replace(RECIPE, model_args={"hidden": (8,), "norm": norm}), RECORDS)
    before = copy.deepcopy(model.module)
    with WriteWatch([model.module]) as watch:
        method = BadTeacher(lr=0.1, weight=1.0, epochs=2)
        after = method(model, RECORDS, Request.remove(FORGET), rng=generator(0)).trained.module
    assert not watch.writes
    pairs = [*taught, (before, model.module)]
    assert len(pairs) == 3
    for was, still in pairs:
        for name, tensor in was.state_dict().items():
            assert torch.equal(still.state_dict()[name], tensor), name
    for _, still in taught:
        assert not any(part.training for part in still.modules())
    assert not torch.equal(vector(after), vector(before))
    for name, buffer in before.named_buffers():
        assert torch.equal(dict(after.named_buffers())[name], buffer), name


def test_forget_rows_come_to_be_answered_as_the_bad_teacher_does(trained, taught):
    method = BadTeacher(lr=0.3, epochs=20, weight=3.0)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    x = RECORDS.take(FORGET).x
    bad = taught[1][1](x).detach()
    near, far = (float(apart_by_hand(bad, model.module(x).detach(), 1.0)) for model in (after, trained))
    assert near < 0.5 * far


def test_no_labels_are_read(trained):
    other = Records(RECORDS.x, (RECORDS.y + 1) % 4, RECORDS.ids, RECORDS.owners, classes=4)
    method = BadTeacher(**ONE_STEP, share=1.0, teacher="uniform")
    one = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    two = method(replace(trained, seal=None), other, Request.remove(FORGET), rng=generator(0)).trained
    torch.testing.assert_close(vector(one.module), vector(two.module), rtol=0, atol=1e-14)


def test_models_trained_elsewhere_are_refused_unless_the_uniform_teacher_is_asked_for(trained):
    elsewhere = adopt(copy.deepcopy(trained.module), RECIPE, RECORDS)
    with pytest.raises(Unsupported, match='cannot be made anew; use teacher="uniform", or scrub'):
        BadTeacher()(elsewhere, RECORDS, Request.remove(FORGET), rng=generator(0))
    method = BadTeacher(teacher="uniform")
    here, there = (method(m, RECORDS, Request.remove(FORGET), rng=generator(0)).trained for m in (trained, elsewhere))
    assert here.digest() == there.digest()
    assert BadTeacher()(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained.digest() != here.digest()


def test_a_pruned_model_stays_pruned():
    model = train(replace(RECIPE, pruning=Pruning(sparsity=0.5, by="random")), RECORDS)
    after = BadTeacher(lr=0.1)(model, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    assert mask_of_zeros(after.module).held == mask_of_zeros(model.module).held == 24


def test_settings_that_cannot_be_meant_are_refused(trained):
    for settings, match in (
        ({"weight": 0.0}, "weight must be > 0, got 0.0"),
        ({"weight": float("nan")}, "weight must be > 0, got nan"),
        ({"share": 0.0}, "share must be > 0 and <= 1, got 0.0"),
        ({"share": 1.1}, "share must be > 0 and <= 1, got 1.1"),
        ({"temperature": -1.0}, "temperature must be > 0, got -1.0"),
        ({"teacher": "none"}, 'teacher must be "untrained" or "uniform", got "none"'),
        ({"lr": -1.0}, "lr must be > 0"),
    ):
        with pytest.raises(Misuse, match=match):
            BadTeacher(**settings)
    with pytest.raises(NothingChanged):
        BadTeacher(lr=1e-300)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))


def test_models_without_classes_are_refused():
    targets = Records(RECORDS.x, RECORDS.x[:, :2])
    model = train(replace(RECIPE, loss="mse"), targets)
    with pytest.raises(Unsupported, match=r"bad-teacher needs at least two classes.*use fine-tune"):
        BadTeacher()(model, targets, Request.remove(["0"]), rng=generator(0))
    lone = Records(RECORDS.x, torch.zeros(96, dtype=torch.int64), classes=1)
    with pytest.raises(Unsupported, match="at least two classes"):
        BadTeacher()(train(RECIPE, lone), lone, Request.remove(["0"]), rng=generator(0))


def test_where_a_class_goes_it_passes_all_checks_and_where_labels_were_wrong_it_cannot():
    whole = digits()
    of_class = replace(whole, request=Request.remove_class(3), _models={})
    report = conformance(BadTeacher(), case=of_class, exceptions={})
    assert not report.failed, report
    report = conformance(BadTeacher(), case=whole, exceptions={})
    assert report.failed == ("nearer-than-standing-still",), report
    assert report["nearer-than-standing-still"].figures["gain_high"] < 0
