"""The chapter `certify`: people leave one after the other, and each release says what it tells of them."""

from __future__ import annotations

import time

from expunge import datasets
from expunge.audit import accuracy
from expunge.certify import DERIVATIONS, Budget, NewtonHead, explain, pair_leak, recheck, settings_of
from expunge.core.claim import Claim, Guarantee
from expunge.core.coins import child, generator, order
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import State, Trained
from expunge.demo.story import Story, counted
from expunge.learn.training import train
from expunge.report import Chapter, Grid


def tell_certify(story: Story) -> Chapter:
    """A softmax head on census data; the budget is agreed on before the first request."""
    story.step("certify removals from Adult")
    data = datasets.adult()
    people, test = data.train, data.test
    recipe = Recipe(model="softmax", epochs=2, batch_size=256, weight_decay=1e-3, seed=story.settings.seed)
    method = NewtonHead(sigma=0.02, budget=Budget(epsilon=1.0, delta=1e-5, requests=100))
    trained = train(recipe, people)
    started = time.perf_counter()
    now = method.begin(trained, people)
    first_s = time.perf_counter() - started
    rows = [("0 (the first model)", "", "", _percent(now, test), "", f"{first_s:.2f}")]
    sound, told = True, []
    chosen = order(people.keys, story.settings.seed, "who leaves")[: story.settings.askers]
    for number, person in enumerate((people.ids[i] for i in chosen), 1):
        answer = method(now, people, Request.remove([person]), rng=child(generator(story.settings.seed), person))
        guarantee = answer.guarantee
        if guarantee is None or guarantee.transcript is None or answer.claim is not Claim.CERTIFIED:
            raise AssertionError("a certified method must hand back a guarantee with a transcript")
        sound &= not recheck(
            guarantee, DERIVATIONS, settings_of(method, answer.trained.recipe), releases=answer.trained.releases
        )
        leak = pair_leak(
            _head(now.secret), _head(answer.trained.secret), sigma_old=method.sigma, sigma_new=method.sigma
        )
        now = answer.trained
        spent = guarantee.transcript
        cells = (f"{guarantee.epsilon:.3f}", f"{spent.epsilon:.3f} of {spent.budget_epsilon:g}", _percent(now, test))
        rows.append((str(number), *cells, f"{leak.mu:.2f}", f"{answer.cost.seconds:.2f}"))
        told.append(guarantee.to_json())
    return Chapter(
        name="certify",
        headline=f"{counted(len(told), 'removal')} from {len(people):,} people certified: epsilon "
        f"{told[-1]['epsilon']:.3f} each, {told[-1]['transcript']['epsilon']:.3f} together, delta 1e-5",
        text=(
            "Census data of Adult, softmax regression. Before the first request it was agreed that 100 releases may "
            "tell at most epsilon 1 together. Each removal goes back to the minimum, to within a proved distance, and "
            "adds noise of standard deviation 0.02. Of the last one:",
            explain(Guarantee.from_json(told[-1])).split("\n\n")[0].partition("\n")[2].replace("\n", " "),
        ),
        grids=(
            Grid(
                caption="Releases",
                headers=("release", "epsilon alone", "epsilon so far", "test (%)", "pair leak mu", "seconds"),
                rows=tuple(rows),
                notes="pair leak: what old and new release together tell of who left; for the officer alone.",
                words=1,
            ),
        ),
        shows="What each release tells of those who left, relative to retraining with equal noise, and that it costs "
        "little accuracy.",
        does_not_show="Anything about a network's deeper layers, or that comparing two releases tells nothing.",
        check="expunge certify plan --data adult --model softmax --epsilon 1 --delta 1e-5 --requests 100",
        data={"guarantees": told, "sound": sound},
    )


def _percent(model: Trained, test: Records | None) -> str:
    return "not measured" if test is None else f"{accuracy(model, test):.1%}"


def _head(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(".")}
