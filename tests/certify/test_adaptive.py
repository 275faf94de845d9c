"""A requester who reads every release before choosing the next row: what a whole transcript tells, and no more.

Two providers serve the same requester, who need not ask the same of both: one whose models lie within the cap of the
exact ones, one that trains anew each time; both add noise of the same size. The requester knows all rows and both
providers' ways, and only not which it has before it. Its best statistic is the sum, over the releases, of the logarithm
of the likelihood ratio given what went before.

Here are a thousand transcripts of each and more, of binary logistic regression on five numbers a row, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from expunge import generator
from expunge.certify import gaussian
from expunge.certify.accountant import Budget, charge
from expunge.certify.falsify import lower_bound, lower_bound_mu
from expunge.certify.head import NewtonHead
from expunge.core.claim import Guarantee, Spent
from expunge.core.events import GaussianNoise
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import State, Trained
from expunge.learn.training import train

ROWS, RELEASES, TRANSCRIPTS = 24, 8, 1000
BUDGET = Budget(epsilon=3.0, delta=0.01, requests=RELEASES)
SIGMA, DECAY = 0.3, 0.05
CAP = BUDGET.cap(SIGMA)
RECIPE = Recipe(model="softmax", epochs=1, batch_size=ROWS, weight_decay=DECAY, dtype="float64")


@cache
def rows() -> tuple[Tensor, Tensor]:
    """Zeros and ones: the means of their quarters, with a 1 for the bias; and a sign for each."""
    source = load_digits()
    binary = source.target < 2
    quarters = source.images[binary].reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, 4)[:ROWS] / 16
    x = torch.cat([torch.as_tensor(quarters), torch.ones(ROWS, 1, dtype=torch.float64)], dim=1)
    return x, torch.as_tensor(2.0 * source.target[binary][:ROWS] - 1)


# Many problems at once: `keep` (transcripts, rows) is 1 for the rows that are left.


def slope(w: Tensor, keep: Tensor) -> Tensor:
    """Gradients of the mean losses and the penalty."""
    x, sign = rows()
    pull = -torch.sigmoid(-(w @ x.T) * sign) * sign * keep
    return pull @ x / keep.sum(1, keepdim=True) + DECAY * w


def curve(w: Tensor, keep: Tensor) -> Tensor:
    """Their Hessians."""
    x, _ = rows()
    p = torch.sigmoid(w @ x.T)
    second = torch.einsum("bn,ni,nj->bij", p * (1 - p) * keep, x, x) / keep.sum(1)[:, None, None]
    return second + DECAY * torch.eye(5, dtype=torch.float64)


def newton(w: Tensor, keep: Tensor, old: Tensor | None = None) -> Tensor:
    """A step, by the Hessian here or an old one."""
    return w - torch.linalg.solve(curve(w, keep) if old is None else old, slope(w, keep))


def exact(keep: Tensor, start: Tensor) -> Tensor:
    w = start
    for _ in range(8):
        w = newton(w, keep)
    assert float(slope(w, keep).norm(dim=1).max()) < 1e-10
    return w


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What somebody knows who has read the transcripts so far.

    Attributes:
        keep: the rows left, of each.
        goal: the exact models of these rows.
        before: the un-noised models of the release before.
        noised: the last release.
        number: of the release to come, from 0.
    """

    keep: Tensor
    goal: Tensor
    before: Tensor
    noised: Tensor
    number: int


Requester = Callable[[Seen], Tensor]
Provider = Callable[[Seen], Tensor]


# Requesters: a score for each row; the one with the highest goes.


def of_largest_loss(seen: Seen) -> Tensor:
    """What the noised model answers worst."""
    x, sign = rows()
    return -(seen.noised @ x.T) * sign


def along_the_noise(seen: Seen) -> Tensor:
    """The row whose removal pushes the model farthest to where the noise of the last release already lay."""
    x, sign = rows()
    noise = seen.noised - seen.goal
    push = torch.einsum("bij,bj->bi", torch.linalg.inv(curve(seen.goal, seen.keep)), noise) @ x.T
    return -push * sign * torch.sigmoid(-(seen.goal @ x.T) * sign)


def by_the_sign_of_the_noise(seen: Seen) -> Tensor:
    """One class or the other, as a coin in the last release fell: later requests are a message from it."""
    _, sign = rows()
    coin = torch.sign(seen.noised[:, :1] - seen.goal[:, :1])
    return coin * sign + torch.linspace(0, 0.1, ROWS, dtype=torch.float64)


REQUESTERS = {one.__name__: one for one in (of_largest_loss, along_the_noise, by_the_sign_of_the_noise)}


# Providers: the un-noised model of a release.


def chords(seen: Seen) -> Tensor:
    """As near as `NewtonHead` asks: steps by an old Hessian until the gradient says that the cap is kept."""
    everything = torch.ones_like(seen.keep)
    old = curve(exact(everything, torch.zeros_like(seen.before)), everything)
    w = seen.before
    for _ in range(200):
        far = slope(w, seen.keep).norm(dim=1, keepdim=True) / DECAY > CAP
        if not bool(far.any()):
            return w
        w = torch.where(far, newton(w, seen.keep, old), w)
    raise AssertionError("the chord steps do not end")


def off_by(length: float) -> Provider:
    """Always so far off, in the direction of the mean row: what a requester likes best, as it knows where to look."""

    def provider(seen: Seen) -> Tensor:
        way = rows()[0].mean(0)
        return seen.goal + length * way / way.norm()

    return provider


def away_from_the_release(seen: Seen) -> Tensor:
    """Off by the cap, in a direction that the noise of the last release decides."""
    way = seen.noised - seen.goal
    return seen.goal + CAP * way / way.norm(dim=1, keepdim=True)


def drifting(seen: Seen) -> Tensor:
    """A cap on each request's own error, and none on what they come to: the liar of sequences."""
    return off_by(CAP * (seen.number + 1))(seen)


PROVIDERS = {"chords": chords, "at the cap": off_by(CAP), "away from the release": away_from_the_release}


def transcripts(
    requester: Requester, provider: Provider, *, honest: bool, count: int, sigma: float = SIGMA, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The requester's statistic of each transcript, and how far at most the provider was off.

    Args:
        requester: chooses each row but the first.
        provider: whom it suspects.
        honest: whether it has the exact models before it instead.
        count: transcripts.
        sigma: of the noise of both.
        seed: of the noise.
    """
    coins = torch.Generator().manual_seed(2 * seed + honest)
    keep = torch.ones(count, ROWS, dtype=torch.float64)
    keep[:, 0] = 0
    zero = torch.zeros(count, 5, dtype=torch.float64)
    before = exact(torch.ones_like(keep), zero)
    seen = Seen(keep=keep, goal=exact(keep, zero), before=before, noised=before, number=0)
    total, most = torch.zeros(count, dtype=torch.float64), zero[:, 0]
    for number in range(RELEASES):
        offered = provider(seen)
        off = offered - seen.goal
        noised = (seen.goal if honest else offered) + sigma * torch.randn(
            zero.shape, generator=coins, dtype=torch.float64
        )
        total = total + ((noised - seen.goal) * off).sum(1) - off.square().sum(1) / 2
        most = torch.maximum(most, off.norm(dim=1))
        seen = replace(seen, before=offered, noised=noised)
        chosen = requester(seen).masked_fill(seen.keep == 0, -math.inf).argmax(1)
        keep = seen.keep.scatter(1, chosen[:, None], 0.0)
        seen = replace(seen, keep=keep, goal=exact(keep, seen.goal), number=number + 1)
    return total / sigma**2, most


def spent(releases: int = RELEASES) -> Spent:
    """What the accountant charges for so many releases at the cap."""
    release = GaussianNoise(parameters=("w",), sensitivity=CAP, sigma=SIGMA)
    return charge([release] * (releases - 1), release, BUDGET)


def refuted(spent: Spent, requester: Requester, provider: Provider, count: int = TRANSCRIPTS, **given: float) -> bool:
    """Whether the transcripts tell more than what is said to be spent."""
    epsilon, mu = found(requester, provider, count, **given)
    assert spent.mu is not None
    return epsilon > spent.epsilon or mu > spent.mu


def found(requester: Requester, provider: Provider, count: int, **given: float) -> tuple[float, float]:
    """Lower bounds of the transcript's epsilon and mu, together at confidence .95."""
    ones, others = (
        transcripts(requester, provider, honest=honest, count=count, **given)[0].numpy() for honest in (False, True)
    )
    return lower_bound(ones, others, BUDGET.delta, 0.975).low, lower_bound_mu(ones, others, 0.975).low


CHOICES = pytest.mark.parametrize("choice", list(REQUESTERS))


@CHOICES
@pytest.mark.parametrize("way", list(PROVIDERS))
def test_a_thousand_adaptive_transcripts_do_not_tell_more_than_is_charged(choice: str, way: str) -> None:
    provider, requester = PROVIDERS[way], REQUESTERS[choice]
    off = transcripts(requester, provider, honest=False, count=50)[1]
    assert float(off.max()) <= CAP * (1 + 1e-9)
    assert not refuted(spent(), requester, provider)


@CHOICES
def test_at_the_cap_the_attack_finds_most_of_what_is_charged(choice: str) -> None:
    """Else the test above could not fail: four fifths of mu = sqrt(releases) cap / sigma, which composition says."""
    mu = math.sqrt(RELEASES) * CAP / SIGMA
    assert spent().mu == pytest.approx(mu)
    assert spent().epsilon == pytest.approx(gaussian.epsilon_of(mu, BUDGET.delta))
    for provider in (off_by(CAP), away_from_the_release):
        epsilon, found_mu = found(REQUESTERS[choice], provider, 10_000)
        assert 0.8 * mu < found_mu <= mu
        assert 0.5 * spent().epsilon < epsilon <= spent().epsilon


@CHOICES
def test_requests_really_depend_on_the_releases(choice: str) -> None:
    """Of fifty transcripts with fresh noise few ask for the same rows in the same order."""
    asked: list[Tensor] = []

    def noting(seen: Seen) -> Tensor:
        scores = REQUESTERS[choice](seen).masked_fill(seen.keep == 0, -math.inf)
        asked.append(scores.argmax(1))
        return scores

    transcripts(noting, off_by(CAP), honest=False, count=50)
    assert len({tuple(one) for one in torch.stack(asked, 1).tolist()}) > 10


@CHOICES
def test_an_accountant_that_quotes_one_release_for_all_of_them_is_refuted(choice: str) -> None:
    assert refuted(spent(1), REQUESTERS[choice], off_by(CAP))
    assert refuted(spent(1), REQUESTERS[choice], away_from_the_release)


@pytest.mark.parametrize(
    ("provider", "sigma"),
    [(off_by(CAP), SIGMA / 2), (off_by(2 * CAP), SIGMA), (drifting, SIGMA)],
    ids=["half of the noise", "twice the cap", "errors that add up"],
)
def test_a_provider_that_does_not_keep_to_the_cap_or_the_noise_is_refuted(provider: Provider, sigma: float) -> None:
    assert refuted(spent(), along_the_noise, provider, sigma=sigma)


@CHOICES
@pytest.mark.parametrize("way", list(PROVIDERS))
@pytest.mark.soak
def test_twenty_thousand_adaptive_transcripts_do_not_tell_more_than_is_charged(choice: str, way: str) -> None:
    assert not refuted(spent(), REQUESTERS[choice], PROVIDERS[way], count=20_000, seed=1)


# The method itself


@cache
def records() -> Records:
    x, sign = rows()
    return Records(x[:, :-1], (sign > 0).long(), [f"row-{i}" for i in range(ROWS)], classes=2)


@cache
def start() -> Trained:
    return train(RECIPE, records())


METHOD = NewtonHead(sigma=SIGMA, budget=BUDGET)


def vector(state: State) -> Tensor:
    return torch.cat([state["head.weight"].double(), state["head.bias"].double()[:, None]], dim=1)


def minimiser(kept: Records) -> Tensor:
    """Two rows of weights that are opposite: half of the binary model's with half of the decay."""
    x = torch.cat([kept.x, torch.ones(len(kept), 1, dtype=torch.float64)], dim=1)
    hot = torch.nn.functional.one_hot(kept.y, 2)
    w = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(10):
        p = (x @ w.T).softmax(1)
        gradient = (p - hot).T @ x / len(x) + DECAY * w
        second = (x * (p[:, :1] * p[:, 1:])).T @ x / len(x)
        whole = torch.cat([torch.cat([second, -second], 1), torch.cat([-second, second], 1)])
        step = torch.linalg.solve(whole + DECAY * torch.eye(10, dtype=torch.float64), gradient.flatten())
        w = w - step.view(2, 5)
    assert float(gradient.norm()) < 1e-12
    return w


def worst_answered(w: Tensor, left: frozenset[str]) -> str:
    """The row that these weights answer worst."""
    kept = records().take(sorted(left))
    x = torch.cat([kept.x, torch.ones(len(kept), 1, dtype=torch.float64)], dim=1)
    return kept.ids[int(torch.nn.functional.cross_entropy(x @ w.T, kept.y, reduction="none").argmax())]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Eight adaptive requests to the method, or to a provider that trains anew and adds the same noise.

    Attributes:
        asked: the rows, in order.
        noise: of each release, in units of sigma.
        off: of each release, the method's un-noised model less the exact one.
        statistic: the sum of the log-likelihood ratios.
        guarantee: of the method's last answer.
    """

    asked: tuple[str, ...]
    noise: Tensor
    off: Tensor
    statistic: float
    guarantee: Guarantee


def converse(*, honest: bool) -> Conversation:
    """The honest provider's releases are the exact models with the method's noise; the method works along, unseen."""
    now = METHOD.begin(start(), records())
    shown, asked, noises, offs, statistic = vector(now.module.state_dict()), [], [], [], 0.0
    for _ in range(RELEASES):
        asked.append(worst_answered(shown, now.ids))
        answer = METHOD(now, records(), Request.remove([asked[-1]]), rng=generator(0))
        now = answer.trained
        goal, secret = minimiser(records().without(asked)), vector(now.secret)
        noise, off = vector(now.module.state_dict()) - secret, secret - goal
        shown = (goal if honest else secret) + noise
        statistic += float(((shown - goal) * off).sum() - off.square().sum() / 2) / SIGMA**2
        noises.append(noise / SIGMA)
        offs.append(off)
    assert answer.guarantee is not None
    return Conversation(
        asked=tuple(asked),
        noise=torch.stack(noises).flatten(1),
        off=torch.stack(offs).flatten(1),
        statistic=statistic,
        guarantee=answer.guarantee,
    )


def test_adaptive_requests_to_the_method_itself_stay_within_the_cap_and_the_charge() -> None:
    found = [converse(honest=False) for _ in range(10)]
    for one in found:
        assert one.guarantee.transcript == spent(), "what is charged is what the transcripts above were held against"
        assert float(one.off.norm(dim=1).max()) <= CAP
    assert len({one.asked for one in found}) > 1, "what is asked for depends on the noise"
    noise = torch.cat([one.noise for one in found])
    assert float(noise.std()) == pytest.approx(1, abs=6 / math.sqrt(2 * noise.numel()))
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.999, "and never the same noise twice"


@pytest.mark.soak
def test_a_thousand_conversations_with_the_method_itself_do_not_tell_more_than_is_charged() -> None:
    ones, others = ([converse(honest=honest) for _ in range(TRANSCRIPTS)] for honest in (False, True))
    transcript = ones[0].guarantee.transcript
    assert transcript is not None
    assert transcript.mu is not None
    scores = [[one.statistic for one in world] for world in (ones, others)]
    assert lower_bound(*scores, BUDGET.delta, 1 - 1e-5).low <= transcript.epsilon
    assert lower_bound_mu(*scores, 1 - 1e-5).low <= transcript.mu
