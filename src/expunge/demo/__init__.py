"""The story of a deletion request, told on real data: one file a chapter, the trainings shared by all."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from expunge.core.errors import Misuse
from expunge.demo.certified import tell_certify
from expunge.demo.journey import tell_certificate, tell_sweep
from expunge.demo.requests import tell_requests
from expunge.demo.screening import tell_screen
from expunge.demo.story import Settings, Story, Tell, silent
from expunge.demo.tables import ratio
from expunge.demo.training import tell_train
from expunge.demo.unlearning import STEPS_OF_A_SEED, tell_unlearn
from expunge.demo.verification import tell_verify
from expunge.report import Chapter, Report

__all__ = ["CHAPTERS", "Settings", "Story", "tell"]

CHAPTERS: Mapping[str, Callable[[Story], Chapter]] = MappingProxyType(
    {
        "train": tell_train,
        "requests": tell_requests,
        "screen": tell_screen,
        "unlearn": tell_unlearn,
        "certify": tell_certify,
        "certificate": tell_certificate,
        "sweep": tell_sweep,
        "verify": tell_verify,
    }
)


def tell(settings: Settings, *, chapters: Sequence[str] | None = None, progress: Tell = silent) -> Report:
    """Tell the story, or some of its chapters.

    Args:
        settings: what it is told with.
        chapters: names of `CHAPTERS`; None tells all, in order.
        progress: hears what is being done.

    Raises:
        Misuse: for an unknown chapter.
    """
    wanted = list(CHAPTERS) if chapters is None else list(chapters)
    for name in wanted:
        if name not in CHAPTERS:
            raise Misuse(f'there is no chapter "{name}"; there are {", ".join(CHAPTERS)}')
    story = Story(settings, progress, units=11 + settings.seeds * (2 + STEPS_OF_A_SEED))
    told = tuple(CHAPTERS[name](story) for name in wanted)
    story.step("write the report")
    return Report(
        title="expunge demo: forgetting on MNIST",
        verdict=_verdict(told),
        facts={
            "data": story.data.about,
            "owners": f"{settings.owners}, artificial: MNIST names none",
            "trainings": f"{settings.seeds} of each, seed {settings.seed}" + (" and up" if settings.seeds > 1 else ""),
            "torch": f"{torch.__version__}, threads: {torch.get_num_threads()}, Python {platform.python_version()}",
        },
        chapters=told,
        sound=all(chapter.data.get(what, True) for chapter in told for what in ("sisa_equals_scratch", "sound")),
    )


def _verdict(told: Sequence[Chapter]) -> str:
    data = next((chapter.data for chapter in told if chapter.name == "unlearn"), None)
    if data is None:
        return "Some chapters only: see each for what it shows."
    exact = "equals" if data["sisa_equals_scratch"] else "DOES NOT EQUAL"
    share = ratio(data["one_owner"]["share_of_row_gradients"])
    return (
        f"Forgetting in the sharded model {exact} training from scratch on what remains, byte for byte; for one owner "
        f"it took {share} of the work. The approximate methods claim nothing, and the tables show how far each is from "
        "retraining."
    )
