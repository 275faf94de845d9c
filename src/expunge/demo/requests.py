"""The chapter `requests`: who asks for what."""

from __future__ import annotations

from expunge.demo.story import Story, counted
from expunge.report import Chapter, Grid, rows_as_png


def tell_requests(story: Story) -> Chapter:
    """Who asks for what, and how many records that is."""
    splits = {name: request.split(story.data.train) for name, request in story.requests.items()}
    rows = tuple((name, f"{len(split.forget):,}", f"{len(split.retain):,}") for name, split in splits.items())
    counts = ", ".join(f"{name} ({len(split.forget):,} records)" for name, split in splits.items())
    text = [
        f"{counted(len(story.askers), 'owner')} of {story.settings.owners} ask to be forgotten, and somebody asks "
        "that a whole class go: two separate removals, each from the full model."
    ]
    if story.settings.show_removed is not None:
        for name, split in splits.items():
            path = story.settings.show_removed / f"{name.replace(' ', '-')}.png"
            rows_as_png(split.forget.x[:400], path)
        text.append("Pictures of removed images were written outside the workspace, as asked. Delete them yourself.")
    return Chapter(
        name="requests",
        headline=counts,
        text=tuple(text),
        grids=(
            Grid(caption="Requests", headers=("request", "records to remove", "records that stay"), rows=rows, words=1),
        ),
        shows="What each request means in records.",
        does_not_show="Whether whoever asks is who they say; whether they mean harm is the next chapter.",
        check="expunge records --data mnist --owners",
        data={name: {"forget": len(s.forget), "retain": len(s.retain)} for name, s in splits.items()},
    )
