"""All that a training depends on besides the records."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

from expunge.core.coins import bucket, seed_of
from expunge.core.digest import canonical_json
from expunge.core.errors import BadRecipe, BadRecords, UnreadableFile
from expunge.core.records import Records

Json = Mapping[str, Any]
_EMPTY: Json = MappingProxyType({})
LOSSES = ("cross_entropy", "mse")
OPTIMISERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"sgd": ("lr", "momentum", "nesterov"), "adam": ("lr", "betas", "eps")}
)
SCHEDULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"constant": (), "cosine": ("floor",), "steps": ("at", "factor"), "linear": ("floor",)}
)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a SISA model is cut up (Bourtoule et al., 2021): shards, slices within them, and how they vote.

    The shard of a row is a function of its owner and the salt; its slice too. Neither knows any other row. An owner
    lies in one slice of one shard, so that leaving costs one shard's training from that slice on.

    Attributes:
        shards: number of models trained apart.
        slices: each shard trains on slice 0, then 0 and 1, and so on, with a checkpoint after each.
        salt: what the assignment is keyed with; empty means derived from the recipe's seed.
        aggregate: ``vote`` (each shard one equal vote, ties to the lowest class) or ``mean`` (mean probability).
    """

    shards: int
    slices: int = 1
    salt: str = ""
    aggregate: Literal["vote", "mean"] = "vote"

    def __post_init__(self) -> None:
        if not (_is_whole(self.shards) and _is_whole(self.slices)) or self.shards < 1 or self.slices < 1:
            raise BadRecipe(f"shards and slices must be integers >= 1, got {self.shards} and {self.slices}")
        if not isinstance(self.salt, str):
            raise BadRecipe(f"salt must be text, got {self.salt!r}")
        if self.aggregate not in ("vote", "mean"):
            raise BadRecipe(f'aggregate must be "vote" or "mean", got "{self.aggregate}"')

    def shard_of(self, owner: str) -> int:
        """The shard of everything this owner holds."""
        return bucket(f"{self.salt}/shard", owner, self.shards)

    def slice_of(self, owner: str) -> int:
        """The slice, within its shard, of everything this owner holds."""
        return bucket(f"{self.salt}/slice", owner, self.slices)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How a model is made sparse, as part of its training: so that retraining finds its mask anew.

    Of n prunable weights (those of convolutions and linear layers but the head, over all layers together) exactly
    ``round(sparsity * n)`` are zero, but never all. By magnitude or at random a whole layer may be lost.

    Attributes:
        sparsity: share of the prunable weights that are zero.
        by: ``magnitude``: train, keep the largest weights, rewind what is left and train again (one round: one-shot
            magnitude pruning; more: iterative, each taking the same share of what is left; Frankle et al., 2020).
            ``synflow`` (Tanaka et al., 2020) or ``random``: choose before training, without any data.
        rounds: of magnitude pruning, each a training.
        rewind: epoch of the first training whose weights magnitude pruning goes back to, and from which on the later
            trainings go on; 0 is the beginning, and the last epoch prunes what is trained without training on.
        iterations: rounds of scoring of synflow.
    """

    sparsity: float
    by: Literal["magnitude", "synflow", "random"] = "magnitude"
    rounds: int = 1
    rewind: int = 0
    iterations: int = 100

    def __post_init__(self) -> None:
        checks = [
            (_is_number(self.sparsity) and 0 < self.sparsity < 1, f"sparsity must be > 0 and < 1, got {self.sparsity}"),
            (
                self.by in ("magnitude", "synflow", "random"),
                f'pruning is by magnitude, synflow or random, got "{self.by}"',
            ),
            (_is_whole(self.rounds) and self.rounds >= 1, f"rounds must be an integer >= 1, got {self.rounds}"),
            (_is_whole(self.rewind) and self.rewind >= 0, f"rewind must be an epoch >= 0, got {self.rewind}"),
            (
                _is_whole(self.iterations) and self.iterations >= 1,
                f"iterations must be an integer >= 1, got {self.iterations}",
            ),
            (
                self.by == "magnitude" or (self.rounds, self.rewind) == (1, 0),
                f"rounds and rewind are of pruning by magnitude; leave them out of {self.by}",
            ),
            (
                self.by == "synflow" or self.iterations == 100,
                f"iterations are of pruning by synflow; leave them out of {self.by}",
            ),
        ]
        for fine, message in checks:
            if not fine:
                raise BadRecipe(message)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a training depends on besides the records. Frozen, hashable, JSON both ways.

    The objective is the mean of the rows' losses plus ``weight_decay / 2 * ||w||^2`` over all parameters.
    The learning rate is a function of the epoch alone, never of the number of rows, so that no removed row is
    remembered by the schedule.

    Attributes:
        model: a name of `expunge.learn.models` or code as ``package.module:callable`` (needs leave to run).
        model_args: its arguments. `shape` and `outputs` are filled in from the first records and stay.
        loss: ``cross_entropy`` or ``mse``.
        optimiser: ``sgd`` (lr, momentum, nesterov) or ``adam`` (lr, betas, eps).
        optimiser_args: its arguments; `lr` is needed.
        schedule: ``{"kind": "constant"}``, ``{"kind": "cosine", "floor": 0}``, ``{"kind": "linear", "floor": 0}`` or
            ``{"kind": "steps", "at": [5, 8], "factor": 0.1}``: a factor on `lr`, by epoch.
        epochs: passes over the rows.
        batch_size: rows a step; the last, smaller batch of an epoch is a step too.
        weight_decay: L2 penalty, in units of the mean loss.
        seed: start of all coins: initial weights, order of rows, dropout.
        dtype: ``float32`` or ``float64``.
        sharding: None for one model.
        pruning: None for a dense model.
        max_norm: radius of the L2 ball about zero that training keeps the vector of all trained parameters in, by
            projecting it there at the start and after every step; None for no bound.
    """

    model: str
    model_args: Json = field(default_factory=dict)
    loss: str = "cross_entropy"
    optimiser: str = "sgd"
    optimiser_args: Json = field(default_factory=lambda: {"lr": 0.05, "momentum": 0.9})
    schedule: Json = field(default_factory=lambda: {"kind": "constant"})
    epochs: int = 10
    batch_size: int = 64
    weight_decay: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    sharding: Sharding | None = None
    pruning: Pruning | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("model_args", "optimiser_args", "schedule"):
            if not isinstance(getattr(self, name), Mapping):
                raise BadRecipe(f"{name} must be a mapping, got {getattr(self, name)!r}")
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        object.__setattr__(self, "sharding", _nested(Sharding, self.sharding))
        object.__setattr__(self, "pruning", _nested(Pruning, self.pruning))
        for problem in (*self._problems(), *self._problems_of_optimiser(), *self._problems_of_schedule()):
            raise BadRecipe(problem)
        try:
            self.digest()
        except (TypeError, ValueError) as error:
            raise BadRecipe(f"a recipe holds plain JSON values only: {error}") from None

    def _problems(self) -> list[str]:
        decay, radius = self.weight_decay, self.max_norm
        checks = [
            (isinstance(self.model, str) and self.model != "", f"model must be a name, got {self.model!r}"),
            (self.loss in LOSSES, f'loss must be one of {", ".join(LOSSES)}, got "{self.loss}"'),
            (_is_whole(self.epochs) and self.epochs >= 0, f"epochs must be an integer >= 0, got {self.epochs}"),
            (_is_whole(self.batch_size) and self.batch_size >= 1, f"batch_size must be >= 1, got {self.batch_size}"),
            (_is_number(decay) and 0 <= decay < math.inf, f"weight_decay must be >= 0, got {decay}"),
            (_is_whole(self.seed), f"seed must be an integer, got {self.seed!r}"),
            (self.dtype in ("float32", "float64"), f'dtype must be float32 or float64, got "{self.dtype}"'),
            (
                radius is None or (_is_number(radius) and 0 < radius < math.inf),
                f"max_norm must be > 0, or None for no bound, got {radius}",
            ),
            (self.sharding is None or self.pruning is None, "shards cannot be pruned; give sharding or pruning"),
            (
                self.pruning is None or self.pruning.rewind <= self.epochs,
                f"rewind must be at most the {self.epochs} epochs trained, got {self.pruning and self.pruning.rewind}",
            ),
        ]
        return [message for fine, message in checks if not fine]

    def _problems_of_optimiser(self) -> list[str]:
        args = self.optimiser_args
        if self.optimiser not in tuple(OPTIMISERS):
            return [f'optimiser must be one of {", ".join(OPTIMISERS)}, got "{self.optimiser}"']
        lr, momentum, betas, eps = (args.get(name) for name in ("lr", "momentum", "betas", "eps"))
        pair = isinstance(betas, tuple) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
        checks = [
            (_is_number(lr) and 0 < lr < math.inf, f"optimiser_args needs lr > 0, got {lr}"),
            (
                momentum is None or (_is_number(momentum) and 0 <= momentum < 1),
                f"need 0 <= momentum < 1, got {momentum}",
            ),
            (not args.get("nesterov") or bool(momentum), "nesterov needs momentum > 0; add it, or leave nesterov out"),
            (betas is None or pair, f"betas must be two numbers with 0 <= beta < 1, got {betas}"),
            (eps is None or (_is_number(eps) and 0 <= eps < math.inf), f"eps must be >= 0, got {eps}"),
        ]
        unknown = _unknown(self.optimiser, args, OPTIMISERS, "optimiser_args")
        return unknown + [message for fine, message in checks if not fine]

    def _problems_of_schedule(self) -> list[str]:
        kind = self.schedule.get("kind", "")
        if kind not in tuple(SCHEDULES):
            return [f'schedule kind must be one of {", ".join(SCHEDULES)}, got "{kind}"']
        at, floor, factor = (
            self.schedule.get("at", ()),
            self.schedule.get("floor", 0.0),
            self.schedule.get("factor", 0.1),
        )
        checks = [
            (kind != "steps" or "at" in self.schedule, 'schedule "steps" needs "at", the epochs to step at'),
            (isinstance(at, tuple) and all(map(_is_whole, at)), f'schedule "at" must be a list of epochs, got {at}'),
            (_is_number(floor) and 0 <= floor <= 1, f"schedule floor must lie between 0 and 1, got {floor}"),
            (_is_number(factor) and 0 < factor < math.inf, f"schedule factor must be > 0, got {factor}"),
        ]
        settings = {name: value for name, value in self.schedule.items() if name != "kind"}
        return _unknown(kind, settings, SCHEDULES, "schedule") + [message for fine, message in checks if not fine]

    def __eq__(self, other: object) -> bool:
        return self.digest() == other.digest() if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Recipe.from_json, (self.to_json(),))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def lr_factor(self, epoch: int) -> float:
        """What the learning rate is multiplied with in this epoch (0-based)."""
        kind, share = self.schedule["kind"], epoch / max(self.epochs, 1)
        floor = self.schedule.get("floor", 0.0)
        if kind == "cosine":
            return float(floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)
        if kind == "linear":
            return float(floor + (1 - floor) * (1 - share))
        if kind == "steps":
            return float(self.schedule.get("factor", 0.1) ** sum(epoch >= at for at in self.schedule["at"]))
        return 1.0

    def completed(self, records: Records) -> Recipe:
        """This recipe with `shape` and `outputs` of the model and the salt of the shards filled in.

        They are taken from the declared number of classes, not from the labels present, and stay for good: removing
        all rows of a class does not change them.

        Raises:
            BadRecords: if the records do not fit a recipe that is complete already.
        """
        expected: dict[str, Any] = {"shape": tuple(records.shape), "outputs": _outputs(self, records)}
        for name, value in expected.items():
            asked = self.model_args.get(name, value)
            spare_classes = name == "outputs" and records.classes is not None and asked > value
            if asked != value and not spare_classes:
                raise BadRecords(f"the recipe's model has {name} {asked}, but the records have {value}; train anew")
        sharding = self.sharding
        if sharding is not None and not sharding.salt:
            sharding = replace(sharding, salt=f"{seed_of(self.seed, 'salt'):016x}")
        return replace(self, model_args={**expected, **self.model_args}, sharding=sharding)

    def staged(self, epochs: int) -> Recipe:
        """This recipe over another number of epochs, its schedule stretched to reach its end there."""
        schedule = dict(self.schedule)
        if schedule["kind"] == "steps":
            schedule["at"] = [round(at * epochs / max(self.epochs, 1)) for at in schedule["at"]]
        return replace(self, epochs=epochs, schedule=schedule)

    def part(self, shard: int) -> Recipe:
        """The recipe of one shard: the same with a seed that is a function of salt and shard, and no sharding."""
        if self.sharding is None:
            raise BadRecipe("only a sharded recipe has parts; this one has none")
        return replace(self, seed=seed_of(self.seed, self.sharding.salt, "part", shard), sharding=None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives the same recipe back."""
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        if self.sharding is not None:
            data["sharding"] = asdict(self.sharding)
        if self.pruning is None:
            del data["pruning"]  # dense recipes keep the digest that they had before there was pruning
        else:
            data["pruning"] = asdict(self.pruning)
        if self.max_norm is None:
            del data["max_norm"]  # as with pruning
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            BadRecipe: for a key that recipes do not have, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise BadRecipe(f'a recipe has no "{name}"; it has {", ".join(sorted(known))}')
        if "model" not in data:
            raise BadRecipe('a recipe needs "model", for example "mlp"')
        return cls(**data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file; UnreadableFile if it is none."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnreadableFile(
                f"{path} cannot be read as a JSON recipe ({error}); see: expunge train --help"
            ) from None
        if not isinstance(data, dict):
            raise UnreadableFile(f"{path} holds {type(data).__name__} where a recipe is a JSON object")
        return cls.from_json(data)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nested(kind: type[Any], value: Any) -> Any:
    """A part of a recipe, from the mapping that stands for it in JSON."""
    if value is None or isinstance(value, kind):
        return value
    try:
        return kind(**value)
    except TypeError:
        names = ", ".join(f.name for f in fields(kind))
        raise BadRecipe(f"{kind.__name__.lower()} must be a mapping with {names}, got {value!r}") from None


def _outputs(recipe: Recipe, records: Records) -> int:
    if recipe.loss == "mse":
        if records.classes is not None:
            raise BadRecords("loss mse needs float targets, but the labels are classes; use cross_entropy")
        return 1 if records.y.dim() == 1 else int(records.y.shape[1])
    if records.classes is None:
        raise BadRecords("loss cross_entropy needs integer classes, but the targets are floats; use mse")
    return records.classes


def _unknown(kind: str, given: Json, known: Mapping[str, tuple[str, ...]], where: str) -> list[str]:
    if kind not in known:
        return []
    extra = sorted(set(given) - set(known[kind]))
    names = ", ".join(known[kind]) or "no settings"
    return [f'{where} of "{kind}" has no "{extra[0]}"; it knows {names}'] if extra else []


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({name: _frozen(inner) for name, inner in value.items()})
    return tuple(_frozen(inner) for inner in value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
