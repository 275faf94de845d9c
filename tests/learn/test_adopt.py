"""Models that were trained elsewhere: what can be done with them, what cannot, and that they can be kept."""

from pathlib import Path

import pytest
import torch
from torch import nn

from expunge import Claim, FineTune, Recipe, Request, Retrain, Unsupported, adopt, datasets, generator, load


def _net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def test_adopted_models_claim_nothing_and_survive_saving(tmp_path: Path) -> None:
    records = datasets.optdigits(owners=20).train.select(range(200))
    module = _net()
    adopted = adopt(module, Recipe(model="mlp"), records)
    assert adopted.standing is Claim.NONE
    request = Request.remove(records.ids[:5])
    with pytest.raises(Unsupported, match="trained elsewhere"):
        Retrain()(adopted, records, request, rng=generator(0))
    answer = FineTune()(adopted, records, request, rng=generator(0)).trained
    answer.save(tmp_path / "model")
    with pytest.raises(Unsupported, match=r"load\(\.\.\., module=\.\.\.\)"):
        load(tmp_path / "model")
    again = load(tmp_path / "model", module=_net())
    assert (again.digest(), again.gone, again.standing) == (answer.digest(), answer.gone, Claim.NONE)
    x = torch.rand(3, 8, 8)
    assert torch.equal(again.module(x), answer.module(x))
    assert module is adopted.module
