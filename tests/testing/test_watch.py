import copy

import pytest
import torch
from torch import nn

from expunge.testing import WriteWatch


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


def sgd_step(module, **settings):
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, **settings)
    module(torch.ones(5, 3)).square().sum().backward()
    optimiser.step()


def data_swap(module):
    module[0].weight.data = torch.zeros(4, 3)
    module(torch.ones(5, 3))


def data_write(module):
    module[0].bias.data.add_(1)


def through_a_view(module):
    module[0].weight.detach()[0].zero_()


def statistics(module):
    module.train()(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))


WRITES = {
    "sgd": sgd_step,
    "fused sgd": lambda module: sgd_step(module, fused=True),
    "foreach sgd": lambda module: sgd_step(module, foreach=True),
    "data write": data_write,
    "data swap": data_swap,
    "view": through_a_view,
    "batch statistics": statistics,
    "shallow copy": lambda module: sgd_step(copy.copy(module)),
    "load": lambda module: module.load_state_dict(model().state_dict()),
}


@pytest.mark.parametrize("way", WRITES)
def test_every_way_of_writing_is_seen(way):
    module = model()
    with WriteWatch([module]) as watch:
        WRITES[way](module)
    assert watch.writes


def test_reading_copying_and_training_a_copy_are_not_writes():
    module = model()
    with WriteWatch([module]) as watch:
        with torch.inference_mode():
            module(torch.ones(5, 3))
        student = copy.deepcopy(module).train()
        sgd_step(student, fused=True, momentum=0.9)
        statistics(student)
        torch.autograd.grad(module(torch.ones(5, 3)).sum(), list(module.parameters()))
    assert not watch.writes
