"""docs/sparsity.md, written from finished cells: the tables, and each claim of the paper beside its figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from expunge.core.estimate import Estimate, mean
from expunge.study import Cell, Study, StudyResult

COLUMNS = (
    ("unlearning_accuracy", "UA", 100),
    ("efficacy", "MIA-eff.", 100),
    ("retain", "RA", 100),
    ("test", "TA", 100),
    ("gap", "gap", 100),
    ("tug_of_war", "ToW", 1),
    ("seconds", "seconds", 1),
    ("over_yardstick", "gap - yardstick's", 100),
)
NARROWED = ("fine-tune", "gradient-ascent", "fisher-forgetting", "influence-unlearning")
HEAD = """# Does sparsity simplify unlearning?

Written by `python benchmarks/sparsity.py --page` from the cells in `benchmarks/results`; nothing here is typed in.
The question and its first answer are those of Jia et al., *Model sparsity can simplify machine unlearning* (NeurIPS
2023), who used ResNet-18 on CIFAR-10. The data here are others, so that no figure can be compared with theirs, only
the direction.

Every method is at its defaults. They were chosen on the suite's small case, some of them (influence, SCRUB, boundary
shrink, SSD, unrolling) also with a look at MNIST, none by this table; `expunge compare --trials` searches them, with
as many trials for each. UA: unlearning accuracy, the share of forgotten rows answered wrongly; MIA-eff.: the share of
them that a confidence threshold, fitted on retained against test rows, takes for strangers; RA, TA: accuracy on
retained and test rows; all in percent. gap: mean absolute difference to exact retraining over accuracies and attack,
in points. ToW: tug-of-war, 1 at retraining. gap - yardstick's: the same gap less that of retraining that stops after
as many seconds; above zero, the method was not worth its time. Intervals: 95 %, Student's t over seeds; of a single
seed, over rows where there is one. Retraining a pruned model finds its mask anew, without the forgotten rows. Seconds
were taken on two cores that other work may have shared.
"""


def write_page(studies: Mapping[str, tuple[Study, str]], results: Path, page: Path) -> None:
    """Write the page from whatever is finished."""
    found = {name: result for name in studies if (result := finished(results / name)) is not None}
    lines = [HEAD, *_claims(found), *_proposition(results / "proposition"), *_backdoor(results / "backdoor")]
    for name, (study, data) in studies.items():
        lines += _part(study, data, found.get(name))
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def finished(folder: Path) -> StudyResult | None:
    """What there is of a study so far; None if nothing."""
    return StudyResult.read(folder) if (folder / "study.json").exists() else None


def _part(study: Study, data: str, result: StudyResult | None) -> Iterator[str]:
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
    yield f"## {study.recipe.model} on {data}, {study.recipe.epochs} epochs, {seeds}\n"
    table = () if result is None else result.table()
    for scenario in study.chosen_scenarios:
        for sparsity in study.sparsities:
            lines = [line for line in table if (line.sparsity, line.scenario) == (sparsity, scenario.name)]
            yield f"### {scenario.name}, {'dense' if not sparsity else f'{sparsity:.0%} sparse'}\n"
            if not lines:
                yield "Not measured.\n"
                continue
            yield "| method | seeds | " + " | ".join(title for _, title, _ in COLUMNS) + " |"
            yield "|---|---|" + "---|" * len(COLUMNS)
            for line in lines:
                cells = [_cell(line.figures.get(key), factor) for key, _, factor in COLUMNS]
                yield f"| {line.method} | {line.seeds} of {line.of} | " + " | ".join(cells) + " |"
            missing = {one: "not done yet" for one in study.named if one not in {line.method for line in lines}}
            missing |= {line.method: "; ".join(line.why) for line in lines if line.why}
            told = "".join(f"\n- Not measured: {method}: {why}." for method, why in missing.items())
            yield f"{told}\n"


def _cell(value: Estimate | float | None, factor: float) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, Estimate):
        return f"{factor * value.value:.2f} ({factor * value.low:.2f} to {factor * value.high:.2f})"
    return f"{factor * value:.2f}"


def _claims(found: Mapping[str, StudyResult]) -> Iterator[str]:
    yield "## The paper's claims, on our data\n"
    yield "Differences are taken seed by seed. A claim holds where the whole interval is on its side.\n"
    yield "| claim | model | scenario | difference, points | verdict |"
    yield "|---|---|---|---|---|"
    for name, result in found.items():
        scenarios = list(result.about["settings"]["scenarios"])
        for scenario in scenarios:
            for method in NARROWED:
                differences = [a - b for a, b in _pairs(result, scenario, (0.0, method), (0.95, method), _gap)]
                yield _verdict(f"95 % sparsity narrows the gap of {method}", name, scenario, differences)
            lifted = [a - b for a, b in _pairs(result, scenario, (0.0, "l1-sparse"), (0.0, "fine-tune"), _accuracy)]
            yield _verdict("l1-sparse lifts the UA of fine-tuning", name, scenario, lifted)
    yield ""


def _verdict(claim: str, name: str, scenario: str, differences: list[float]) -> str:
    if not differences:
        return f"| {claim} | {name} | {scenario} | not measured | |"
    one = mean([100 * value for value in differences])
    if len(differences) == 1:
        return f"| {claim} | {name} | {scenario} | {one.value:.2f} (one seed) | not decided by one seed |"
    verdict = "holds" if one.low > 0 else "does not hold" if one.high < 0 else "not decided"
    return f"| {claim} | {name} | {scenario} | {one:.2f} | {verdict} |"


def _pairs(
    result: StudyResult, scenario: str, left: tuple[float, str], right: tuple[float, str], figure: Any
) -> list[tuple[float, float]]:
    """The figure of two models in the seeds where both were measured."""
    cells = {cell.key: cell for cell in result.cells}
    found = []
    for seed in result.about["settings"]["seeds"]:
        both = [figure(cells, sparsity, scenario, seed, method) for sparsity, method in (left, right)]
        if None not in both:
            found.append((both[0], both[1]))
    return found


def _row(cells: Mapping[Any, Cell], *key: Any) -> Any:
    cell = cells.get(("cell", *key))
    return None if cell is None else cell.row


def _gap(cells: Mapping[Any, Cell], sparsity: float, scenario: str, seed: int, method: str) -> float | None:
    row = _row(cells, sparsity, scenario, seed, "method", method)
    full = _row(cells, sparsity, scenario, seed, "retrain", "retrain")
    return None if row is None or full is None else float(row.mean_gap(full))


def _accuracy(cells: Mapping[Any, Cell], sparsity: float, scenario: str, seed: int, method: str) -> float | None:
    row = _row(cells, sparsity, scenario, seed, "method", method)
    return None if row is None else float(row.unlearning_accuracy.value)


def _proposition(folder: Path) -> Iterable[str]:
    path = folder / "summary.json"
    yield "## Proposition 2: the error of gradient ascent falls with the density of the mask\n"
    if not path.exists():
        yield "Not measured.\n"
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    yield (
        "MLP on full MNIST, pruned by synflow, plain SGD, 5 epochs, 10 % of the rows forgotten. error: distance of the "
        "parameters after gradient ascent to retraining with the same mask. before: that of the model as it was, so "
        "that a share of 1 means that ascent brought nothing. bound: the paper's, up to its constant.\n"
    )
    names = ("error", "before", "share_left", "moved", "sigma", "bound")
    yield "| sparsity | " + " | ".join(name.replace("_", " ") for name in names) + " |"
    yield "|---|" + "---|" * len(names)
    for line in found["points"]:
        yield f"| {line['sparsity']:.0%} | " + " | ".join(_figure(line[name]) for name in names) + " |"
    yield (
        f"\nRank correlation over the six sparsities, mean over seeds: error with density "
        f"{_figure(found['error_with_density'])}, error with bound {_figure(found['error_with_bound'])}.\n"
    )


def _backdoor(folder: Path) -> Iterable[str]:
    path = folder / "summary.json"
    yield "## Removing a backdoor\n"
    if not path.exists():
        yield "Not measured.\n"
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    yield (
        f"LeNet on full MNIST, 3 epochs, pruned by {found['by']}; a patch on 5 % of the rows of other classes, "
        f"which are then to be unlearned. {found['trials_per_sparsity']} trials of settings at each sparsity, all "
        "recorded in `cells.jsonl`, on one model and half of the test images; the best settings of each method "
        "were then measured on three other seeds and the other half. attack: share of stamped test images of "
        "other classes that are taken for the target class; floor: the same without the stamp. Images of the "
        f"target class count for neither. Methods read all poisoned rows and {found['reads']:,} of the retained "
        "ones.\n"
    )
    yield "| sparsity | model | test, % | attack, % | floor, % | attack less retraining's, points |"
    yield "|---|---|---|---|---|---|"
    for line in found["table"]:
        figures = [*(_interval(line[name], share=True) for name in ("test", "attack", "floor"))]
        figures += [_interval(line["attack_gap"])]
        yield f"| {line['sparsity']:.0%} | {line['model']} | " + " | ".join(figures) + " |"
    yield "\nScore: test accuracy less attack success, of the search's winner, on the fresh seeds, in points.\n"
    yield "| sparsity | winner | score | less the dense winner's | does sparsity help? |"
    yield "|---|---|---|---|---|"
    for sparsity, one in found["sparsities"].items():
        against = _interval(one["against_dense"]) if one["against_dense"] else ""
        yield f"| {float(sparsity):.0%} | {one['winner']} | {_interval(one['score'])} | {against} | {one['verdict']} |"
    yield (
        "\nThe intervals of the last column but one hold together with 95 % (Bonferroni). They judge what the search "
        "found, not sparsity alone: settings at the edge of divergence win on one model and fail on others.\n"
    )


def _interval(data: Mapping[str, float], *, share: bool = False) -> str:
    """In percent or points; a share's interval is cut to what a share can be."""
    low, high = (max(data["low"], 0.0), min(data["high"], 1.0)) if share else (data["low"], data["high"])
    return f"{100 * data['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _figure(value: Mapping[str, float]) -> str:
    if "low" not in value:
        return f"{value['mean']:.3g}"
    return f"{value['mean']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
