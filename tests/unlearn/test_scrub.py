import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import Misuse, NothingChanged, Unsupported
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import Tally
from expunge.learn.training import adopt, train
from expunge.testing.watch import WriteWatch
from expunge.unlearn import scrub
from expunge.unlearn.distil import Teacher, divergence
from expunge.unlearn.scrub import Scrub
from tests.unlearn.kit import FORGET, RECIPE, RECORDS, vector

PACE = {"lr": 0.1, "momentum": 0.0, "batch_size": 96}


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


def apart_by_hand(t, s, temperature):
    """T^2 times the mean over rows of sum_c p_c (log p_c - log q_c), p the teacher's; from exponentials."""
    p, q = ((z / temperature).exp() / (z / temperature).exp().sum(1, keepdim=True) for z in (t, s))
    return temperature**2 * (p * (p.log() - q.log())).sum() / len(t)


def by_hand(module, passes, *, alpha=0.5, gamma=1.0, temperature=1.0, lr=0.1, momentum=0.0, records=RECORDS):
    """Whole-batch steps, each named "min" or "max", with autograd and the velocity written out."""
    teacher, student = copy.deepcopy(module), copy.deepcopy(module)
    forget, retain = records.take(FORGET), records.without(FORGET)
    velocity = 0.0
    for kind in passes:
        some = forget if kind == "max" else retain
        goal, answer = teacher(some.x).detach(), student(some.x)
        apart = apart_by_hand(goal, answer, temperature)
        right = -(answer.log_softmax(1)[torch.arange(len(some)), some.y]).mean()
        loss = -apart if kind == "max" else gamma * right + alpha * apart
        gradient = torch.autograd.grad(loss, list(student.parameters()))
        here = vector(student)
        velocity = momentum * velocity + torch.cat([g.flatten() for g in gradient]) + 1e-3 * here
        nn.utils.vector_to_parameters(here - lr * velocity, student.parameters())
    return vector(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_the_textbook_sum_teacher_first_in_the_square_of_the_temperature(temperature):
    t, s = 2 * torch.randn(2, 7, 5, dtype=torch.float64, generator=generator(1))
    expected = apart_by_hand(t, s, temperature)
    torch.testing.assert_close(divergence(t, s, temperature), expected, rtol=1e-13, atol=0)
    assert abs(float(divergence(s, t, temperature) - expected)) > 1e-3
    # Of one row alone, against numbers worked out by hand: KL((3/4, 1/4) || (1/2, 1/2)).
    logits = temperature * torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    flat = torch.zeros(1, 2, dtype=torch.float64)
    known = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert math.isclose(float(divergence(logits, flat, temperature)), temperature**2 * known, rel_tol=1e-13)


def test_divergence_is_finite_where_a_teacher_is_certain():
    certain = torch.tensor([[2000.0, 0.0]])
    assert float(divergence(certain, torch.zeros(1, 2))) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("epochs", "max_epochs", "passes"),
    [
        (2, 1, ["min", "max", "min"]),
        (3, 1, ["min", "max", "min", "min"]),
        (3, 2, ["min", "max", "min", "max", "min"]),
        (5, 2, ["min", "max", "min", "max", "min", "min", "min"]),
    ],
)
def test_passes_alternate_as_documented_and_each_step_is_the_hand_written_one(epochs, max_epochs, passes, trained):
    settings = {"alpha": 0.3, "gamma": 0.7, "temperature": 2.0}
    method = Scrub(**PACE, epochs=epochs, max_epochs=max_epochs, **settings)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    expected = by_hand(trained.module, passes, **settings)
    torch.testing.assert_close(vector(after.module), expected, rtol=0, atol=1e-12)


def test_all_steps_share_one_velocity(trained):
    method = Scrub(lr=0.05, momentum=0.9, batch_size=96, epochs=3, max_epochs=2, temperature=1.0)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    expected = by_hand(trained.module, ["min", "max", "min", "max", "min"], lr=0.05, momentum=0.9)
    torch.testing.assert_close(vector(after.module), expected, rtol=0, atol=1e-12)


def test_at_the_teacher_itself_a_max_step_has_no_gradient_which_is_why_min_steps_come_first(trained):
    student = copy.deepcopy(trained.module)
    x = RECORDS.take(FORGET).x
    apart = divergence(Teacher(trained.module)(x), student(x))
    gradient = torch.autograd.grad(apart, list(student.parameters()))
    assert max(float(g.abs().max()) for g in gradient) < 1e-14
    moved = Scrub(**PACE, epochs=2, max_epochs=1)(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    apart = divergence(Teacher(trained.module)(x), moved.module(x))
    assert max(float(g.abs().max()) for g in torch.autograd.grad(apart, list(moved.module.parameters()))) > 1e-3


def test_max_steps_lead_away_on_the_forget_rows_and_their_labels_are_not_read(trained):
    ask = {"rng": generator(0)}
    settings = {**PACE, "lr": 0.5, "temperature": 1.0, "alpha": 0.0}
    one, two = (
        Scrub(**settings, epochs=9, max_epochs=k)(trained, RECORDS, Request.remove(FORGET), **ask) for k in (1, 8)
    )
    x = RECORDS.take(FORGET).x
    near, far = (float(divergence(Teacher(trained.module)(x), m.trained.module(x).detach())) for m in (one, two))
    assert far > 1.5 * near
    y = RECORDS.y.clone()
    y[RECORDS.positions(FORGET)] = (y[RECORDS.positions(FORGET)] + 1) % 4
    other = Records(RECORDS.x, y, RECORDS.ids, RECORDS.owners, classes=4)
    unsealed = replace(trained, seal=None)
    relabelled = Scrub(**settings, epochs=9, max_epochs=8)(unsealed, other, Request.remove(FORGET), **ask)
    torch.testing.assert_close(vector(relabelled.trained.module), vector(two.trained.module), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_teacher_and_the_given_model_never_move(norm, monkeypatch):
    model = train(replace(RECIPE, model_args={"hidden": (8,), "norm": norm}), RECORDS)
    teachers = []

    class Watched(Teacher):
        def __init__(self, module):
            super().__init__(module)
            teachers.append(self.module)

    monkeypatch.setattr(scrub, "Teacher", Watched)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with WriteWatch([model.module]) as watch:
        after = Scrub(lr=0.1)(model, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    assert not watch.writes
    assert len(teachers) == 1
    for name, tensor in before.items():
        assert torch.equal(teachers[0].state_dict()[name], tensor), name
        assert torch.equal(model.module.state_dict()[name], tensor), name
    assert not torch.equal(vector(after.module), vector(teachers[0]))
    assert not any(part.training for part in teachers[0].modules())
    assert all(parameter.grad is None for parameter in teachers[0].parameters())


def test_a_teacher_answers_in_evaluation_mode_and_without_gradients():
    module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double().train()
    answers = Teacher(module)
    x = RECORDS.x
    first = answers(x)
    assert not first.requires_grad
    assert torch.equal(first, answers(x))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(first, answers(x))
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_work_is_booked(trained):
    result = Scrub(epochs=4, max_epochs=2)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    assert result.cost.gradients == result.cost.rows_read == 4 * 86 + 2 * 10


class Read(Tally):
    """Remembers the positions of the rows read, by the size of their set."""

    def __init__(self):
        super().__init__()
        self.positions = {}

    def saw(self, records, positions, x, y):
        self.positions.setdefault(len(records), []).append(positions)
        super().saw(records, positions, x, y)


def test_passes_are_in_orders_of_their_own_that_no_position_decides(trained):
    method = Scrub(batch_size=5, epochs=3, max_epochs=2)
    one = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    tally = Read()
    method(trained, RECORDS, Request.remove(FORGET), rng=generator(0), tally=tally)
    for name, size, passes in (("retain", 86, 3), ("forget", 10, 2)):
        orders = torch.cat(tally.positions[size]).split(size)
        assert len({tuple(order.tolist()) for order in orders}) == passes, name
        assert all(order.sort().values.equal(torch.arange(size)) for order in orders), name
    mixed = RECORDS.select(torch.randperm(96, generator=generator(1)))
    assert method(trained, mixed, Request.remove(FORGET), rng=generator(0)).trained.digest() == one.digest()
    assert method(trained, RECORDS, Request.remove(FORGET), rng=generator(1)).trained.digest() != one.digest()


def test_models_trained_elsewhere_are_fine(trained):
    elsewhere = adopt(copy.deepcopy(trained.module), RECIPE, RECORDS)
    here, there = (Scrub()(m, RECORDS, Request.remove(FORGET), rng=generator(0)).trained for m in (trained, elsewhere))
    assert here.digest() == there.digest()


def test_settings_that_cannot_be_meant_are_refused(trained):
    for settings, match in (
        ({"max_epochs": 0}, "max_epochs must be an integer >= 1 and < epochs, 3, got 0"),
        ({"max_epochs": 3}, "max_epochs must be .* got 3"),
        ({"max_epochs": 1.5}, "max_epochs must be .* got 1.5"),
        ({"alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ({"gamma": math.inf}, "gamma must be >= 0, got inf"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be > 0, got nan"),
        ({"momentum": 1.0}, "momentum must be"),
    ):
        with pytest.raises(Misuse, match=match):
            Scrub(**settings)
    with pytest.raises(NothingChanged):
        Scrub(lr=1e-300)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))


def test_models_without_classes_are_refused():
    targets = Records(RECORDS.x, RECORDS.x[:, :2])
    model = train(replace(RECIPE, loss="mse"), targets)
    with pytest.raises(Unsupported, match=r"scrub needs at least two classes.*use fine-tune"):
        Scrub()(model, targets, Request.remove(["0"]), rng=generator(0))
    lone = Records(RECORDS.x, torch.zeros(96, dtype=torch.int64), classes=1)
    with pytest.raises(Unsupported, match="at least two classes"):
        Scrub()(train(RECIPE, lone), lone, Request.remove(["0"]), rng=generator(0))
