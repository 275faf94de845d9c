"""Outputs: those of the module in evaluation mode, in any batches, leaving the module as it was."""

import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.records import Records
from expunge.learn.predict import evaluating, outputs


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pixels", [True, False])
def test_outputs_are_those_of_evaluation_mode(dtype, pixels):
    x = torch.randint(0, 256, (2500, 2, 3), generator=generator(0), dtype=torch.uint8)
    records = Records(x if pixels else x.float() / 255, [0] * 2500)
    module = net().to(dtype).train()
    module[2].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    got = outputs(module, records)
    assert [part.training for part in module] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.eval()
    torch.testing.assert_close(got, module(x.to(dtype) / 255).detach())
    torch.testing.assert_close(outputs(module, records.select([5, 3])), got[[5, 3]])


def test_no_rows_have_no_outputs():
    assert outputs(net(), Records(torch.zeros(1, 6), [0]).select([])).shape[0] == 0


def test_flags_come_back_after_an_error():
    module = net().train()

    def fail():
        with evaluating(module):
            assert not module[2].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module[2].training
