"""The settings of a study: what is compared, on what, and how hyper-parameters are found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from expunge.core.coins import seed_of
from expunge.core.errors import Misuse
from expunge.core.recipe import Pruning, Recipe
from expunge.core.records import Records, seal
from expunge.learn.loop import NOTHING, Keep
from expunge.study.scenario import Scenario
from expunge.study.search import Choice, Log, settings_of, space_of
from expunge.unlearn.method import Method

ORIGINAL, RETRAIN, FLOOR = "original", "retrain", "(retrain, other coins)"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Methods by scenarios by sparsities by seeds.

    Attributes:
        recipe: of a dense, single model; its seed is replaced by each of `seeds`.
        methods: what is compared, named by their `name`; or a mapping from other names.
        scenarios: what is forgotten, as `Scenario` or its text.
        sparsities: share of the prunable weights that are zero; 0 is the recipe as it is.
        seeds: a replica each: its own training and its own draw of random rows.
        by: how sparse models are pruned; see `expunge.core.recipe.Pruning`.
        rewind: the epoch that magnitude pruning goes back to.
        rounds: of magnitude pruning.
        trials: settings that are tried for each method, sparsity and scenario, the given ones first. 1: no search.
        criterion: what the search makes small: ``validation`` (see `search.Goal`; looks at no retrained model) or
            ``oracle`` (the mean gap to a retrained model, which nobody has who needs a quicker method).
        validation: share of the test rows that the search looks at, and that no figure is measured on.
        search_seed: of the search's own replica, which is never measured; None: one below all of `seeds`.
        equal_compute: beside each method, retraining that stops after as many ``seconds`` or row ``gradients``; None:
            without. Seconds differ from run to run, and the figures of that row with them.
        floor: measure retraining with other coins too: how far apart two exact retrainings are.
        keep: what the originals' training leaves behind, for methods that need it.
    """

    recipe: Recipe
    methods: Sequence[Method] | Mapping[str, Method]
    scenarios: Sequence[Scenario | str]
    sparsities: Sequence[float] = (0.0,)
    seeds: Sequence[int] = (0, 1, 2)
    by: Literal["magnitude", "synflow", "random"] = "magnitude"
    rewind: int = 0
    rounds: int = 1
    trials: int = 1
    criterion: Literal["validation", "oracle"] = "validation"
    validation: float = 0.2
    search_seed: int | None = None
    equal_compute: Literal["seconds", "gradients"] | None = "seconds"
    floor: bool = False
    keep: Keep = NOTHING

    def __post_init__(self) -> None:
        for problem in _of_wrong_type(self):
            raise Misuse(problem)
        given = self.methods
        named = given if isinstance(given, Mapping) else _by_name(given)
        object.__setattr__(self, "methods", dict(named))
        scenarios = (Scenario.parse(one) if isinstance(one, str) else one for one in self.scenarios)
        object.__setattr__(self, "scenarios", tuple(scenarios))
        object.__setattr__(self, "sparsities", tuple(map(float, self.sparsities)))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if self.search_seed is None:
            object.__setattr__(self, "search_seed", min(self.seeds, default=0) - 1)
        for problem in self._problems():
            raise Misuse(problem)
        for sparsity in self.sparsities:
            self.recipe_of(sparsity, self.seeds[0])

    def _problems(self) -> list[str]:
        names = [scenario.name for scenario in self.chosen_scenarios]
        listed = {"scenarios": names, "sparsities": self.sparsities, "seeds": self.seeds}
        reserved = {ORIGINAL, RETRAIN, FLOOR} & set(self.named)
        checks = [
            (bool(self.named), "a study needs methods, got none; name at least one"),
            *((bool(values), f"a study needs {what}, got none") for what, values in listed.items()),
            *(
                (len(set(values)) == len(values), f"{what} must differ, got {', '.join(map(str, values))}")
                for what, values in listed.items()
            ),
            (all(0 <= s < 1 for s in self.sparsities), f"sparsities must be >= 0 and < 1, got {self.sparsities}"),
            (not reserved, f"a row called {', '.join(reserved)} is always there; leave it out, or name it otherwise"),
            (self.recipe.sharding is None, "a study compares single models; leave shards out of the recipe"),
            (self.recipe.pruning is None, "leave pruning out of the recipe, and name the sparsities"),
            (self.recipe.loss == "cross_entropy", "a study is of classifiers: its figures are accuracies"),
            (isinstance(self.trials, int) and self.trials >= 1, f"trials must be an integer >= 1, got {self.trials}"),
            (
                self.criterion in ("validation", "oracle"),
                f'the criterion is validation or oracle, got "{self.criterion}"',
            ),
            (0 < self.validation < 1, f"validation must be a share > 0 and < 1, got {self.validation}"),
            (self.search_seed not in self.seeds, f"search_seed must not be one of the seeds, got {self.search_seed}"),
            (
                self.equal_compute in ("seconds", "gradients", None),
                f'equal_compute is seconds, gradients or None, got "{self.equal_compute}"',
            ),
        ]
        return [message for fine, message in checks if not fine]

    @property
    def named(self) -> Mapping[str, Method]:
        """The methods by their names."""
        return self.methods  # type: ignore[return-value]

    @property
    def chosen_scenarios(self) -> tuple[Scenario, ...]:
        """The scenarios, those given as text included."""
        return self.scenarios  # type: ignore[return-value]

    def recipe_of(self, sparsity: float, seed: int) -> Recipe:
        """How the original of this sparsity and seed is trained."""
        pruning = None
        if sparsity:
            pruning = Pruning(sparsity=sparsity, by=self.by, rewind=self.rewind, rounds=self.rounds)
        return replace(self.recipe, seed=seed, pruning=pruning)

    def trials_of(self, name: str) -> int:
        """How many trials the search makes for this method: all have the same, but those with nothing to search."""
        return self.trials if self.trials > 1 and space_of(self.named[name]) else 0

    def held_out(self, test: Records | None) -> tuple[Records | None, Records | None]:
        """Test rows for the search, and those for the figures; the same whatever the order of the rows.

        Raises:
            Misuse: if there is a search, and not a row for each side.
        """
        if self.trials == 1:
            return None, test
        count = round(self.validation * len(test)) if test is not None else 0
        if test is None or not 0 < count < len(test):
            raise Misuse("the search for settings looks at test rows that are set aside; give test rows, or trials=1")
        drawn = sorted(test.ids, key=lambda one: (seed_of("validation", one), one))
        aside = frozenset(drawn[:count])
        return test.where(lambda one, _: one in aside), test.where(lambda one, _: one not in aside)

    def about(self, records: Records, test: Records | None) -> dict[str, Any]:
        """All that decides the figures, as plain JSON values: the settings, and digests of the rows."""
        plain = ("by", "rewind", "rounds", "trials", "criterion", "validation", "search_seed", "equal_compute", "floor")
        settings: dict[str, Any] = {name: getattr(self, name) for name in plain}
        recipe = {name: value for name, value in self.recipe.to_json().items() if name not in ("seed", "pruning")}
        settings |= {"sparsities": list(self.sparsities), "seeds": list(self.seeds), "recipe": recipe}
        settings["methods"] = {name: settings_of(one, name) for name, one in self.named.items()}
        settings["scenarios"] = {one.name: one.to_json() for one in self.chosen_scenarios}
        settings["keep"] = asdict(self.keep)
        settings["searched"] = {
            name: {field: _span(span) for field, span in space_of(one).items()}
            for name, one in self.named.items()
            if self.trials > 1
        }
        return {"settings": settings, "records": _digest(records), "test": None if test is None else _digest(test)}


def _of_wrong_type(study: Study) -> list[str]:
    """What cannot be read as methods, scenarios and numbers at all."""
    lists = {"scenarios": '("class:3",)', "sparsities": "(0, 0.9)", "seeds": "(0, 1, 2)"}
    values = {name: getattr(study, name) for name in lists}
    problems = [
        f"{name} must be a sequence, got {value!r}; give one, as {lists[name]}"
        for name, value in values.items()
        if isinstance(value, (str, Scenario)) or not isinstance(value, Collection)
    ]
    methods: Any = study.methods
    if isinstance(methods, (str, Method)) or not isinstance(methods, Collection):
        return [*problems, f"methods must be a sequence or a mapping, got {methods!r}; give one, as (FineTune(),)"]
    named = methods.values() if isinstance(methods, Mapping) else methods
    problems += [
        f"methods must be methods, got {one!r}; give one, as FineTune()" for one in named if not isinstance(one, Method)
    ]
    if not problems:
        texts = [one for one in values["scenarios"] if not isinstance(one, (str, Scenario))]
        problems = [f"scenarios must be Scenario or text, got {one!r}; give one, as class:3" for one in texts]
    return problems


def _by_name(methods: Sequence[Method]) -> dict[str, Method]:
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise Misuse(f"two methods have the same name, got {', '.join(names)}; give a mapping with names of your own")
    return dict(zip(names, methods, strict=True))


def _span(span: Log | Choice) -> list[Any]:
    return ["log-uniform", span.low, span.high] if isinstance(span, Log) else ["one of", *span.values]


def _digest(records: Records) -> dict[str, Any]:
    return {"rows": len(records), "digest": seal(records, salt="study")}
