"""The chapter `train`: one model and a model in shards."""

from __future__ import annotations

from expunge.audit import accuracy
from expunge.demo.story import Story, counted
from expunge.learn.shards import shard_sizes
from expunge.report import Chapter


def tell_train(story: Story) -> Chapter:
    """What the models are, and what sharding costs before anybody asks."""
    records, test = story.data.train, story.data.test
    one, many = (accuracy(model, test, ask=story.answers) for model in (story.plain, story.sharded))
    sharding = story.sharded.recipe.sharding
    sizes = shard_sizes(records, sharding) if sharding is not None else None
    return Chapter(
        name="train",
        headline=f"one model {one:.1%} %, {story.settings.shards} shards {many:.1%} % of {len(test):,} test images",
        text=(
            f"{len(records):,} training images of {story.settings.owners} owners; a multilayer perceptron 784-128-10, "
            f"{counted(story.settings.epochs, 'epoch')}. The same network was trained once on everything, and once as "
            f"{sizes}.",
            "An owner's shard is a keyed hash of the name, and rows are read in the order of a keyed hash of each: "
            "neither depends on which other rows are there.",
        ),
        shows="What sharding costs in accuracy before anybody asks to be forgotten.",
        does_not_show="How either model does on other data, or with other seeds: the intervals are over test images.",
        check=_command(story),
        data={"one_model": one.to_json(), "sharded": many.to_json(), "shard_rows": list(sizes.rows) if sizes else []},
    )


def _command(story: Story) -> str:
    """The command line that trains the sharded model to the same bytes."""
    settings, lr = story.settings, story.recipe.optimiser_args["lr"]
    return (
        f"expunge train --data mnist --owners {settings.owners} --model mlp --epochs {settings.epochs} "
        f"--batch-size {story.recipe.batch_size} --lr {lr} --seed {settings.seed} --shards {settings.shards} "
        "--out build/sharded"
    )
