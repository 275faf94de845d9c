"""Pruning: exact counts, SynFlow by hand and conserved, trainings against a loop written out, zeros that stay."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import expunge.unlearn
from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import Misuse, Unsupported
from expunge.core.mask import Mask
from expunge.core.recipe import Pruning, Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn import pruning
from expunge.learn.build import allow_code, build
from expunge.learn.loop import Keep, Tally, fit, reading_order
from expunge.learn.many import train_many
from expunge.learn.models import build as network
from expunge.learn.pruning import (
    fit_pruned,
    flow,
    magnitude_mask,
    mask_of_zeros,
    prunable,
    random_mask,
    synflow_mask,
)
from expunge.learn.training import adopt, load, train
from expunge.testing import Case, conformance, digits
from expunge.unlearn import Method, Retrain, Sisa


def rows(n=60, classes=3, dtype=torch.float64, seed=5):
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))).to(dtype) + nn.functional.one_hot(y, 6).to(dtype)
    return Records(x, y, [f"r{i}" for i in range(n)], [f"o{i % 12}" for i in range(n)], classes=classes)


RECORDS = rows()
FORGET = [f"r{i}" for i in range(0, 40, 4)]
RECIPE = Recipe(
    model="mlp",
    model_args={"hidden": (8, 5)},
    optimiser_args={"lr": 0.1, "momentum": 0.9, "nesterov": True},
    schedule={"kind": "cosine", "floor": 0.1},
    epochs=4,
    batch_size=16,
    weight_decay=1e-2,
    dtype="float64",
    seed=3,
)
PRUNABLE = 6 * 8 + 8 * 5
STEPS = 4  # in an epoch: 60 rows in batches of 16
PRUNINGS = {
    "one-shot": Pruning(sparsity=0.7),
    "rewound": Pruning(sparsity=0.7, rewind=1),
    "iterative": Pruning(sparsity=0.8, rounds=3, rewind=2),
    "synflow": Pruning(sparsity=0.7, by="synflow", iterations=10),
    "random": Pruning(sparsity=0.5, by="random"),
}


def seeded(name="mlp", shape=(6,), outputs=3, seed=0, **args):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network(name, shape=shape, outputs=outputs, **args)


def zeros_of(trained):
    return {name: ~moves for name, moves in mask_of_zeros(trained.module).moves.items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def plus_zero(tensor):
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())


# Which weights, and how many


@pytest.mark.parametrize(
    ("name", "shape", "args", "convolutions", "linear"),
    [
        ("mlp", (6,), {"hidden": (8, 5), "norm": "batch"}, 0, 2),
        ("lenet", (28, 28), {}, 2, 2),
        ("convnet3", (1, 16, 16), {}, 3, 0),
        ("resnet20", (1, 8, 8), {"norm": "batch"}, 19, 0),
        ("resnet18", (1, 8, 8), {"width": 2, "norm": "batch"}, 20, 0),
    ],
)
def test_weights_of_convolutions_and_linear_layers_but_the_head_are_prunable(name, shape, args, convolutions, linear):
    module = seeded(name, shape, **args)
    found = prunable(module)
    known = dict(module.named_parameters())
    assert all(weight is known[key] for key, weight in found.items())
    assert sorted(weight.dim() for weight in found.values()) == [2] * linear + [4] * convolutions
    assert "head.weight" not in found
    assert not any("bias" in key for key in found)


class Tied(nn.Module):
    def __init__(self, *, head=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        if head:
            self.c.weight = self.a.weight
        self.again = self.a  # one module, two names

    def forward(self, x):
        return self.c(self.again(self.b(self.a(x).relu()).relu()).relu())


def test_a_shared_weight_is_named_once_and_one_shared_with_the_head_is_not_pruned():
    module = Tied()
    assert list(prunable(module)) == ["a.weight"]
    mask = magnitude_mask(module, 0.5)
    assert (mask.held, mask.size) == (8, 16)
    mask.prune_(module)
    assert int((module.b.weight == 0).sum()) == 8
    again = copy.deepcopy(module)
    assert again.b.weight is again.a.weight
    assert same(mask_of_zeros(again).moves, mask.moves)
    with pytest.raises(Unsupported, match=r"^there is nothing to prune: the model is its head alone; use a deeper one"):
        prunable(Tied(head=True))
    # In SynFlow a weight used three times carries three layers' flow, and stays tied in the working copy.
    scores = flow(module, (4,))["a.weight"].sum()
    copied = pruning._linear(module)
    torch.testing.assert_close(scores, 3 * copied(torch.ones(1, 4).double()).sum().detach())


def test_a_weight_that_is_computed_is_refused():
    module = seeded()
    nn.utils.parametrizations.weight_norm(module.body[0])
    with pytest.raises(Unsupported, match=r"computed from others and cannot be pruned; remove the parametrisation$"):
        prunable(module)


@pytest.mark.parametrize("choose", ["magnitude", "random", "synflow"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.75, 0.95])
def test_the_number_of_pruned_weights_is_exact(choose, sparsity):
    for hidden in ((8, 5), (5, 3), (3, 3), (7, 3)):
        module = seeded(hidden=hidden)
        n = sum(weight.numel() for weight in prunable(module).values())
        if choose == "magnitude":
            mask = magnitude_mask(module, sparsity)
        elif choose == "random":
            mask = random_mask(module, sparsity, generator(1))
        elif sparsity == 0.95:
            continue  # so few are left of so small a network that no path is
        else:
            mask = synflow_mask(module, (6,), sparsity, 7)
        assert (mask.size, mask.held) == (n, round(sparsity * n))


def test_rounds_do_not_lose_a_weight_to_rounding():
    """1 - (1 - 0.1) is less than 0.1, and 15 weights lie where that decides."""
    module = seeded(hidden=(3,), shape=(5,))
    assert synflow_mask(module, (5,), 0.1, 4).held == magnitude_mask(module, 0.1).held == 2


def test_at_least_one_weight_is_left_and_silly_shares_are_refused():
    module = seeded()
    assert magnitude_mask(module, 0.999999).held == magnitude_mask(module, 0.5).size - 1
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(Misuse, match=rf"^sparsity must be >= 0 and < 1, got {wrong}$"):
            magnitude_mask(module, wrong)
    with pytest.raises(Misuse, match=r"^iterations must be >= 1, got 0$"):
        synflow_mask(module, (6,), 0.5, 0)
    with torch.no_grad():
        module.body[0].weight[0, 0] = math.nan
    with pytest.raises(Misuse, match=r"^weights that are not finite cannot be told apart"):
        magnitude_mask(module, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_weights_of_all_layers_together_stay(dtype):
    module = seeded(hidden=(9, 7)).to(dtype)
    mask = magnitude_mask(module, 0.6)
    flat = torch.cat([weight.detach().double().abs().flatten() for weight in prunable(module).values()])
    kept = torch.cat([moves.flatten() for moves in mask.moves.values()])
    order = sorted(range(len(flat)), key=lambda place: (-float(flat[place]), place))  # ties to the first
    assert set(kept.nonzero().flatten().tolist()) == set(order[: int(kept.sum())])
    assert sorted(mask.moves) == sorted(prunable(module))


def test_ties_go_to_the_first():
    module = seeded(hidden=(4, 4))
    with torch.no_grad():
        for weight in prunable(module).values():
            weight.copy_(torch.where(weight > 0, 0.5, -0.5))
    mask = magnitude_mask(module, 0.5)
    kept = torch.cat([moves.flatten() for moves in mask.moves.values()])
    assert kept.tolist() == [True] * 20 + [False] * 20


def test_what_was_out_stays_out_although_it_ties_with_what_is_left():
    module = seeded(hidden=(4, 4))
    before = random_mask(module, 0.5, generator(0))
    with torch.no_grad():
        for weight in prunable(module).values():
            weight.zero_()  # what is left is zero too, as where nothing flows on
    for mask in (
        magnitude_mask(module, 0.6, within=before),
        random_mask(module, 0.6, generator(1), within=before),
        magnitude_mask(module, 0.3, within=before),
    ):
        assert not any((moves & ~before.moves[name]).any() for name, moves in mask.moves.items())
        assert mask.held in (24, 20)
    assert same(random_mask(module, 0.5, generator(1), within=before).moves, before.moves)


def test_a_random_mask_is_uniform_over_all_layers_and_learns_nothing():
    module = seeded(hidden=(200, 200), shape=(50,))
    mask = random_mask(module, 0.9, generator(4))
    for moves in mask.moves.values():
        share, deviation = float(moves.double().mean()), math.sqrt(0.09 / moves.numel())
        assert abs(share - 0.1) < 4 * deviation
    assert same(mask.moves, random_mask(seeded(hidden=(200, 200), shape=(50,), seed=9), 0.9, generator(4)).moves)
    assert not same(mask.moves, random_mask(module, 0.9, generator(5)).moves)


# SynFlow


def test_synflow_of_two_linear_layers_by_hand():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        module[2].weight.copy_(torch.tensor([[-5.0, 6.0], [7.0, -8.0]]))
        module[4 - 1].weight.copy_(torch.tensor([[2.0, -1.0]]))
    scores = flow(module, (2,))
    # Onwards from hidden unit j: sum_k |head_k| |W2_kj| = 2*5 + 7 = 17, 2*6 + 8 = 20. Into it: 3 and 7.
    assert scores["0.weight"].tolist() == [[17.0, 34.0], [60.0, 80.0]]
    assert scores["2.weight"].tolist() == [[2 * 5 * 3.0, 2 * 6 * 7.0], [7 * 3.0, 8 * 7.0]]
    assert scores["0.weight"].dtype is torch.float64
    assert float(scores["0.weight"].sum()) == float(scores["2.weight"].sum()) == 191.0
    # The two smallest of 17, 34, 60, 80, 30, 84, 21, 56.
    mask = synflow_mask(module, (2,), 0.25, 1)
    assert mask.moves["0.weight"].tolist() == [[False, True], [True, True]]
    assert mask.moves["2.weight"].tolist() == [[True, True], [False, True]]


CHAINS = [
    ("mlp", (6,), {"hidden": (9, 8, 7)}),
    ("lenet", (28, 28), {}),
    ("convnet3", (1, 16, 16), {"norm": "none"}),
    ("convnet3", (1, 16, 16), {"norm": "group"}),
    ("allcnn", (1, 12, 12), {"width": 6, "norm": "batch"}),
]


@pytest.mark.parametrize(("name", "shape", "args"), CHAINS)
def test_synflow_is_conserved_from_layer_to_layer(name, shape, args):
    """Tanaka et al., 2020, theorem 1: whatever the signs, biases and norms that the network has."""
    module = seeded(name, shape, **args)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            if parameter.dim() == 1:
                parameter.normal_(generator=generator(index))  # biases and scales, some negative
    sums = [float(scores.sum()) for scores in flow(module, shape).values()]
    assert len(sums) >= 3
    assert all(one == pytest.approx(sums[0], rel=1e-12) for one in sums)
    assert sums[0] > 0


def test_synflow_leaves_weights_buffers_and_flags_as_they_were():
    for name, norm in (("resnet20", "batch"), ("convnet3", "group")):
        module = seeded(name, (1, 8, 8), norm=norm)
        module.train()
        module(torch.rand(4, 1, 8, 8))  # batch statistics that are not those of the beginning
        next(module.parameters()).requires_grad_(False)
        list(module.modules())[3].eval()
        before = copy.deepcopy(module.state_dict())
        flags = [[one.training for one in module.modules()], [one.requires_grad for one in module.parameters()]]
        layers = [type(one) for one in module.modules()]
        held = synflow_mask(module, (1, 8, 8), 0.9, 3).held
        assert held == round(0.9 * magnitude_mask(module, 0).size)
        assert same(module.state_dict(), before)
        assert [value.dtype for value in module.state_dict().values()] == [value.dtype for value in before.values()]
        assert [[one.training for one in module.modules()], [p.requires_grad for p in module.parameters()]] == flags
        assert [type(one) for one in module.modules()] == layers
        assert all(parameter.grad is None for parameter in module.parameters())


def test_synflow_does_not_depend_on_biases_signs_statistics_or_dtype():
    module = seeded("convnet3", (1, 16, 16), norm="batch", width=8)
    other = copy.deepcopy(module).double()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.normal_() if name.endswith("bias") else parameter.neg_()
        for name, buffer in other.named_buffers():
            if "running" in name:
                buffer.uniform_(1, 2)
    one, two = flow(module, (1, 16, 16)), flow(other, (1, 16, 16))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["lenet", "convnet3", "resnet20"])
def test_synflow_leaves_no_layer_without_weights_at_99_percent(name):
    module = seeded(name, (1, 28, 28))
    left = [int(moves.sum()) for moves in synflow_mask(module, (1, 28, 28), 0.99).moves.values()]
    assert min(left) > 0
    if name != "convnet3":  # the liar: at the beginning, by magnitude, layers are lost
        assert min(int(moves.sum()) for moves in magnitude_mask(module, 0.99).moves.values()) == 0


def test_synflow_may_lose_a_residual_branch_but_never_cuts_the_network_through():
    """On images as small as these the shortcut carries nearly all that flows, so that whole branches go."""
    module = seeded("resnet20", (1, 8, 8))
    mask = synflow_mask(module, (1, 8, 8), 0.99, 50)
    left = {name: int(moves.sum()) for name, moves in mask.moves.items()}
    lost = {name.rpartition(".branch.")[0] for name, count in left.items() if count == 0}
    assert lost == {"body.10", "body.11"}
    assert all((count == 0) == (name.rpartition(".branch.")[0] in lost) for name, count in left.items())
    mask.prune_(module)
    assert all(float(scores.sum()) > 0 for name, scores in flow(module, (1, 8, 8)).items() if left[name])


class Odd(nn.Module):
    """Norms of all kinds, one of them under two names, a frozen layer, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.same = self.norm
        self.last, self.root, self.plain = nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, elementwise_affine=False)
        self.first.requires_grad_(False)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.head(self.plain(self.root(self.last(self.same(self.second(x)).relu()))))


def test_synflow_of_shared_norms_layer_norms_frozen_and_unused_layers():
    module = Odd()
    with torch.no_grad():
        for one in (module.norm.weight, module.last.weight, module.root.weight):
            one.uniform_(-2, 2)
        module.norm.running_mean.fill_(1e3)  # would swamp everything if one name of the norm were left as it is
    scores = flow(module, (4,))
    first, second, head = (one.weight.detach().double().abs() for one in (module.first, module.second, module.head))
    scale, last, root = (one.weight.detach().double().abs() for one in (module.norm, module.last, module.root))
    into = scale * first.sum(1)
    onwards = scale * last * root * head.sum(0)
    torch.testing.assert_close(scores["second.weight"], onwards[:, None] * second * into[None, :])
    torch.testing.assert_close(scores["first.weight"].sum(), scores["second.weight"].sum())
    assert float(scores["unused.weight"].abs().sum()) == 0


def test_synflow_refuses_where_nothing_flows():
    module = seeded(hidden=(4, 4))
    with torch.no_grad():
        module.body[2].weight.zero_()
    for call in (lambda: flow(module, (6,)), lambda: synflow_mask(module, (6,), 0.5, 2)):
        with pytest.raises(Unsupported, match=r"^nothing flows through the network \(0\): a layer is zero"):
            call()
    with pytest.raises(Unsupported, match=r"^nothing flows .* lower the sparsity, or prune by magnitude$"):
        synflow_mask(seeded(hidden=(4, 4)), (6,), 0.99, 1)  # one weight is left, and two layers are to be passed
    words = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    with pytest.raises(Unsupported, match=r"^the network reads no row of ones in float64 \(.*\); prune by magnitude$"):
        flow(words, (3,))
    for norm in (nn.LayerNorm(3), nn.BatchNorm1d(3)):
        with pytest.raises(Unsupported):
            flow(norm, (3,))


# Training


@pytest.mark.parametrize("name", PRUNINGS)
@pytest.mark.parametrize("optimiser", ["nesterov", "adam"])
def test_pruned_weights_are_plus_zero_after_each_step(name, optimiser):
    recipe = replace(RECIPE, pruning=PRUNINGS[name])
    if optimiser == "adam":
        recipe = replace(recipe, optimiser="adam", optimiser_args={"lr": 0.05})
    trained = train(recipe, RECORDS, keep=Keep(every=1))
    zeros = zeros_of(trained)
    assert sum(int(one.sum()) for one in zeros.values()) == round(recipe.pruning.sparsity * PRUNABLE)
    assert len(trained.log.checkpoints) == STEPS * (4 - recipe.pruning.rewind)
    for state in trained.log.checkpoints.values():
        assert all(plus_zero(state[key][zero]) for key, zero in zeros.items())
        assert all(bool((state[key][~zero] != 0).all()) for key, zero in zeros.items())
    assert all(bool((p != 0).all()) for key, p in trained.module.named_parameters() if key not in zeros)


def written_out(recipe, records, masks=(), beginning=None, stage="dense", begin=0, stop=None):
    """The training as a plain loop: gradients and steps by hand; returns the weights at each epoch's end."""
    module = build(recipe.completed(records))
    parameters = dict(module.named_parameters())
    if beginning is not None:
        module.load_state_dict(beginning)
    buffers = {name: torch.zeros_like(one) for name, one in parameters.items()}
    lr, momentum, decay = recipe.optimiser_args["lr"], recipe.optimiser_args["momentum"], recipe.weight_decay
    states = [copy.deepcopy(module.state_dict())]
    first = True
    for epoch in range(recipe.epochs - begin):
        rate = lr * (0.1 + 0.9 * (1 + math.cos(math.pi * (begin + epoch) / recipe.epochs)) / 2)
        for batch in reading_order(recipe, records, stage, epoch).split(recipe.batch_size):
            loss = nn.functional.cross_entropy(module(records.x[batch]), records.y[batch])
            grads = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, one), grad in zip(parameters.items(), grads, strict=True):
                    grad = grad + decay * one
                    buffers[name] = grad.clone() if first else momentum * buffers[name] + grad
                    one -= rate * (grad + momentum * buffers[name])
                    if name in masks:
                        one *= masks[name]
            first = False
        states.append(copy.deepcopy(module.state_dict()))
    return states


def cut(state, count, dead=()):
    """{name: 0 or 1}: all but the `count` smallest of the two hidden layers, sorted in plain Python."""
    names = ("body.0.weight", "body.2.weight")
    flat = [(abs(value), name, place) for name in names for place, value in enumerate(state[name].flatten().tolist())]
    gone = {(name, place) for _, name, place in sorted(flat)[:count]}
    return {
        name: torch.tensor([(name, place) not in gone for place in range(state[name].numel())])
        .view(state[name].shape)
        .double()
        for name in names
    }


@pytest.mark.parametrize(("name", "counts"), [("one-shot", [62]), ("rewound", [62]), ("iterative", [37, 58, 70])])
def test_pruning_by_magnitude_is_the_loop_written_out(name, counts):
    """Train, prune, rewind, train. Of 88 weights go 0.7 * 88 = 61.6; or 36.5, 57.9, 70.4 for shares 0.2^(k/3) left."""
    recipe = replace(RECIPE, pruning=PRUNINGS[name])
    rewind = recipe.pruning.rewind
    states = written_out(recipe, RECORDS)
    start, last = states[rewind], states[-1]
    for round_, count in enumerate(counts, 1):
        masks = cut(last, count)
        begun = {key: value * masks[key] if key in masks else value for key, value in start.items()}
        last = written_out(recipe, RECORDS, masks, begun, f"sparse-{round_}", rewind)[-1]
    trained = train(recipe, RECORDS)
    for key, value in trained.module.state_dict().items():
        torch.testing.assert_close(value, last[key], rtol=0, atol=1e-12)
        assert torch.equal(value == 0, last[key] == 0)


def spied(monkeypatch):
    calls = []

    def spy(module, recipe, records, **more):
        calls.append({**more, "start": copy.deepcopy(module.state_dict())})
        calls[-1]["log"] = fit(module, recipe, records, **more)
        return calls[-1]["log"]

    monkeypatch.setattr(pruning, "fit", spy)
    return calls


def test_iterative_pruning_takes_equal_shares_of_what_is_left_and_its_masks_are_nested(monkeypatch):
    calls = spied(monkeypatch)
    recipe = replace(RECIPE, model_args={"hidden": (60, 40)}, pruning=Pruning(sparsity=0.9, rounds=4, rewind=1))
    train(recipe, RECORDS)
    dense, *sparse = calls
    assert [call["stage"] for call in calls] == ["dense", "sparse-1", "sparse-2", "sparse-3", "sparse-4"]
    assert list(dense["log"].checkpoints) == [STEPS]  # one, however many epochs follow
    n = 60 * 6 + 60 * 40
    left = [n - call["mask"].held for call in sparse]
    assert left == [n - round(n * (1 - 0.1 ** (k / 4))) for k in (1, 2, 3)] + [n - round(n * 0.9)]
    for one, other in itertools.pairwise(sparse):
        assert not any((moves & ~one["mask"].moves[name]).any() for name, moves in other["mask"].moves.items())
    for call in sparse:
        assert (call["begin"], call["epochs"], call["log"].steps) == (1, 3, 3 * STEPS)
        for name, value in call["start"].items():
            moves = call["mask"].moves.get(name, torch.tensor(True))
            assert torch.equal(value, torch.where(moves, dense["log"].checkpoints[STEPS][name], 0.0))


def test_rewinding_takes_batch_statistics_back_too(monkeypatch):
    calls = spied(monkeypatch)
    recipe = replace(RECIPE, model_args={"hidden": (8, 5), "norm": "batch"}, pruning=PRUNINGS["rewound"])
    train(recipe, RECORDS)
    assert int(calls[1]["start"]["body.1.num_batches_tracked"]) == STEPS


@pytest.mark.parametrize(("kind", "factors"), [("steps", [1.0, 0.5, 0.5]), ("linear", [0.75, 0.5, 0.25])])
def test_a_rewound_training_goes_on_in_the_schedule_where_it_was_rewound_to(monkeypatch, kind, factors):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]
    )
    schedule = {"kind": "steps", "at": [2], "factor": 0.5} if kind == "steps" else {"kind": "linear"}
    train(replace(RECIPE, schedule=schedule, pruning=PRUNINGS["rewound"]), RECORDS)
    assert rates[4 * STEPS :] == pytest.approx([0.1 * factor for factor in factors for _ in range(STEPS)])


def test_each_training_reads_in_an_order_of_its_own():
    recipe = replace(RECIPE, pruning=PRUNINGS["iterative"])
    trained = train(recipe, RECORDS, keep=Keep(batches=True, every=STEPS))
    read = [[name for batch in trained.log.batches[k : k + STEPS] for name in batch] for k in (0, STEPS)]
    for epoch, names in enumerate(read):
        order = reading_order(trained.recipe, RECORDS, "sparse-3", epoch)
        assert names == [RECORDS.ids[i] for i in order.tolist()]
        for stage, other in itertools.product(("dense", "sparse-1", "sparse-2"), range(4)):
            assert order.tolist() != reading_order(trained.recipe, RECORDS, stage, other).tolist()
    # What is kept is the last training's, counted from where it begins; steps and rows are of all four.
    assert len(trained.log.batches) == 2 * STEPS
    assert list(trained.log.checkpoints) == [STEPS, 2 * STEPS]
    assert len(trained.log.losses) == 2
    assert (trained.log.steps, trained.log.rows_read) == ((4 + 3 * 2) * STEPS, (4 + 3 * 2) * 60)
    assert same(trained.log.checkpoints[2 * STEPS], trained.module.state_dict())


EPOCHS = {"one-shot": 8, "rewound": 7, "iterative": 10, "synflow": 4, "random": 4}


@pytest.mark.parametrize("name", PRUNINGS)
def test_work_is_counted_and_each_training_reported(name):
    told, tally = [], Tally()
    recipe = replace(RECIPE, batch_size=2, pruning=PRUNINGS[name])
    trained = train(recipe, RECORDS, tally=tally, report=lambda *what: told.append(what))
    assert tally.gradients == tally.rows_read == trained.log.rows_read == EPOCHS[name] * 60
    assert trained.log.steps == EPOCHS[name] * 30
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    rounds = [f"sparse-{k + 1}" for k in range(recipe.pruning.rounds)]
    assert stages == (["dense", *rounds] if recipe.pruning.by == "magnitude" else ["whole"])
    for stage in stages:
        done = [(done, total) for one, done, total in told if one == stage]
        assert done == sorted(done)
        assert {total for _, total in done} == {30 * (4 - (recipe.pruning.rewind if "sparse" in stage else 0))}
        assert done[-1][0] <= done[-1][1]


@pytest.mark.parametrize("name", PRUNINGS)
def test_the_same_training_gives_the_same_bytes_in_any_order_of_rows_saved_and_copied(tmp_path, name):
    recipe = replace(RECIPE, dtype="float32", pruning=PRUNINGS[name])
    trained = train(recipe, RECORDS)
    shuffled = RECORDS.select(torch.randperm(60, generator=generator(1)))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = train(recipe, shuffled)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.digest() == trained.digest()
    assert train(replace(recipe, seed=4), RECORDS).digest() != trained.digest()
    trained.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert (loaded.digest(), loaded.recipe) == (trained.digest(), trained.recipe)
    assert loaded.recipe.pruning == PRUNINGS[name]
    for module in (loaded.module, copy.deepcopy(trained.module)):
        assert same(mask_of_zeros(module).moves, mask_of_zeros(trained.module).moves)
        assert list(module.state_dict()) == list(build(trained.recipe).state_dict())


def test_masks_chosen_blindly_know_no_row_and_the_mask_by_magnitude_does():
    other = rows(seed=6)
    for name, choice in PRUNINGS.items():
        one, two = (zeros_of(train(replace(RECIPE, pruning=choice), records)) for records in (RECORDS, other))
        assert same(one, two) == (choice.by != "magnitude"), name
        other_coins = train(replace(RECIPE, seed=4, pruning=choice), RECORDS)
        assert not same(one, zeros_of(other_coins)), name


def test_rewinding_to_the_end_prunes_and_trains_no_more_and_no_epochs_prune_the_beginning():
    dense = train(RECIPE, RECORDS)
    trained = train(replace(RECIPE, pruning=Pruning(sparsity=0.5, rewind=4)), RECORDS)
    assert trained.log.steps == 4 * STEPS
    assert sum(int(one.sum()) for one in zeros_of(trained).values()) == PRUNABLE // 2
    # The dense training of a pruned recipe reads in another order than that of a dense recipe.
    assert dense.digest() != train(replace(RECIPE, pruning=Pruning(sparsity=1e-9, rewind=4)), RECORDS).digest()
    none = train(replace(RECIPE, epochs=0, pruning=Pruning(sparsity=0.5)), RECORDS)
    start = build(none.recipe)
    magnitude_mask(start, 0.5).prune_(start)
    assert same(none.module.state_dict(), start.state_dict())


def test_what_cannot_be_pruned_is_refused_before_any_work():
    tally = Tally()
    with pytest.raises(Unsupported, match=r"^there is nothing to prune"):
        train(replace(RECIPE, model="softmax", model_args={}, pruning=Pruning(sparsity=0.5)), RECORDS, tally=tally)
    assert tally.rows_read == 0
    with pytest.raises(Misuse, match=r"^the recipe says nothing of pruning; use fit$"):
        fit_pruned(build(RECIPE.completed(RECORDS)), RECIPE, RECORDS)


def test_many_models_at_once_are_not_pruned_and_say_so():
    with pytest.raises(
        Unsupported, match=r"^a pruned recipe has a mask for each model, .*; train the models one by one$"
    ):
        train_many(replace(RECIPE, pruning=PRUNINGS["random"]), [RECORDS], [0])


def test_an_adopted_model_that_its_recipe_calls_pruned_keeps_its_zeros():
    module = seeded(hidden=(8, 5)).double()
    magnitude_mask(module, 0.5).prune_(module)
    recipe = replace(RECIPE, pruning=Pruning(sparsity=0.5))
    request = Request.remove(FORGET)
    held = []
    for given in (recipe, RECIPE):
        adopted = adopt(module, given, RECORDS)
        after = expunge.unlearn.FineTune()(adopted, RECORDS, request, rng=generator(0)).trained
        held.append(mask_of_zeros(after.module).held)
    assert held[0] == PRUNABLE // 2
    assert held[1] < PRUNABLE // 8  # the liar: a recipe that calls it dense lets all grow but what is dead


def own(shape, outputs):
    return nn.Sequential(nn.Linear(*shape, 7), nn.ReLU(), nn.Dropout(0.3), nn.LayerNorm(7), nn.Linear(7, outputs))


@pytest.mark.parametrize("name", PRUNINGS)
def test_a_network_of_the_users_own_with_dropout_is_pruned_too(name):
    recipe = replace(RECIPE, model=allow_code(own), model_args={}, pruning=PRUNINGS[name])
    trained = train(recipe, RECORDS)
    assert mask_of_zeros(trained.module).held == round(recipe.pruning.sparsity * 42)
    assert train(recipe, RECORDS).digest() == trained.digest()


# Unlearning in pruned models


@pytest.fixture(scope="module")
def sparse():
    return train(replace(RECIPE, pruning=PRUNINGS["rewound"]), RECORDS)


METHODS = [
    kind() for kind in (getattr(expunge.unlearn, name) for name in expunge.unlearn.__all__)
    if isinstance(kind, type) and issubclass(kind, Method) and kind not in (Method, Sisa)
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_leaves_zeros_at_plus_zero(method, sparse):
    problem = method.supports(sparse)
    if problem is not None:
        with pytest.raises(Unsupported):
            method(sparse, RECORDS, Request.remove(FORGET), rng=generator(0))
        return
    after = method(sparse, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    zeros = zeros_of(after if method.claim is Claim.EXACT else sparse)
    assert sum(int(one.sum()) for one in zeros.values()) == 62
    state = after.module.state_dict()
    assert all(plus_zero(state[name][zero]) for name, zero in zeros.items())
    assert not same(state, sparse.module.state_dict())


@pytest.mark.parametrize("name", PRUNINGS)
def test_retraining_a_pruned_model_finds_its_mask_anew(name):
    recipe = replace(RECIPE, pruning=PRUNINGS[name])
    trained, tally = train(recipe, RECORDS), Tally()
    result = Retrain()(trained, RECORDS, Request.remove(FORGET), rng=generator(0), tally=tally)
    scratch = train(recipe, RECORDS.without(FORGET))
    assert result.trained.digest() == scratch.digest()
    assert (result.claim, result.exactness, result.trained.standing) == (Claim.EXACT, "pathwise", Claim.EXACT)
    assert result.cost.gradients == EPOCHS[name] * 50
    knows = recipe.pruning.by == "magnitude"
    assert same(zeros_of(result.trained), zeros_of(trained)) != knows


@pytest.mark.parametrize("choice", [Pruning(sparsity=0.9, rounds=2, rewind=1), PRUNINGS["synflow"]])
def test_retraining_a_pruned_model_keeps_to_the_contract(choice):
    given = digits()
    recipes = (replace(given.recipes[0], epochs=8, pruning=choice),)
    case = Case(records=given.records, test=given.test, request=given.request, recipes=recipes)
    report = conformance(Retrain(), case=case, seeds=range(3))
    assert report.passed, report
    assert report["exact-equals-scratch"].why.startswith("the bytes are those")


def test_a_retraining_that_reuses_the_mask_is_caught(sparse):
    """The liar: the mask of all rows, on the rows that stay."""
    module = build(sparse.recipe)
    mask = Mask(mask_of_zeros(sparse.module).moves)
    retain = RECORDS.without(FORGET)
    start = fit(copy.deepcopy(module), sparse.recipe, retain, stage="dense", mark=STEPS).checkpoints[STEPS]
    module.load_state_dict(start)
    mask.prune_(module)
    fit(module, sparse.recipe, retain, stage="sparse-1", begin=1, epochs=3, mask=mask)
    assert not same(module.state_dict(), train(sparse.recipe, retain).module.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRUNINGS)
def test_pruned_training_on_a_gpu_gives_the_same_bytes_twice(name):
    recipe = replace(RECIPE, dtype="float32", pruning=PRUNINGS[name])
    one, two = (train(recipe, RECORDS.to("cuda")) for _ in range(2))
    assert one.digest() == two.digest()
    assert mask_of_zeros(one.module).held == round(recipe.pruning.sparsity * PRUNABLE)
