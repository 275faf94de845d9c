"""Claims, guarantees and results: what may be said, and that nothing more can be."""

import json
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from expunge import Claim, Constant, Cost, Guarantee, Misuse, Recipe, Trained, Unlearned
from expunge.core.claim import Spent
from expunge.core.events import Removed

PROVED = Guarantee(
    epsilon=1.0,
    delta=1e-5,
    mu=0.25,
    sigma=0.1,
    sensitivity=0.025,
    mechanism="gaussian",
    reference="retraining with the same noise",
    parameters=("head.weight",),
    releases="current",
    constants={"smoothness": Constant(1.0, "proved", "a formula")},
)
TRAINED = Trained(module=nn.Linear(1, 1), recipe=Recipe(model="softmax"), ids=frozenset({"a"}))


def _with(*sources: str) -> Guarantee:
    return replace(PROVED, constants={f"c{i}": Constant(1.0, source, "a formula") for i, source in enumerate(sources)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sources", "basis"),
    [
        (("proved",), "proved"),
        (("proved", "proved"), "proved"),
        (("proved", "supplied"), "conditional"),
        (("proved", "estimated"), "none"),
        (("supplied", "estimated"), "none"),
        ((), "none"),
    ],
)
def test_basis_follows_from_the_weakest_constant(sources: tuple[str, ...], basis: str) -> None:
    assert _with(*sources).basis == basis
    assert _with(*sources).to_json()["basis"] == basis


@pytest.mark.parametrize(
    "wrong",
    [{"constants": {"radius": Constant(1.0, "proved")}}, {"sigma": 0.0}, {"epsilon": float("inf")}],
    ids=["proved-by-nothing", "no-noise", "infinite-epsilon"],
)
def test_what_has_no_noise_or_no_formula_proves_nothing(wrong: dict[str, Any]) -> None:
    assert replace(PROVED, **wrong).basis == "none"


def test_a_guarantee_reads_back_and_its_basis_is_computed_anew() -> None:
    spent = Spent(epsilon=1.0, delta=1e-5, mu=0.25, releases=3, budget_epsilon=2.0, budget_releases=9)
    whole = replace(PROVED, transcript=spent, outside=("body.weight",), remarks=("One.",))
    data = json.loads(json.dumps(whole.to_json()))
    assert Guarantee.from_json({**data, "basis": "none"}) == whole


def test_basis_cannot_be_set() -> None:
    with pytest.raises((AttributeError, TypeError)):
        PROVED.basis = "proved"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Guarantee(**{**PROVED.to_json(), "constants": {}})


@pytest.mark.parametrize("wrong", [{"epsilon": -1.0}, {"delta": 1.0}, {"delta": -1e-9}, {"sigma": -0.1}])
def test_guarantees_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Misuse, match="need epsilon >= 0"):
        replace(PROVED, **wrong)


@pytest.mark.parametrize(
    ("claim", "exactness", "guarantee"),
    [
        (Claim.CERTIFIED, None, None),
        (Claim.CERTIFIED, None, _with("estimated")),
        (Claim.NONE, None, PROVED),
        (Claim.EXACT, "pathwise", PROVED),
        (Claim.EXACT, None, None),
        (Claim.NONE, "pathwise", None),
    ],
)
def test_no_result_says_more_than_it_has(claim: Claim, exactness: str | None, guarantee: Guarantee | None) -> None:
    with pytest.raises(Misuse):
        Unlearned(trained=TRAINED, claim=claim, exactness=exactness, guarantee=guarantee, cost=Cost(seconds=1.0))  # type: ignore[arg-type]


def test_results_print_what_they_do_not_cover() -> None:
    exact = Unlearned(trained=TRAINED, claim=Claim.EXACT, exactness="in law", guarantee=None, cost=Cost(seconds=0.31))
    assert str(exact).startswith("exact (in law) · 0.31 s")
    assert "requests chosen after seeing the model" in str(exact)
    none = replace(exact, claim=Claim.NONE, exactness=None)
    assert "nothing is proved" in str(none)


def test_the_weaker_claim() -> None:
    assert Claim.weaker(Claim.EXACT, Claim.NONE) is Claim.weaker(Claim.NONE, Claim.EXACT) is Claim.NONE
    assert Claim.weaker(Claim.CERTIFIED, Claim.EXACT) is Claim.CERTIFIED


def test_events_hold_counts_only() -> None:
    event = Removed(method="sisa", claim="exact", rows=3)
    assert event.to_json() == {"event": "Removed", "method": "sisa", "claim": "exact", "rows": 3}
