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
from expunge.learn.build import allow_code
from expunge.learn.training import adopt, train
from expunge.unlearn.boundary_shrink import BoundaryShrink, nearest_other
from tests.unlearn.kit import FORGET, RECIPE, RECORDS, rows, vector

ONE_STEP = {"lr": 0.2, "momentum": 0.0, "epochs": 1, "batch_size": 96}


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


def labels_by_hand(module, x, y, epsilon, pixels):
    """Row by row, with a gradient of the whole cross-entropy written out."""
    found = []
    for row, label in zip(x, y, strict=True):
        leaf = row.clone().requires_grad_()
        logits = module(leaf[None])[0]
        (logits.exp().sum().log() - logits[label]).backward()
        neighbour = (row + epsilon * leaf.grad.sign()).detach()
        if pixels:
            neighbour = torch.minimum(torch.maximum(neighbour, torch.tensor(0.0)), torch.tensor(1.0))
        answers = module(neighbour[None])[0].tolist()
        answers[label] = -math.inf
        found.append(answers.index(max(answers)))
    return torch.tensor(found)


def step_by_hand(module, x, labels, lr):
    module = copy.deepcopy(module)
    loss = nn.functional.cross_entropy(module(x), labels)
    gradient = torch.autograd.grad(loss, list(module.parameters()))
    return vector(module) - lr * torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("pixels", [False, True])
def test_a_step_goes_down_the_loss_of_the_labels_across_the_boundary_and_nothing_else(epsilon, pixels):
    records = rows(pixels=pixels)
    model = train(RECIPE, records)
    after = BoundaryShrink(**ONE_STEP, epsilon=epsilon)(model, records, Request.remove(FORGET), rng=generator(0))
    forget = records.take(FORGET)
    x = forget.x.double() / 255 if pixels else forget.x
    labels = labels_by_hand(model.module, x, forget.y, epsilon, pixels)
    expected = step_by_hand(model.module, x, labels, 0.2)
    torch.testing.assert_close(vector(after.trained.module), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pixels", [False, True])
def test_the_batched_labels_are_those_found_row_by_row_and_clamping_matters(pixels, trained):
    records = rows(pixels=pixels)
    x = records.x.double() / 255 if pixels else records.x
    for epsilon in (0.0, 0.3, 3.0):
        found = nearest_other(trained.module, x, records.y, epsilon, clamp=pixels)
        assert torch.equal(found, labels_by_hand(trained.module, x, records.y, epsilon, pixels))
    assert not torch.equal(found, labels_by_hand(trained.module, x, records.y, 3.0, not pixels))


def test_no_row_gets_its_own_label_even_where_that_stays_the_most_probable(trained):
    with torch.no_grad():
        right = trained.module(RECORDS.x).argmax(1) == RECORDS.y
    assert right.sum() > 48  # so at epsilon 0 the most probable class is mostly the row's own
    for epsilon in (0.0, 1e-3, 0.1, 1.0):
        assert (nearest_other(trained.module, RECORDS.x, RECORDS.y, epsilon, clamp=False) != RECORDS.y).all()


def test_two_classes_leave_one_other():
    two = rows(classes=2)
    model = train(RECIPE, two).module
    assert torch.equal(nearest_other(model, two.x, two.y, 0.1, clamp=False), 1 - two.y)


def test_the_neighbour_lies_uphill():
    """A linear model with two other classes: uphill of class 0 leads to 2, downhill to 1."""
    line = nn.Linear(1, 3, bias=True).double()
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[0.0], [-1.0], [1.0]]))
        line.bias.copy_(torch.tensor([0.0, -1.0, -1.0]))
    x = torch.tensor([[0.1], [-0.1]], dtype=torch.float64)
    assert nearest_other(line, x, torch.zeros(2, dtype=torch.int64), 0.5, clamp=False).tolist() == [2, 1]
    # With class 2 as its own, the loss grows to the left, where class 1 is nearer than class 0 only after a long step.
    own = torch.tensor([2])
    assert nearest_other(line, x[:1], own, 0.5, clamp=False).tolist() == [0]
    assert nearest_other(line, x[:1], own, 1.5, clamp=False).tolist() == [1]
    assert nearest_other(line, x[:1], own, 1.5, clamp=True).tolist() == [0]


def test_labels_are_those_of_the_model_as_it_was_in_all_epochs(trained):
    method = BoundaryShrink(lr=0.3, momentum=0.0, epochs=3, batch_size=96, epsilon=0.5)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    forget, module = RECORDS.take(FORGET), copy.deepcopy(trained.module)
    labels = labels_by_hand(module, forget.x, forget.y, 0.5, False)
    for _ in range(3):
        nn.utils.vector_to_parameters(step_by_hand(module, forget.x, labels, 0.3), module.parameters())
    torch.testing.assert_close(vector(after.module), vector(module), rtol=0, atol=1e-13)


def test_labels_belong_to_rows_and_not_to_positions(trained):
    order = torch.randperm(96, generator=generator(1))
    method = BoundaryShrink(epochs=2, batch_size=3)
    one = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    other = method(trained, RECORDS.select(order), Request.remove(FORGET[::-1]), rng=generator(0)).trained
    assert one.digest() == other.digest()


def test_work_is_booked_and_no_retained_row_is_read(trained):
    result = BoundaryShrink(epochs=3, batch_size=4)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    assert result.cost.gradients == result.cost.rows_read == (1 + 3) * 10


def test_labels_are_found_in_evaluation_mode_whatever_mode_a_model_comes_in():
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    module(RECORDS.x)
    results = []
    for one in (copy.deepcopy(module).eval(), module.train()):
        method = BoundaryShrink(lr=0.1, epochs=2)
        results.append(method(adopt(one, RECIPE, RECORDS), RECORDS, Request.remove(FORGET), rng=generator(0)).trained)
    assert results[0].digest() == results[1].digest()
    assert all(part.training for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_batch_statistics_do_not_move():
    model = train(replace(RECIPE, model_args={"hidden": (8,), "norm": "batch"}), RECORDS)
    after = BoundaryShrink(epochs=2)(model, RECORDS, Request.remove(FORGET), rng=generator(0)).trained.module
    for name, buffer in model.module.named_buffers():
        assert torch.equal(dict(after.named_buffers())[name], buffer), name


def test_settings_that_cannot_be_meant_are_refused(trained):
    for settings, match in (
        ({"epsilon": -0.1}, "epsilon must be >= 0, got -0.1"),
        ({"epsilon": math.nan}, "epsilon must be >= 0, got nan"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"epochs": 0}, "epochs must be"),
    ):
        with pytest.raises(Misuse, match=match):
            BoundaryShrink(**settings)
    with pytest.raises(NothingChanged):
        BoundaryShrink(lr=1e-300)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))


def test_models_without_classes_and_rows_without_a_gradient_are_refused():
    targets = Records(RECORDS.x, RECORDS.x[:, :2])
    model = train(replace(RECIPE, loss="mse"), targets)
    with pytest.raises(Unsupported, match=r"boundary-shrink needs at least two classes.*use fine-tune"):
        BoundaryShrink()(model, targets, Request.remove(["0"]), rng=generator(0))
    lone = Records(RECORDS.x, torch.zeros(96, dtype=torch.int64), classes=1)
    with pytest.raises(Unsupported, match="at least two classes"):
        BoundaryShrink()(train(RECIPE, lone), lone, Request.remove(["0"]), rng=generator(0))
    words = Records(torch.arange(96 * 2).reshape(96, 2) % 7, RECORDS.y, classes=4)
    tokens = train(replace(RECIPE, model=allow_code(Words), model_args={}), words)
    with pytest.raises(Unsupported, match=r"these are torch.int64; use random-labels"):
        BoundaryShrink()(tokens, words, Request.remove(["0"]), rng=generator(0))


class Words(nn.Module):
    """Answers to pairs of tokens."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 3), nn.Linear(3, outputs)

    def forward(self, x):
        return self.head(self.words(x).mean(1))
