"""Accountants: what releases of noise tell all together. They read events and never change them.

All of them hold for requests chosen with knowledge of the releases before, as every release's bound holds whatever was
seen earlier (see `gaussian.compose`). Not proved: kinds of release, or their settings, that are themselves chosen after
seeing earlier releases, except Gaussian ones alone; methods fix both before the first request.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
from scipy import stats

from expunge.certify import gaussian
from expunge.certify.clipping import clipped_steps_mu, model_clipping_epsilon
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import ClippedModels, ClippedSteps, GaussianNoise, PrivateSteps, Release

_WIDE = (1.0 + np.geomspace(0.02, 1e6, 1200)).tolist()
_NARROW = [*(1 + i / 10 for i in range(1, 100)), *range(11, 65), *range(68, 513, 4)]
_PARTS = 50_000  # of a privacy loss distribution: more are slow, fewer are looser, and never too small


class Accountant(Protocol):
    """Says what a sequence of releases tells about the rows removed."""

    name: ClassVar[str]

    def supports(self, release: Release) -> Unsupported | None:
        """None if it can account for this release, else the error that says why not and what to use."""

    def epsilon(self, releases: Sequence[Release], delta: float) -> float:
        """An epsilon that all of them together have at this delta; raises what `supports` answers."""


def mu_of_release(release: Release) -> float | None:
    """The Gaussian differential privacy parameter of one release, or None if its kind has none."""
    if isinstance(release, GaussianNoise):
        return release.sensitivity / release.sigma if release.sigma > 0 else math.inf
    if isinstance(release, ClippedSteps):
        return clipped_steps_mu(
            release.start, release.gradient, release.lr, release.weight_decay, release.steps, release.sigma
        )
    return None


@dataclass(frozen=True)
class GaussianAccountant:
    """Exact for Gaussian noise added once, and for noisy clipped steps: the root of the sum of squared mus."""

    name: ClassVar[str] = "gaussian"

    def supports(self, release: Release) -> Unsupported | None:
        """Releases that have a mu."""
        if mu_of_release(release) is None:
            return Unsupported(f"{_kind(release)} has no mu: use SharedAccountant")
        return None

    def mu(self, releases: Sequence[Release]) -> float:
        """Of all of them together; raises Unsupported if one has none."""
        _refuse(self, releases)
        return gaussian.compose(mu for mu in map(mu_of_release, releases) if mu is not None)

    def epsilon(self, releases: Sequence[Release], delta: float) -> float:
        """The smallest at this delta."""
        return gaussian.epsilon_of(self.mu(releases), delta)


@dataclass(frozen=True)
class RenyiAccountant:
    """By Renyi divergence (Mironov, 2017), by way of dp_accounting: never smaller than the exact figure; to compare.

    At order alpha a release of `mu` has divergence ``alpha mu^2 / 2``: the factor alpha belongs into the conversion.
    """

    name: ClassVar[str] = "renyi"

    def supports(self, release: Release) -> Unsupported | None:
        """Releases that have a mu, and DP-SGD of single rows."""
        if isinstance(release, PrivateSteps) and release.group > 1:
            return Unsupported(
                f"Renyi divergence is for single rows, got groups of {release.group}: use LossAccountant"
            )
        if mu_of_release(release) is None and not isinstance(release, PrivateSteps):
            return Unsupported(f"{_kind(release)} has no Renyi divergence that is known here: use SharedAccountant")
        return None

    def epsilon(self, releases: Sequence[Release], delta: float) -> float:
        """The smallest over a grid of orders; raises Unsupported without dp_accounting."""
        _refuse(self, releases)
        dp, rdp = _dp_accounting(), _dp_accounting(".rdp")
        private = [one for one in releases if isinstance(one, PrivateSteps)]
        orders = _NARROW if private else _WIDE
        mu = GaussianAccountant().mu([one for one in releases if not isinstance(one, PrivateSteps)])
        if math.isinf(mu):
            return math.inf
        accountant = rdp.RdpAccountant(orders)
        if mu > 0:
            accountant.compose(dp.GaussianDpEvent(1 / mu))
        for one in private:
            _check(one)
            step = dp.PoissonSampledDpEvent(one.rate, dp.GaussianDpEvent(one.noise))
            accountant.compose(dp.SelfComposedDpEvent(step, one.steps))
        return float(accountant.get_epsilon(delta))


@dataclass(frozen=True)
class LossAccountant:
    """By the distribution of the privacy loss, by way of dp_accounting: rounded up, and close to exact.

    A group of rows under DP-SGD counts as one: k of its m rows are in a Poisson batch with chance Bin(m, rate), and
    then shift the sum by k clipping norms at most: a mixture of Gaussians (Choquette-Choo et al., 2023, Cor. 4.7;
    Ganesh, 2024). That is never worse, and mostly much better, than what follows from one row's epsilon, which is NOT
    m epsilon at the same delta but at ``delta (e^(m epsilon) - 1) / (e^epsilon - 1)``: see `group_epsilon`.
    """

    name: ClassVar[str] = "loss"

    def supports(self, release: Release) -> Unsupported | None:
        """Releases that have a mu, and DP-SGD of single rows or groups."""
        if mu_of_release(release) is None and not isinstance(release, PrivateSteps):
            return Unsupported(f"{_kind(release)} has no loss distribution that is known here: use SharedAccountant")
        return None

    def epsilon(self, releases: Sequence[Release], delta: float) -> float:
        """At this delta, which must be well above 1e-15; raises Unsupported without dp_accounting.

        Cost: seconds for DP-SGD with little noise or large groups.
        """
        _refuse(self, releases)
        _dp_accounting(".pld.privacy_loss_distribution")
        mu = GaussianAccountant().mu([one for one in releases if not isinstance(one, PrivateSteps)])
        if math.isinf(mu):
            return math.inf
        private = sorted((_key(one) for one in releases if isinstance(one, PrivateSteps)), key=repr)
        return _loss_epsilon(mu, tuple(private), delta)


@dataclass(frozen=True)
class SharedAccountant:
    """For releases of every kind: those with a mu together and exactly, each other one for itself, and all added up.

    Each release without a mu gets ``delta / requests``, those with one share what is left; epsilons and deltas add
    (basic composition; Dwork and Roth, 2014, Th. 3.16, and adaptively as there). Where all have a mu it is exact. Grows
    with every release.

    Attributes:
        requests: how many releases there may be; more than so many are a Misuse.
    """

    name: ClassVar[str] = "shared"
    requests: int

    def supports(self, release: Release) -> Unsupported | None:
        """Every kind there is; DP-SGD needs dp_accounting when it comes to the figure."""
        known = mu_of_release(release) is not None or isinstance(release, ClippedModels | PrivateSteps)
        return None if known else Unsupported(f"{_kind(release)} is of a kind that nobody has told how to account for")

    def epsilon(self, releases: Sequence[Release], delta: float) -> float:
        """At this delta; raises Unsupported if DP-SGD is among them and dp_accounting is not installed."""
        _refuse(self, releases)
        others = [release for release in releases if mu_of_release(release) is None]
        if len(releases) > self.requests:
            raise Misuse(f"delta is shared by {self.requests} releases, got {len(releases)}")
        whole = [release for release in releases if mu_of_release(release) is not None]
        left = delta * (self.requests - len(others)) / self.requests
        apart = [_alone(release, delta / self.requests) for release in others]
        return GaussianAccountant().epsilon(whole, left) + math.fsum(apart)


def group_epsilon(release: PrivateSteps, delta: float) -> float:
    """What follows for the release's group from one row's guarantee alone, whatever the mechanism.

    (epsilon, delta) for one row is ``(m epsilon, delta (e^(m epsilon) - 1) / (e^epsilon - 1))`` for m (Vadhan, 2017,
    Lemma 2.2); the smallest such epsilon over the row's whole profile. To compare with `LossAccountant`.

    Raises:
        Unsupported: without dp_accounting.
    """
    m = release.group
    loss = _composed(0.0, (_key(release, group=1),))

    def excess(epsilon: float) -> float:
        factor = m if epsilon == 0 else math.expm1(m * epsilon) / math.expm1(epsilon)
        return float(loss.get_delta_for_epsilon(epsilon)) * factor - delta

    low, high = 0.0, min(1.0, 700 / m)
    while excess(high) > 0:
        low, high = high, high * 2
        if m * high > 700:
            return math.inf
    for _ in range(60):  # by halves: at the foot the profile is flat to rounding, which a secant does not survive
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return m * high


def _alone(release: Release, delta: float) -> float:
    if isinstance(release, ClippedModels):
        return model_clipping_epsilon(release.radius, release.sigma, release.steps, delta)
    return LossAccountant().epsilon([release], delta)


def _refuse(accountant: Accountant, releases: Sequence[Release]) -> None:
    for release in releases:
        error = accountant.supports(release)
        if error is not None:
            raise error


def _kind(release: Release) -> str:
    return type(release).__name__


def _dp_accounting(part: str = "") -> Any:
    try:
        return importlib.import_module(f"dp_accounting{part}")
    except ImportError as error:
        raise Unsupported("this figure needs dp_accounting: pip install expunge[private]") from error


def _check(release: PrivateSteps) -> None:
    if not (0 <= release.rate <= 1 and release.noise > 0 and release.steps >= 1 and release.group >= 1):
        raise Misuse(f"need 0 <= rate <= 1, noise > 0, and steps and group >= 1, got {release}")


_Key = tuple[float, float, int, int]


def _key(release: PrivateSteps, group: int | None = None) -> _Key:
    _check(release)
    return release.rate, release.noise, release.steps, release.group if group is None else group


@lru_cache(maxsize=256)
def _loss_epsilon(mu: float, private: tuple[_Key, ...], delta: float) -> float:
    if mu == 0 and not private:
        return 0.0
    return float(_composed(mu, private).get_epsilon_for_delta(delta))


@lru_cache(maxsize=4)
def _composed(mu: float, private: tuple[_Key, ...]) -> Any:
    """The loss distribution of a Gaussian pair and runs of DP-SGD; the grid must be one for all of them."""
    pld = _dp_accounting(".pld.privacy_loss_distribution")
    mixtures = [_mixture(rate, group) for rate, _, _, group in private]
    reach = max([mu, *((len(mixture) - 1) / one[1] for mixture, one in zip(mixtures, private, strict=True))])
    steps = sum(steps for _, _, steps, _ in private) + (mu > 0)
    # The rounding adds up to about steps times the square of the grid's width.
    width = max(1e-2 / math.sqrt(steps), (reach**2 + 20 * reach) / _PARTS)
    parts = [] if mu == 0 else [pld.from_gaussian_mechanism(1 / mu, value_discretization_interval=width)]
    for mixture, (_, noise, count, _) in zip(mixtures, private, strict=True):
        shifts = [float(k) for k in range(len(mixture))]
        step = pld.from_mixture_gaussian_mechanism(noise, shifts, mixture, value_discretization_interval=width)
        parts.append(step.self_compose(count))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return whole


def _mixture(rate: float, group: int) -> list[float]:
    """Chances of 0, 1, ... rows of the group in a batch, as far as any that is not below 10^-25 all together.

    dp_accounting neglects as much: what it cuts off has the chance e^-50.
    """
    rows = np.arange(1, group + 1)
    most = int(rows[stats.binom.sf(rows, group, rate) < 1e-25][0])
    chances = stats.binom.pmf(np.arange(most + 1), group, rate)
    return [float(chance) for chance in chances / chances.sum()]
