"""The matrix of providers and verifiers as people read it, with what nobody catches said first."""

from __future__ import annotations

import math
from collections.abc import Iterable

from expunge.report.page import Chapter, Grid, Report
from expunge.study.verification import Cell, Matrix
from expunge.study.verification_parties import CLASSIC

_NOTES = (
    "Of a provider that cheats: caught, missed or undecided; of an honest one: passes, ACCUSED or undecided; with the "
    "number of seeds where there are several. backdoor: owners ask for their secret triggers. replay: the transcript "
    "is replayed, and the batches are left to the provider. loose: the same where every difference is allowed. "
    "sampler: each epoch must use each row once. public coin: every random choice must follow from a nonce drawn after "
    "all rows were committed to. served alike: a stranger asks. data audit: near copies of forgotten rows are looked "
    "for among those that stay. power: what the verifier computed to be its chance, at least, to catch who goes on "
    "serving the model before, the least of these seeds; of an undecided cell it was too small for a pass. caught by: "
    "verifiers that found it in every seed that they tried."
)
_NOT_IN_IT = (
    "No verifier looks at what is kept beside the served model: the rows, the old model, its transcript. Who retrains "
    "honestly and keeps them passes everything. Nor is there one for who asks again until a coin suits it (tries are "
    "counted), an initialisation that was contaminated before, drift within the tolerance, and imitations of rows that "
    "are no near copies: docs/verify.md."
)


def matrix_grid(found: Matrix) -> Grid:
    """A line for each provider, a column for each verifier."""
    return Grid(
        caption=f"Providers and verifiers, {_seeds(found.seeds)}, {found.about['rows']:,} rows",
        headers=("provider", *found.verifiers, "caught by"),
        rows=tuple(_row(found, name) for name in found.providers),
        words=1,
        notes=_NOTES,
    )


def _row(found: Matrix, provider: str) -> tuple[str, ...]:
    honest = provider in found.honest
    cells = [said(found.cell(provider, name), honest, found.seeds) for name in found.verifiers]
    return (provider, *cells, "(honest)" if honest else _caught_by(found, provider))


def _caught_by(found: Matrix, provider: str) -> str:
    names = found.caught_by(provider)
    if provider in found.untried:
        return "(not tried)"
    if found.escapes(provider):
        return f"NOBODY in {found.escapes(provider)} of {found.seeds}"
    if not names:
        return "several, none always"
    return f"{names[0]} only" if len(names) == 1 else f"{len(names)} of {len(found.verifiers)}"


def said(cell: Cell, honest: bool, seeds: int) -> str:
    """One cell in a word or two, with the power of who catches or cannot decide, where it is known."""
    words = ("ACCUSED", "passes") if honest else ("caught", "missed")
    names, counts = (*words, "undecided", "not tried"), (cell.caught, cell.passed, cell.inconclusive, cell.untried)
    powers = (_power(cell.power_caught), "", _power(cell.power_undecided), "")
    told = [(word, count, power) for word, count, power in zip(names, counts, powers, strict=True) if count]
    if len(told) == 1 and seeds == 1:
        return told[0][0] + told[0][2]
    return ", ".join(f"{word} {count}{power}" for word, count, power in told)


def _power(power: float | None) -> str:
    return "" if power is None else f" (power {math.floor(1000 * power) / 1000:.3f})"


def worth_grid(found: Matrix) -> Grid:
    """What each verifier is worth: one that always says the same is worth nothing, and shows here."""
    rows = []
    for name in found.verifiers:
        always = [who for who in found.cheats if name in found.caught_by(who)]
        wrong = found.accusations([name])
        share = "no honest provider" if wrong is None else f"{wrong:.0%}"
        rows.append((name, found.worth(name), f"{len(always)} of {len(found.cheats)}", share))
    return Grid(
        caption="What each verifier is worth",
        headers=("verifier", "is it", "cheats caught", "honest runs accused, %"),
        rows=tuple(rows),
        notes="cheats caught: in every seed that was tried. accused: of honest providers over seeds, with the exact "
        "binomial interval (95 %). One that always fails accuses, one that always passes catches nobody.",
    )


def reasons_grid(found: Matrix) -> Grid:
    """Which named check failed whom."""
    rows = [
        (who, name, ", ".join(cell.checks), cell.why)
        for who in found.providers
        for name in found.verifiers
        if (cell := found.cell(who, name)).caught
    ]
    return Grid(
        caption="Which checks failed", headers=("provider", "verifier", "checks", "why"), rows=tuple(rows), words=4
    )


def verdict(found: Matrix) -> str:
    """What came out, in a few sentences."""
    told = [f"{_seeds(found.seeds).capitalize()}."]
    wrong = found.accusations()
    if wrong is not None:
        told.append(f"Honest providers are accused by any verifier in {wrong:.0%} % of {wrong.n} runs.")
    classic = [name for name in CLASSIC if name in found.verifiers]
    through = (
        [who for who in found.cheats if all(_passes(found.cell(who, name)) for name in classic)] if classic else []
    )
    if through:
        told.append(f"Past {_and(classic)} come {_and(through)}.")
    for name in found.verifiers:
        alone = [who for who in found.cheats if found.caught_by(who) == (name,)]
        if alone:
            told.append(f"By nothing but {name} is caught: {_and(alone)}.")
    if found.uncaught:
        told.append(f"BY NOBODY in some seed: {_and(found.uncaught)}.")
    for who in found.untried:
        told.append(f"Not tried: {who} ({found.cell(who, found.verifiers[0]).why}).")
    useless = [f"{name} {found.worth(name)}" for name in found.verifiers if found.worth(name) != "fine"]
    if useless:
        told.append(f"Of no use here: {_and(useless)}.")
    return " ".join(told)


def _passes(cell: Cell) -> bool:
    return cell.tried > 0 and cell.passed == cell.tried


def verification_chapter(found: Matrix, check: str = "") -> Chapter:
    """The matrix as a chapter named ``verify``."""
    alone = [who for who in found.cheats if len(found.caught_by(who)) == 1]
    return Chapter(
        name="verify",
        headline=f"{len(found.cheats)} ways to cheat and {len(found.verifiers)} verifiers: {len(alone)} are caught by "
        f"one verifier only, {len(found.uncaught)} by none",
        text=(verdict(found), _NOT_IN_IT),
        grids=(matrix_grid(found), worth_grid(found), reasons_grid(found)),
        shows="Which verifier finds which way to cheat, on real rows, with honest providers beside them.",
        does_not_show="That other cheats are found: kept copies are not, nor imitations of rows that are no near "
        "copies; and on other data and models, weak triggers leave the owners' test undecided.",
        check=check,
        data=found.to_json(),
    )


def verification_report(found: Matrix, check: str = "") -> Report:
    """All of it as a report; `check` is the command that made it."""
    about = found.about
    facts = {
        "model": about["recipe"]["model"],
        "rows": f"{about['rows']:,} of {about['owners']:,} owners",
        "seeds": str(found.seeds),
        "asking": f"{about['terms']['askers']} owners, {about['terms']['share']:.0%} of their rows stamped",
        "seed": str(about["seed"]),
    }
    return Report(
        title="expunge verify: providers that cheat, and verifiers",
        verdict=verdict(found),
        facts=facts,
        chapters=(verification_chapter(found, check),),
        sound=found.sound,
    )


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
