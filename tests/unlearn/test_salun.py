import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import Misuse, NothingChanged, Unsupported
from expunge.core.events import Retrained
from expunge.core.mask import Mask
from expunge.core.recipe import Pruning, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import TrainingLog
from expunge.learn.loop import Keep, Tally
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import adopt, train
from expunge.testing.watch import WriteWatch
from expunge.unlearn import FineTune, GradientAscent, NegGradPlus, RandomLabels, Retrain
from expunge.unlearn.amnesiac import AmnesiacUnlearning
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.random_labels import wrong_labels
from expunge.unlearn.retrain import RetrainBriefly
from expunge.unlearn.salun import SaliencyMasked, SalUn, largest, saliency_mask
from expunge.unlearn.sparsity import Masked
from tests.unlearn.kit import FORGET, RECIPE, RECORDS, vector

SIZE = 6 * 8 + 8 + 8 * 4 + 4
INNER = (FineTune(), GradientAscent(), NegGradPlus(), RandomLabels())


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


@dataclass(frozen=True, kw_only=True)
class Deaf(Method):
    """Moves every entry by one, and takes no notice of masks; hands back another module if asked."""

    elsewhere: bool = False

    def _apply(self, task, *, rng):
        module = copy.deepcopy(task.trained.module) if self.elsewhere else task.trained.module
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 1
        log = TrainingLog(steps=1, rows_read=7, threads=1)
        return Done(trained=replace(task.trained, module=module, log=log), events=(Retrained(part=-1, rows=7),))


class Read(Tally):
    """Remembers the ids of the rows read, in order."""

    def __init__(self):
        super().__init__()
        self.ids = []

    def saw(self, records, positions, x, y):
        self.ids += [records.ids[place] for place in positions.tolist()]


def gradient(module, x, y, reduction="mean"):
    loss = nn.functional.cross_entropy(module(x), y, reduction=reduction)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def salient_by_hand(module, share, records=RECORDS, ids=FORGET):
    """Row by row, sorted in Python: (entries,) True for the largest."""
    forget = records.take(ids)
    total = sum(gradient(module, x[None], y[None]) for x, y in zip(forget.x, forget.y, strict=True))
    ranked = sorted(range(SIZE), key=lambda place: -abs(float(total[place])))
    chosen = torch.zeros(SIZE, dtype=torch.bool)
    chosen[ranked[: round(share * SIZE)]] = True
    return chosen


def task_of(trained, records=RECORDS, ids=FORGET, moves=None):
    return Task(trained=trained, forget=records.take(ids), retain=records.without(ids), tally=Tally(), moves=moves)


def flat(mask):
    return torch.cat([one.flatten() for one in mask.moves.values()])


def asked(method, model, **others):
    return method(model, RECORDS, Request.remove(FORGET), rng=others.pop("rng", generator(0)), **others)


# The mask


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_mask_is_the_sort_written_out_over_all_parameters_together(share, trained):
    mask = saliency_mask(task_of(trained), share, generator(0))
    assert torch.equal(flat(mask), salient_by_hand(trained.module, share))
    batched = replace(trained, recipe=replace(trained.recipe, batch_size=3))  # four batches of forget rows, not one
    assert torch.equal(flat(saliency_mask(task_of(batched), share, generator(0))), flat(mask))
    assert list(mask.moves) == [name for name, _ in trained.module.named_parameters()]
    counts = {name: int(one.sum()) for name, one in mask.moves.items()}
    assert len({count / mask.moves[name].numel() for name, count in counts.items()}) > 1  # not a share of each


@pytest.mark.parametrize("share", [1e-9, 0.013, 0.25, 0.5, 0.777, 1.0])
def test_the_count_is_exact_even_where_all_scores_are_alike(share):
    scores = {"a": torch.zeros(7, 3), "b": torch.ones(2), "c": torch.zeros(17)}
    mask = largest(scores, share)
    count = max(1, round(share * 40))
    assert int(flat(mask).sum()) == count
    ranked = [21, 22, *range(21), *range(23, 40)]  # the two ones, and then the others as they come
    assert flat(mask).nonzero().flatten().tolist() == sorted(ranked[:count])


def test_entries_that_may_not_move_are_neither_counted_nor_chosen():
    scores = {"a": torch.arange(10.0), "b": torch.zeros(4)}
    among = Mask({"a": torch.arange(10) < 6})
    for share, best in ((0.1, [5]), (0.4, [2, 3, 4, 5]), (1.0, [0, 1, 2, 3, 4, 5])):
        mask = largest(scores, share, among=among)
        assert int(flat(mask).sum()) == round(share * 10)
        assert mask.moves["a"].nonzero().flatten().tolist() == best
    assert mask.moves["b"].all()


def test_the_mask_is_of_the_forget_rows_and_of_no_position(trained):
    mask = flat(saliency_mask(task_of(trained), 0.5, generator(0)))
    assert not torch.equal(mask, flat(saliency_mask(task_of(trained, ids=["r1", "r2"]), 0.5, generator(0))))
    mixed = RECORDS.select(torch.randperm(96, generator=generator(1)))
    assert torch.equal(mask, flat(saliency_mask(task_of(trained, mixed, FORGET[::-1]), 0.5, generator(0))))
    # Nor of an order of summation: bits could decide which of two entries is the last to be chosen.
    read = []
    for ids in (FORGET, FORGET[::-1]):
        task = replace(task_of(trained, mixed, ids), tally=Read())
        saliency_mask(task, 0.5, generator(0))
        read.append(task.tally.ids)
    assert read[0] == read[1]
    assert sorted(read[0]) == sorted(FORGET)
    # The gradient alone, without the penalty on large weights.
    heavy = replace(trained, recipe=replace(trained.recipe, weight_decay=100.0))
    assert torch.equal(mask, flat(saliency_mask(task_of(heavy), 0.5, generator(0))))


def test_dropout_and_batch_statistics_have_no_part_in_the_mask(trained):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    module(RECORDS.x)
    before = copy.deepcopy(module.state_dict())
    model = adopt(module.train(), RECIPE, RECORDS)
    masks = [flat(saliency_mask(task_of(model), 0.5, generator(k))) for k in (0, 1)]
    assert torch.equal(*masks)
    assert module.training
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in module.parameters())
    scored = gradient(copy.deepcopy(module).eval(), RECORDS.take(FORGET).x, RECORDS.take(FORGET).y).abs()
    assert scored[masks[0]].min() >= scored[~masks[0]].max()


# Masked methods


@pytest.mark.parametrize("method", [*INNER, Deaf(), Deaf(elsewhere=True)])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_entries_outside_the_mask_keep_their_bits_and_those_inside_move(method, share, trained):
    if not isinstance(method, Deaf):
        method = replace(method, lr=0.1, momentum=0.9, epochs=3)
    heavy = replace(trained, recipe=replace(trained.recipe, weight_decay=0.1))
    after = vector(asked(SaliencyMasked(then=method, share=share), heavy).trained.module)
    moved = after != vector(heavy.module)
    salient = salient_by_hand(heavy.module, share)
    assert torch.equal(moved, salient)
    if isinstance(method, Deaf):
        torch.testing.assert_close(after, vector(heavy.module) + salient.double(), rtol=0, atol=0)


@pytest.mark.parametrize("method", INNER)
def test_a_masked_step_is_the_methods_step_on_the_salient_entries(method, trained):
    method = replace(method, lr=0.1, momentum=0.0, epochs=1, batch_size=96)
    start, whole = vector(trained.module), vector(asked(method, trained).trained.module)
    part = vector(asked(SaliencyMasked(then=method, share=0.3), trained).trained.module)
    salient = salient_by_hand(trained.module, 0.3)
    torch.testing.assert_close(part, torch.where(salient, whole, start), rtol=0, atol=0)


def test_methods_that_know_masks_see_it_in_between_and_not_only_at_the_end(trained):
    """The second step starts from the masked first one: not the same as masking at the end."""
    method = FineTune(lr=0.3, momentum=0.0, epochs=2, batch_size=96)
    masked = vector(asked(SaliencyMasked(then=method, share=0.3), trained).trained.module)
    salient = salient_by_hand(trained.module, 0.3)
    late = torch.where(salient, vector(asked(method, trained).trained.module), vector(trained.module))
    module, retain = copy.deepcopy(trained.module), RECORDS.without(FORGET)
    for _ in range(2):
        here = vector(module)
        step = 0.3 * (gradient(module, retain.x, retain.y) + 1e-3 * here)
        nn.utils.vector_to_parameters(torch.where(salient, here - step, here), module.parameters())
    torch.testing.assert_close(masked, vector(module), rtol=0, atol=1e-13)
    assert (masked - late).abs().max() > 1e-4


def test_with_all_entries_salient_a_masked_method_is_the_method(trained):
    for method in INNER:
        assert asked(SaliencyMasked(then=method, share=1.0), trained).trained.digest() == (
            asked(method, trained).trained.digest()
        )


def test_masks_can_be_nested(trained):
    inner = SaliencyMasked(then=FineTune(lr=0.1), share=0.5)
    moved = vector(asked(SaliencyMasked(then=inner, share=0.5), trained).trained.module) != vector(trained.module)
    assert torch.equal(moved, salient_by_hand(trained.module, round(0.25 * SIZE) / SIZE))


@pytest.mark.parametrize("method", [FineTune(lr=0.1), Deaf()])
def test_a_pruned_model_stays_pruned_and_the_share_is_of_what_is_left(method):
    model = train(replace(RECIPE, pruning=Pruning(sparsity=0.75, by="random")), RECORDS)
    after = asked(SaliencyMasked(then=method, share=0.5), model).trained
    assert mask_of_zeros(model.module).held == mask_of_zeros(after.module).held == 36
    assert int((vector(after.module) != vector(model.module)).sum()) == round(0.5 * (SIZE - 36))


def test_what_a_method_builds_anew_is_whole_and_its_salient_entries_are_taken(trained):
    brief = RetrainBriefly(steps=5)
    start, anew = vector(trained.module), vector(asked(brief, trained).trained.module)
    part = vector(asked(SaliencyMasked(then=brief, share=0.3), trained).trained.module)
    salient = salient_by_hand(trained.module, 0.3)
    assert torch.equal(part, torch.where(salient, anew, start))
    model = train(replace(RECIPE, pruning=Pruning(sparsity=0.75, by="random")), RECORDS)
    anew = vector(asked(brief, model).trained.module)
    under = replace(model, recipe=replace(model.recipe, pruning=None))
    assert torch.equal(vector(asked(Masked(then=brief), under).trained.module), anew)  # sparse from the first step on
    after = vector(asked(SaliencyMasked(then=brief, share=0.3), model).trained.module)
    moved = after != vector(model.module)
    assert int(moved.sum()) == round(0.3 * (SIZE - 36))
    assert torch.equal(after[moved], anew[moved])


def test_a_repair_of_the_kept_steps_sees_the_other_entries_as_they_were(trained):
    model = train(RECIPE, RECORDS, keep=Keep(batches=True, every=1))
    assert model.digest() == trained.digest()
    kept = AmnesiacUnlearning(repair_epochs=0)
    ids = FORGET[:1]
    start, far = (
        vector(one.module) for one in (model, kept(model, RECORDS, Request.remove(ids), rng=generator(0)).trained)
    )
    salient = salient_by_hand(model.module, 0.3, ids=ids)
    here = torch.where(salient, far, start)
    for epochs in (0, 1):
        then = AmnesiacUnlearning(repair_epochs=epochs, lr=0.3, momentum=0.0, batch_size=96)
        masked = SaliencyMasked(then=then, share=0.3)
        part = masked(model, RECORDS, Request.remove(ids), rng=generator(0)).trained
        if epochs:
            module, retain = copy.deepcopy(model.module), RECORDS.without(ids)
            nn.utils.vector_to_parameters(here.clone(), module.parameters())
            step = 0.3 * (gradient(module, retain.x, retain.y) + 1e-3 * here)
            here = torch.where(salient, here - step, here)
        torch.testing.assert_close(vector(part.module), here, rtol=0, atol=1e-14)
        assert part.log is None


def test_the_given_model_is_never_written_and_keeps_its_flags(trained):
    with WriteWatch([trained.module]) as watch:
        for method in (SalUn(), SaliencyMasked(then=Deaf(elsewhere=True))):
            result = asked(method, trained)
            assert not any(part.training for part in result.trained.module.modules())
    assert not watch.writes


def test_batch_statistics_do_not_move():
    model = train(replace(RECIPE, model_args={"hidden": (8,), "norm": "batch"}), RECORDS)
    after = asked(SalUn(lr=0.1), model).trained.module
    for name, buffer in model.module.named_buffers():
        assert torch.equal(dict(after.named_buffers())[name], buffer), name


def test_what_is_booked_is_the_composition_with_the_methods_events_and_the_work_of_the_mask(trained):
    result = asked(SaliencyMasked(then=Deaf()), trained)
    assert [event.rows for event in result.events] == [7, 10]
    assert result.trained.log is None  # the method's would tell of steps that are undone in part
    assert asked(Deaf(), trained).trained.log is not None
    assert result.events[-1].method == "saliency-masked-deaf"
    assert result.cost.gradients == result.cost.rows_read == 10
    salun, plain = asked(SalUn(), trained), asked(RandomLabels(), trained)
    assert salun.cost.gradients == plain.cost.gradients + 10
    assert salun.events[-1].method == "salun"


# SalUn


def test_salun_is_random_labels_masked(trained):
    settings = {"epochs": 2, "lr": 0.1, "momentum": 0.5, "weight": 0.3, "batch_size": 7}
    one = asked(SalUn(**settings, share=0.4), trained).trained
    assert one.digest() == asked(SaliencyMasked(then=RandomLabels(**settings), share=0.4), trained).trained.digest()
    assert asked(SalUn(**settings, share=1.0), trained).trained.digest() == (
        asked(RandomLabels(**settings), trained).trained.digest()
    )


def test_a_salun_step_is_the_hand_written_one(trained):
    method = SalUn(lr=0.2, momentum=0.0, weight=0.5, share=0.3, epochs=1, batch_size=96)
    after = asked(method, trained, rng=generator(4)).trained
    start, forget, retain = vector(trained.module), RECORDS.take(FORGET), RECORDS.without(FORGET)
    wrong = wrong_labels(forget, 4, generator(4))
    direction = gradient(trained.module, retain.x, retain.y) + 0.5 * gradient(trained.module, forget.x, wrong)
    expected = start - salient_by_hand(trained.module, 0.3) * (0.2 * (direction + 1e-3 * start))
    torch.testing.assert_close(vector(after.module), expected, rtol=0, atol=1e-14)


def test_the_order_of_rows_changes_no_byte(trained):
    mixed = RECORDS.select(torch.randperm(96, generator=generator(1)))
    one = asked(SalUn(batch_size=5), trained).trained
    other = SalUn(batch_size=5)(trained, mixed, Request.remove(FORGET[::-1]), rng=generator(0)).trained
    assert one.digest() == other.digest()


# Refusals


def test_settings_that_cannot_be_meant_are_refused(trained):
    for make, match in (
        (lambda: SalUn(share=0.0), "share must be > 0 and <= 1, got 0.0"),
        (lambda: SalUn(share=math.nan), "share must be > 0 and <= 1, got nan"),
        (lambda: SaliencyMasked(then=FineTune(), share=1.5), "share must be > 0 and <= 1, got 1.5"),
        (lambda: SalUn(weight=-1.0), "weight must be >= 0, got -1.0"),
        (lambda: SalUn(lr=0.0), "lr must be > 0"),
        (lambda: SaliencyMasked(then=Retrain()), r"then must be a method that claims nothing.*got Retrain"),
        (lambda: SaliencyMasked(then="fine-tune"), "then must be a method that claims nothing.*got 'fine-tune'"),
    ):
        with pytest.raises(Misuse, match=match):
            make()
    with pytest.raises(NothingChanged):
        asked(SalUn(lr=1e-300), trained)


def test_salun_refuses_models_without_classes_and_a_masked_method_what_the_method_refuses():
    targets = Records(RECORDS.x, RECORDS.x[:, :2])
    model, ask = train(replace(RECIPE, loss="mse"), targets), Request.remove(["0"])
    with pytest.raises(Unsupported, match=r"salun needs at least two classes.*use fine-tune"):
        SalUn()(model, targets, ask, rng=generator(0))
    with pytest.raises(Unsupported, match="random-labels needs classes"):
        SaliencyMasked(then=RandomLabels())(model, targets, ask, rng=generator(0))
    lone = Records(RECORDS.x, torch.zeros(96, dtype=torch.int64), classes=1)
    with pytest.raises(Unsupported, match="at least two classes"):
        SalUn()(train(RECIPE, lone), lone, ask, rng=generator(0))
    sharded = train(replace(RECIPE, sharding=Sharding(shards=2)), RECORDS)
    with pytest.raises(Unsupported, match=r"saliency-masked-fine-tune changes one model.*2 shards"):
        asked(SaliencyMasked(then=FineTune()), sharded)


def test_regression_can_be_masked():
    targets = Records(RECORDS.x, RECORDS.x[:, 0])
    model = train(replace(RECIPE, loss="mse"), targets)
    method = SaliencyMasked(then=GradientAscent(lr=0.01), share=0.2)
    after = method(model, targets, Request.remove(["0", "1"]), rng=generator(0)).trained
    start = copy.deepcopy(model.module)
    loss = (start(targets.x[:2]).flatten() - targets.y[:2]).square().sum()
    scored = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(start.parameters()))]).abs()
    moved = vector(after.module) != vector(start)
    assert int(moved.sum()) == round(0.2 * len(scored))
    assert scored[moved].min() >= scored[~moved].max()
