"""What a pair of releases tells is what the best attack measures, and the reading is for the officer."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from expunge.certify import gaussian
from expunge.certify.leak import PairLeak, attack_pair, pair_leak
from expunge.core.coins import child
from expunge.core.errors import Misuse

RIVALS = ("never there", "still there", "unknown model")


def pair(distance=0.6):
    rng = torch.Generator().manual_seed(0)
    old = {"a.weight": torch.randn(7, 5, generator=rng), "a.bias": torch.randn(7, generator=rng)}
    change = torch.randn(42, generator=rng, dtype=torch.float64)
    change *= distance / change.norm()
    new = {
        "a.weight": old["a.weight"].double() + change[:35].view(7, 5),
        "a.bias": old["a.bias"].double() + change[35:],
    }
    return old, new


def test_the_meter_reads_distance_over_the_noise_that_tells():
    leak = pair_leak(*pair(), sigma_old=0.3, sigma_new=0.4)
    assert leak.distance == pytest.approx(0.6, rel=1e-6)
    assert leak.mu_against("never there") == pytest.approx(2.0, rel=1e-6)
    assert leak.mu_against("still there") == pytest.approx(1.5, rel=1e-6)
    assert leak.mu_against("unknown model") == pytest.approx(1.2, rel=1e-6)
    assert leak.mu == pytest.approx(2.0, rel=1e-6)
    assert leak.epsilon(1e-5) == pytest.approx(gaussian.epsilon_of(2.0, 1e-5), rel=1e-6)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("sigmas", [(0.5, 0.5), (0.3, 0.9), (0.9, 0.3)])
def test_the_best_attack_measures_what_the_meter_reads(rival, sigmas):
    old, new = pair()
    leak = pair_leak(old, new, sigma_old=sigmas[0], sigma_new=sigmas[1])
    rng = child(torch.Generator().manual_seed(1), rival, sigmas[0])
    measured = attack_pair(old, new, sigma_old=sigmas[0], sigma_new=sigmas[1], rival=rival, trials=4000, rng=rng)
    centre = (measured.low + measured.high) / 2
    assert abs(leak.auc(rival) - centre) < 1.5 * (measured.high - centre)
    assert measured.high - measured.low < 0.03
    for other in (0.8, 1.25):  # a meter that is off by so much would not pass
        wrong = PairLeak(distance=leak.distance * other, sigma_old=sigmas[0], sigma_new=sigmas[1])
        assert abs(wrong.auc(rival) - centre) > 1.5 * (measured.high - centre)


def test_the_noise_of_the_other_release_alone_is_the_wrong_parameter():
    old, new = pair()
    measured = attack_pair(
        old, new, sigma_old=0.3, sigma_new=1.2, rival="never there", trials=2000, rng=torch.Generator().manual_seed(2)
    )
    assert not measured.low <= PairLeak(distance=0.6, sigma_old=1.2, sigma_new=1.2).auc("never there") <= measured.high
    assert measured.low <= PairLeak(distance=0.6, sigma_old=0.3, sigma_new=1.2).auc("never there") <= measured.high


def test_tpr_and_auc_are_those_of_two_gaussians():
    leak = PairLeak(distance=1.3, sigma_old=1.0, sigma_new=2.0)
    rng = np.random.default_rng(0)
    one, other = rng.normal(1.3, 1, 400_000), rng.normal(0, 1, 400_000)
    assert (one > other).mean() == pytest.approx(leak.auc("never there"), abs=4e-3)
    for fpr in (0.001, 0.01, 0.1):
        assert (one > stats.norm.isf(fpr)).mean() == pytest.approx(leak.tpr(fpr, "never there"), abs=4e-3)


def test_an_old_release_without_noise_hides_nothing():
    leak = pair_leak(*pair(), sigma_old=0.0, sigma_new=0.4)
    assert leak.mu == math.inf
    assert leak.auc("never there") == 1.0
    assert leak.tpr(0.01, "never there") == 1.0
    assert leak.epsilon(1e-5) == math.inf
    assert leak.mu_against("unknown model") == leak.mu_against("still there") == pytest.approx(1.5, rel=1e-6)
    assert "mu inf" in str(leak)


def test_a_model_that_did_not_change_tells_nothing():
    old, _ = pair()
    leak = pair_leak(old, old, sigma_old=0.0, sigma_new=0.0)
    assert leak.mu == 0.0
    assert leak.auc("still there") == 0.5
    assert leak.epsilon(1e-5) == 0.0


def test_the_reading_says_whom_it_is_for():
    text = str(pair_leak(*pair(), sigma_old=0.3, sigma_new=0.4))
    assert text.startswith("FOR THE OFFICER ONLY, never to be published")
    assert "mu 2 (best attack: AUC 0.921)" in text
    assert not hasattr(PairLeak, "to_json")  # nothing puts it into a report by habit


def test_what_is_no_pair_is_refused():
    old, new = pair()
    for other in ({"a.weight": new["a.weight"]}, {}, {**new, "a.bias": torch.zeros(3)}):
        with pytest.raises(Misuse, match="same parameters"):
            pair_leak(old, other, sigma_old=1.0, sigma_new=1.0)
    with pytest.raises(Misuse, match="same parameters"):
        pair_leak({}, {}, sigma_old=1.0, sigma_new=1.0)
    for sigmas in ((-1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(Misuse, match="finite"):
            pair_leak(old, new, sigma_old=sigmas[0], sigma_new=sigmas[1])
    with pytest.raises(Misuse, match="noise"):
        attack_pair(old, new, sigma_old=0.0, sigma_new=1.0, rival="never there", rng=torch.Generator())
    with pytest.raises(Misuse, match="fpr"):
        PairLeak(distance=1.0, sigma_old=1.0, sigma_new=1.0).tpr(0.0, "never there")


def test_an_attack_in_chunks_is_one_attack(monkeypatch):
    old, new = pair()
    monkeypatch.setattr("expunge.certify.leak._CHUNK", 42 * 100)
    rng = torch.Generator().manual_seed(3)
    measured = attack_pair(old, new, sigma_old=0.5, sigma_new=0.5, rival="still there", trials=1050, rng=rng)
    assert measured.n == 2100
    assert measured.low < PairLeak(distance=0.6, sigma_old=0.5, sigma_new=0.5).auc("still there") < measured.high
