"""A guarantee in words, for whoever must answer for it."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scipy.special import ndtr, ndtri

from expunge.certify.before_head import CHECKS, counts, of_other_rows
from expunge.certify.constants import CHECKED, SETTING, STANDS_ON, Derivation
from expunge.certify.derivations import DERIVATIONS
from expunge.core.claim import Constant, Guarantee

_WIDTH = 100
NOT_COMPUTED = "None of them was computed again for this text; expunge.certify.recheck does that."

_NAMED = 6
_NOT_SAID = (
    "Nothing about copies kept elsewhere: of the data, of older models, or of what was made with either.",
    "Nothing about comparing the model from before the removal with this one: who holds both may see what went. The "
    "pair leak tells how well (expunge.certify.leak).",
    "Nothing of other releases made from the same earlier model, as of a request carried out twice: only those that "
    "led to this model are counted.",
    "Not that the model tells nothing about the people removed: what it learnt from the others holds for whoever is "
    "like them.",
    "Nothing about the last bits of floating-point numbers: the proof is for true Gaussian noise, and a computer's is "
    "rounded (Mironov, 2012).",
)


def explain(
    guarantee: Guarantee, *, derivations: Mapping[str, Derivation] = DERIVATIONS, markdown: bool = False
) -> str:
    """What a guarantee says, what it does not, and every number behind it, for people.

    Made from the guarantee alone, so that it tells no more of the removed rows. Bounds are rounded up, to the digits
    that they are good for. It does not check the guarantee; `recheck` does.

    Args:
        guarantee: of any basis; of basis ``none`` the text says that nothing is guaranteed, and why.
        derivations: formulas by name.
        markdown: with headings and a table, instead of plain text of at most 100 columns.
    """
    page = _Page(markdown)
    page.heading("What is guaranteed")
    page.paragraphs(_claim(guarantee))
    page.heading("In figures")
    page.points(_figures(guarantee))
    page.heading("What it covers")
    page.points(_scope(guarantee))
    page.heading("What it does not say")
    page.points(_NOT_SAID)
    page.heading("Numbers that it rests on")
    page.rows(_constants(guarantee, derivations))
    page.paragraphs([NOT_COMPUTED])
    return page.text()


def caught(alarms: float, *, mu: float | None, epsilon: float, delta: float) -> float:
    """The most that an attacker finds of the models that did see the rows, at this share of false alarms.

    By the trade-off of N(0, 1) and N(mu, 1), exactly (Dong, Roth and Su, 2022), or without mu by the region that
    (epsilon, delta) leaves: ``min(e^epsilon a + delta, 1 - e^-epsilon (1 - delta - a))`` (Kairouz, Oh and Viswanath,
    2015).
    """
    if mu is not None:
        return float(ndtr(mu + ndtri(alarms)))
    most = math.exp(min(epsilon, 700.0)) * alarms + delta
    return min(1.0, most, 1 - math.exp(-epsilon) * max(0.0, 1 - delta - alarms))


def _claim(guarantee: Guarantee) -> Iterator[str]:
    if guarantee.basis == "none":
        yield f"NOTHING IS GUARANTEED: {_why_none(guarantee)}."
    else:
        if _vacuous(guarantee):
            yield (
                "VACUOUS: what follows is so by the noise alone. No unlearning is needed for it, and it is no sign "
                "that any was done well; see the remarks."
            )
        partly = guarantee.outside and not of_other_rows(guarantee)
        seen = "the covered part of this model" if partly else "this model"
        yield (
            f"{_condition(guarantee)} sees {seen} can tell it from one that never saw the removed rows with odds of at "
            f"most e^epsilon = {_odds(guarantee.epsilon)} to 1, where they were even before, except with probability "
            f"{_chance(guarantee.delta)} (delta)."
        )
        if _alone(guarantee, 0.01) >= 0.5:
            yield "This is weak: an attacker who raises false alarms in 1 % of cases may find half of all, or more."
    yield f"Compared with: {_ended(guarantee.reference)}"
    yield f"Made by: {_ended(guarantee.mechanism)}"
    yield _basis(guarantee)


def _condition(guarantee: Guarantee) -> str:
    conditional = guarantee.basis == "conditional"
    return "ONLY IF WHAT SOMEBODY VOUCHES FOR IS RIGHT: whoever" if conditional else "Whoever"


def _vacuous(guarantee: Guarantee) -> bool:
    return any(remark.lstrip().lower().startswith("vacuous") for remark in guarantee.remarks)


def _basis(guarantee: Guarantee) -> str:
    if guarantee.basis == "proved":
        counted = ", but for what was counted on the rows themselves, which only who holds them can count again"
        said = "Basis: proved. Every number below was set beforehand, or follows from such numbers by a formula"
        return f"{said}{counted if counts(guarantee) else ''}."
    if guarantee.basis == "conditional":
        told = _bare(guarantee, "supplied")
        return f"Basis: conditional. Somebody vouches for {told}; nobody has proved it."
    return "Basis: none. The figures below are what it would say, and must not be relied on."


def _why_none(guarantee: Guarantee) -> str:
    constants = guarantee.constants
    nameless = [name for name, one in constants.items() if one.source == "proved" and not one.derivation]
    reasons = {
        "there are no numbers that it could rest on": not constants,
        f"it rests on numbers that were measured or guessed, {_bare(guarantee, 'estimated')}": any(
            one.source == "estimated" for one in constants.values()
        ),
        "no noise was added": guarantee.sigma == 0,
        f"nobody says what gives {_listed(nameless)}": bool(nameless),
    }
    return next((why for why, holds in reasons.items() if holds), "a number that it rests on is not finite")


def _bare(guarantee: Guarantee, source: str) -> str:
    """Numbers of this source that no other gives."""
    of = [(name, one) for name, one in guarantee.constants.items() if one.source == source]
    chosen = [pair for pair in of if not pair[1].derivation] or of
    return ", ".join(f"{name} = {_number(name, one)}" for name, one in chosen)


def _figures(guarantee: Guarantee) -> Iterator[str]:
    figure = _figure(guarantee.mu, guarantee.epsilon, guarantee.delta)
    yield f"This model alone: {figure}"
    spent = guarantee.transcript
    if spent is None:
        yield "All releases so far: not known. Whoever holds more than one of them is not covered."
    else:
        figure = _figure(spent.mu, spent.epsilon, spent.delta, f" of {_given(spent.budget_epsilon)} agreed on")
        yield f"All releases so far, {spent.releases:,} of {spent.budget_releases:,}: {figure}"
    yield "Who only guesses finds 1 % at 1 % false alarms, and 10 % at 10 %."


def _figure(mu: float | None, epsilon: float, delta: float, agreed: str = "") -> str:
    finds = [_percent(caught(alarms, mu=mu, epsilon=epsilon, delta=delta)) for alarms in (0.01, 0.1)]
    how = "from epsilon and delta alone" if mu is None else f"exactly, by mu {rounded_up(mu)}"
    return (
        f"epsilon {rounded_up(epsilon)}{agreed}, except with probability {_chance(delta)}. The best attacker finds at "
        f"most {finds[0]} at 1 % false alarms, and at most {finds[1]} at 10 % ({how})."
    )


def _alone(guarantee: Guarantee, alarms: float) -> float:
    return caught(alarms, mu=guarantee.mu, epsilon=guarantee.epsilon, delta=guarantee.delta)


def _scope(guarantee: Guarantee) -> Iterator[str]:
    yield f"Covered: {_listed(guarantee.parameters)}."
    if guarantee.outside and of_other_rows(guarantee):
        yield f"Given out without noise, as it was made of other rows: {_listed(guarantee.outside)}."
    elif guarantee.outside:
        yield f"NOT covered, and given out as well: {_listed(guarantee.outside)}."
    else:
        yield "Nothing of the model is left out."
    for remark in guarantee.remarks:
        yield f"Remark: {_ended(remark)}"


def _constants(guarantee: Guarantee, derivations: Mapping[str, Derivation]) -> list[tuple[str, str, str]]:
    """Name, value, and where it comes from: first those that the guarantee stands on."""
    first = [name for name in STANDS_ON if name in guarantee.constants]
    names = [*first, *(name for name in guarantee.constants if name not in first)]
    held = {name: guarantee.constants[name] for name in names}
    return [(name, _number(name, one), _origin(one, derivations)) for name, one in held.items()]


def _origin(constant: Constant, derivations: Mapping[str, Derivation]) -> str:
    bare = {
        "proved": "called proved, and nothing is said to give it",
        "supplied": "supplied: somebody vouches for it",
        "estimated": "estimated: measured or guessed, which proves nothing",
    }
    if not constant.derivation:
        return bare[constant.source]
    known = derivations.get(constant.derivation)
    if known is not None:
        return f"{constant.source}: {known.formula} ({known.name})"
    count = next((check for check in CHECKS if constant.derivation == CHECKED + check.name), None)
    if count is not None:
        return f"{constant.source}: {count.says}; counted when this was made ({count.name})"
    unknown = "" if constant.derivation.startswith(SETTING) else ", which is no formula that is known here"
    return f"{constant.source}: {constant.derivation}{unknown}"


def _number(name: str, constant: Constant) -> str:
    """Settings and what is vouched for as they were given, bounds rounded up, anything else to three digits."""
    given = constant.derivation.startswith(SETTING) or (constant.source == "supplied" and not constant.derivation)
    if given:
        return _given(constant.value)
    return rounded_up(constant.value) if name in STANDS_ON and name != "sigma" else _short(constant.value)


def _given(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e9 and value == round(value) else _short(value, 6)


def _short(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "no number" if math.isnan(value) else "infinite"
    rounded = float(f"{value:.{digits}g}")
    if rounded == round(rounded) and abs(rounded) < 1e9:
        return f"{rounded:,.0f}"
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{rounded:.{digits}g}")


def rounded_up(value: float) -> str:
    """A bound, rounded up to three digits."""
    if not 0 < value < math.inf:
        return _short(value)
    down = float(f"{value:.3g}")
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return _short(down if down >= value * (1 - 1e-8) else down + unit)


def _odds(epsilon: float) -> str:
    return rounded_up(math.exp(epsilon)) if epsilon < math.log(1e6) else "more than 1,000,000"


def _percent(share: float) -> str:
    """A bound, rounded up to two digits."""
    if not share <= 0.99:
        return "100 %"
    if share <= 0:
        return "0 %"
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return f"{float(f'{math.ceil(share / unit - 1e-6) * unit * 100:.2g}'):g} %"


def _chance(delta: float) -> str:
    if not 1e-300 < delta < 1:
        return _short(delta)
    often = math.floor(1 / delta * (1 + 1e-9))
    unit = 10 ** max(0, len(str(often)) - 3)
    return f"1 in {often // unit * unit:,}" if often < 1e9 else rounded_up(delta)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "") if names else "nothing"


def _ended(text: str) -> str:
    return f"{text.strip() or 'not said'}".rstrip(".") + "."


@dataclass
class _Page:
    """Lines of text, plain or Markdown; what others wrote can neither break a line nor pass for mark-up."""

    markdown: bool
    lines: list[str] = field(default_factory=list)

    def heading(self, title: str) -> None:
        self.lines += [*([""] if self.lines else []), *([f"## {title}", ""] if self.markdown else [title.upper()])]

    def paragraphs(self, texts: Iterable[str]) -> None:
        for text in texts:
            apart = [""] if self.markdown and self.lines[-1] else []
            self.lines += apart + ([self._clean(text)] if self.markdown else textwrap.wrap(self._clean(text), _WIDTH))

    def points(self, texts: Iterable[str]) -> None:
        for text in texts:
            point = f"- {self._clean(text)}"
            self.lines += [point] if self.markdown else textwrap.wrap(point, _WIDTH, subsequent_indent="  ")

    def rows(self, rows: Sequence[tuple[str, str, str]]) -> None:
        cleaned = [tuple(map(self._clean, row)) for row in rows] or [("none", "", "")]
        if self.markdown:
            self.lines += ["| name | value | where it comes from |", "| --- | --- | --- |"]
            self.lines += [f"| {' | '.join(row)} |" for row in cleaned]
            return
        for name, value, origin in cleaned:
            self.lines += textwrap.wrap(f"{name} = {value}  {origin}".rstrip(), _WIDTH, subsequent_indent="    ")

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def _clean(self, text: str) -> str:
        line = "".join(letter if letter.isprintable() else " " for letter in text)
        line = " ".join(line.split())
        return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", line) if self.markdown else line
