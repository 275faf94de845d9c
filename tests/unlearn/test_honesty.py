"""Ways in which a removal could be called exact and not be: each is refused, or said."""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from expunge import (
    BadRecipe,
    Claim,
    Constant,
    FineTune,
    Guarantee,
    Misuse,
    Recipe,
    Records,
    Request,
    Retrain,
    Sisa,
    Unsupported,
    allow_code,
    generator,
    load,
    train,
)
from expunge.core.protocols import Need
from expunge.learn.loop import Tally
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.steps import Steps

X = torch.randn(120, 6, generator=generator(0))
Y = (X[:, 0] > 0).long()
OWNERS = [f"o{i % 12}" for i in range(120)]
RECORDS = Records(X, Y, owners=OWNERS)
RECIPE = Recipe(model="softmax", epochs=2, batch_size=16)


@pytest.mark.parametrize("method", [Sisa(), Retrain()], ids=lambda method: method.name)
@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "saved"])
def test_other_owners_or_other_rows_under_the_same_ids_are_refused(method, kept: bool, tmp_path: Path) -> None:
    trained = train(RECIPE, RECORDS, shards=3)
    if kept:
        trained = load(trained.save(tmp_path / "model"))
    moved = X.clone()
    moved[7] += 1e-6
    for other in (Records(X, Y), Records(moved, Y, owners=OWNERS), Records(X, 1 - Y, owners=OWNERS)):
        with pytest.raises(Misuse, match="not those that the model was trained on"):
            method(trained, other, Request.remove(["5"]), rng=generator(0))
    shuffled = RECORDS.select(torch.randperm(120, generator=generator(1)))
    after = method(trained, shuffled, Request.remove(["5"]), rng=generator(0)).trained
    rest = shuffled.without(["5"])
    assert method(after, rest, Request.remove(["6"]), rng=generator(0)).trained.gone == {"5", "6"}


def test_coins_drawn_anew_are_never_pathwise_again(tmp_path: Path) -> None:
    fresh = Retrain(coins="fresh")(train(RECIPE, RECORDS), RECORDS, Request.remove(["1"]), rng=generator(0))
    assert fresh.exactness == "in law"
    saved = load(fresh.trained.save(tmp_path / "model"))
    for start in (fresh.trained, saved):
        assert Retrain()(start, RECORDS, Request.remove(["1"]), rng=generator(0)).exactness == "in law"
        assert Retrain()(start, RECORDS, Request.remove(["2"]), rng=generator(0)).exactness == "in law"


def test_an_exact_method_makes_good_what_one_without_a_claim_did() -> None:
    request = Request.remove(["1"])
    tuned = FineTune()(train(RECIPE, RECORDS), RECORDS, request, rng=generator(0)).trained
    healed = Retrain()(tuned, RECORDS, request, rng=generator(0))
    assert (healed.claim, healed.trained.standing, healed.trained.gone) == (Claim.EXACT, Claim.EXACT, {"1"})
    assert healed.trained.digest() == train(RECIPE, RECORDS.without(["1"])).digest()


def test_a_text_is_not_a_list_of_ids() -> None:
    with pytest.raises(Misuse, match="ids must be several"):
        Request.remove("12")
    with pytest.raises(Misuse, match=r"rng must be a torch.Generator, got int; use expunge.generator\(0\)"):
        Retrain()(train(RECIPE, RECORDS), RECORDS, Request.remove(["1"]), rng=0)  # type: ignore[arg-type]


def narrow(shape: list[int], outputs: int) -> nn.Module:
    return nn.Linear(3, outputs)


def wide(shape: list[int], outputs: int) -> nn.Module:
    return nn.Linear(shape[0], outputs + 5)


@pytest.mark.parametrize(
    ("make", "message"), [(narrow, "cannot read rows of shape"), (wide, "must give \\(rows, 2\\)")]
)
def test_a_module_that_does_not_fit_is_refused_before_training(make, message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        train(replace(RECIPE, model=allow_code(make)), RECORDS)
    with pytest.raises(BadRecipe, match="not a module; see adopt"):
        allow_code(nn.Linear(3, 3))


class Hoarder(nn.Module):
    """Keeps something that no state_dict shows."""

    def __init__(self, shape: list[int], outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(shape[0], outputs)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def test_state_that_no_checkpoint_holds_is_refused() -> None:
    with pytest.raises(Unsupported, match="outside its state_dict; register it with persistent=True"):
        train(replace(RECIPE, model=allow_code(Hoarder)), RECORDS)


def test_a_row_is_not_replaced_by_itself() -> None:
    request = Request.replace_rows(["3"], X[3:4], Y[3:4])
    with pytest.raises(Misuse, match='replacement of record "3" is the record itself'):
        Retrain()(train(RECIPE, RECORDS), RECORDS, request, rng=generator(0))


@dataclass(frozen=True, kw_only=True)
class Certified(Method):
    """A stub that has a guarantee for whatever it does."""

    claim: ClassVar[Claim] = Claim.CERTIFIED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET})

    def _apply(self, task: Task, *, rng: torch.Generator) -> Done:
        with torch.no_grad():
            next(task.trained.module.parameters()).add_(1)
        constants = {"c": Constant(1.0, "proved", "setting method.c")}
        bound = {"epsilon": 1.0, "delta": 1e-5, "mu": 0.2, "sigma": 1.0, "sensitivity": 0.2}
        about = {"mechanism": "m", "reference": "r", "parameters": ("w",), "releases": "current"}
        return Done(trained=task.trained, guarantee=Guarantee(**bound, **about, constants=constants))


def test_a_later_certificate_does_not_clear_what_was_done_without_one() -> None:
    tuned = FineTune()(train(RECIPE, RECORDS), RECORDS, Request.remove(["1"]), rng=generator(0)).trained
    answer = Certified()(tuned, RECORDS, Request.remove(["2"]), rng=generator(0))
    assert (answer.claim, answer.trained.standing) == (Claim.CERTIFIED, Claim.NONE)


def test_each_pass_reads_in_an_order_of_its_own() -> None:
    task = Task(
        trained=train(RECIPE, RECORDS), forget=RECORDS.take(["1"]), retain=RECORDS.without(["1"]), tally=Tally()
    )
    read = [p.tolist() for _, _, p in Steps(task, FineTune()).batches(task.retain, generator(0), "retain", 2)]
    half = len(read) // 2
    first, second = list(chain(*read[:half])), list(chain(*read[half:]))
    assert sorted(first) == sorted(second) == list(range(119))
    assert first != second
