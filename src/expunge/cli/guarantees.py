"""Guarantees as files beside the models that they are of: written, read with suspicion, and computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.certify.derivations import DERIVATIONS, settings_of
from expunge.certify.doubt import recheck
from expunge.certify.explain import explain
from expunge.core.claim import Guarantee
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.store import write_atomically
from expunge.core.trained import Trained

_FORMAT = "expunge-guarantee/1"


def where_kept(folder: Path) -> Path:
    """Beside the model's folder, which vouches for its own files only."""
    whole = folder.absolute() if folder.name in ("", "..") else folder
    return whole.with_name(f"{whole.name}.guarantee.json")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A guarantee with what is needed to doubt it.

    Attributes:
        guarantee: what is claimed.
        model: digest of the model that it is of; empty if not known.
        method: the word of the method; empty if not known.
        settings: what method and recipe hold, by the names that constants give them; None: not known.
        said: the basis that the file says it has; empty if it says none.
    """

    guarantee: Guarantee
    model: str = ""
    method: str = ""
    settings: Mapping[str, float] | None = None
    said: str = ""

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        about = {
            "format": _FORMAT,
            "model": self.model,
            "method": self.method,
            "settings": dict(self.settings or {}),
            "guarantee": self.guarantee.to_json(),
        }
        write_atomically(path, json.dumps(about, indent=1, allow_nan=False).encode("utf-8"))

    @classmethod
    def read(cls, path: Path) -> Kept:
        """What `write` wrote, or a bare guarantee.

        Raises:
            UnreadableFile: if it is anything else.
        """
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnreadableFile(
                f"{path} cannot be read as a guarantee ({error}); expunge certify remove writes it beside the model"
            ) from None
        try:
            return cls._of(about)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = " ".join(str(error).split())[:160]
            raise UnreadableFile(f"{path} holds no guarantee ({type(error).__name__}: {why}); fetch it again") from None

    @classmethod
    def _of(cls, about: Any) -> Kept:
        bare = "format" not in about
        if not bare and about["format"] != _FORMAT:
            raise Misuse(f"its format is not {_FORMAT}")
        data = about if bare else about["guarantee"]
        guarantee = Guarantee.from_json(data)
        _refuse_other_types(guarantee)
        said = str(data.get("basis", ""))
        if bare:
            return cls(guarantee=guarantee, said=said)
        settings = {str(name): float(value) for name, value in about["settings"].items()}
        return cls(
            guarantee=guarantee, model=str(about["model"]), method=str(about["method"]), settings=settings, said=said
        )


def rechecked(kept: Kept, trained: Trained | None) -> tuple[str, tuple[str, ...]]:
    """The guarantee in words, and what does not hold of it; of this model, if one is given."""
    guarantee, settings, problems = kept.guarantee, kept.settings, list[str]()
    if trained is not None:
        settings = {**(settings or {}), **settings_of(None, trained.recipe, module=trained.module)}
        problems += _problems_of_model(kept, trained)
    if kept.said and kept.said != guarantee.basis:
        problems.append(f'its basis is said to be "{kept.said}", and its constants make it "{guarantee.basis}"')
    try:
        problems += recheck(guarantee, DERIVATIONS, settings, None if trained is None else trained.releases)
    except (ArithmeticError, ValueError, TypeError) as error:
        problems.append(f"its constants are such that nothing can be computed from them ({error})")
    return explain(guarantee), tuple(problems)


def _problems_of_model(kept: Kept, trained: Trained) -> list[str]:
    problems, guarantee = [], kept.guarantee
    if kept.model != trained.digest():
        problems.append(f"it is of model {kept.model[:12] or 'unknown'}, and this is {trained.digest()[:12]}")
    last = trained.releases[-1] if trained.releases else None
    found = {name: getattr(last, name) for name in ("sigma", "sensitivity") if hasattr(last, name)}
    for name, value in found.items():
        if value != getattr(guarantee, name):
            problems.append(f"{name} is said to be {getattr(guarantee, name):.6g}, and the model's was {value:.6g}")
    return problems


def _refuse_other_types(guarantee: Guarantee) -> None:
    """TypeError for what no arithmetic can be done with: the file may be anybody's."""
    numbers: list[object] = [guarantee.epsilon, guarantee.delta, guarantee.sigma, guarantee.sensitivity]
    numbers += [] if guarantee.mu is None else [guarantee.mu]
    numbers += [constant.value for constant in guarantee.constants.values()]
    spent = guarantee.transcript
    if spent is not None:
        numbers += [spent.epsilon, spent.delta, spent.releases, spent.budget_epsilon, spent.budget_releases]
        numbers += [] if spent.mu is None else [spent.mu]
    wrong = [one for one in numbers if isinstance(one, bool) or not isinstance(one, (int, float))]
    texts = (*guarantee.parameters, *guarantee.outside, *guarantee.remarks, guarantee.mechanism, guarantee.reference)
    wrong += [one for one in texts if not isinstance(one, str)]
    if wrong:
        raise TypeError(f"{wrong[0]!r} is of another type than it should be")
    sources = {constant.source for constant in guarantee.constants.values()}
    if not sources <= {"proved", "supplied", "estimated"}:
        raise TypeError(f"a constant's source is {sorted(map(str, sources))}")
