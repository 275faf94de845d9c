"""Masks: exact counts, exact zeros, other models refused, and values that no optimiser moves."""

import copy

import pytest
import torch
from torch import nn

from expunge.core.errors import Misuse
from expunge.core.mask import Held, Mask


def net(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).to(dtype)


def first_row(module):
    moves = torch.ones_like(module[0].weight, dtype=torch.bool)
    moves[0] = False
    return Mask({"0.weight": moves})


def is_plus_zero(tensor):
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())


def test_counts():
    mask = Mask({"a": torch.tensor([True, False, False]), "b": torch.ones(2, 2, dtype=torch.bool)})
    assert (mask.size, mask.held, mask.sparsity) == (7, 2, 2 / 7)
    assert (Mask({}).size, Mask({}).held, Mask({}).sparsity) == (0, 0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pruned_entries_are_plus_zero_and_all_others_as_they_were(dtype):
    module = net(dtype=dtype)
    with torch.no_grad():
        module[0].weight[0] = torch.tensor([-1.0, float("nan"), float("inf"), -0.0])
    before = copy.deepcopy(module.state_dict())
    first_row(module).prune_(module)
    assert is_plus_zero(module[0].weight[0])
    assert torch.equal(module[0].weight[1:], before["0.weight"][1:])
    for name in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(module.state_dict()[name], before[name])
    assert module[0].weight.requires_grad
    assert module[0].weight.grad_fn is None


@pytest.mark.parametrize(
    ("name", "shape", "theirs"),
    [("0.weight", (4, 3), r"\(3, 4\)"), ("5.weight", (3, 4), "none"), ("0.weight", (12,), r"\(3, 4\)")],
)
def test_the_mask_of_another_model_is_refused_and_nothing_is_written(name, shape, theirs):
    module = net()
    before = copy.deepcopy(module.state_dict())
    # A good name comes first: nothing may be written before the bad one is seen.
    mask = Mask({"2.weight": torch.zeros(2, 3, dtype=torch.bool), name: torch.zeros(shape, dtype=torch.bool)})
    for use in (mask.prune_, lambda module: Held(mask, module)):
        with pytest.raises(
            Misuse, match=rf'^the mask is of another model: it has "{name}" of shape .*, the .* {theirs};'
        ):
            use(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(Misuse, match=r'^a mask holds True and False, got torch.float32 for "a"; compare first$'):
        Mask({"a": torch.ones(2)})


def test_both_masks_hold():
    one = Mask({"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False])})
    other = Mask({"a": torch.tensor([True, False, True, False]), "c": torch.tensor([False])})
    both, reverse = one & other, other & one
    assert {name: value.tolist() for name, value in both.moves.items()} == {
        "a": [True, False, False, False],
        "b": [True, False],
        "c": [False],
    }
    assert all(torch.equal(value, reverse.moves[name]) for name, value in both.moves.items())
    assert one.moves["a"].tolist() == [True, True, False, False]
    with pytest.raises(Misuse, match=r'^the masks are of two models: "a" is \(4,\) in one and \(2,\) in the other'):
        one & Mask({"a": torch.tensor([True, False])})


def test_a_shared_weight_is_held_under_each_of_its_names():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    moves = torch.ones(3, 3, dtype=torch.bool)
    moves[1, 1] = False
    Mask({"1.weight": moves}).prune_(module)
    assert module[0].weight[1, 1] == 0


OPTIMISERS = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_held_values_stay_bit_for_bit_whatever_the_optimiser_does(optimiser):
    module = net()
    mask = first_row(module)
    before, held = module[0].weight.detach().clone(), Held(mask, module)
    stepper = OPTIMISERS[optimiser](module.parameters())
    for step in range(5):
        stepper.zero_grad()
        module(torch.full((6, 4), step - 2.0)).square().sum().backward()
        stepper.step()
        assert not torch.equal(module[0].weight[0], before[0])  # the liar: without putting back, they move
        held.put_back()
        assert torch.equal(module[0].weight[0], before[0])
    assert (module[0].weight[1:] != before[1:]).all()
