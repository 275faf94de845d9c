"""Rows that stand alone in gradient space: medoids of small clusters, class by class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.screen.asked import Asked
from expunge.screen.facility import cover
from expunge.screen.scene import Gradients, Scene
from expunge.screen.sieve import Measure, Reader, Sieve


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Rows of one class that were clustered together.

    Attributes:
        rows: (b,) where they stand among the scene's rows.
        medoids: (m,) positions in the block.
        cluster: (b,) which medoid each row is nearest to.
        sizes: (b,) the size of each row's cluster.
        near: (b,) distance to its medoid.
        least: what the last medoid added.
    """

    rows: Tensor
    medoids: Tensor
    cluster: Tensor
    sizes: Tensor
    near: Tensor
    least: float


@dataclass(frozen=True, kw_only=True)
class Isolation(Sieve):
    """Requested rows in small clusters of gradients, among retained rows of their class.

    The abstract of the malicious unlearning attacks (Qian et al., KDD 2023) names gradient influence only; that its
    screen looks for isolated medoids is our inference from surveys and from EPIC (Yang, Liu and Mirzasoleiman, ICML
    2022), and their thresholds are unknown to us. The public code of EPIC offsets cluster ids by class sizes, which
    drops wrong rows wherever classes differ in size; here each class is counted apart.

    Every trained row is clustered once with up to `most` rows of its class, requested or not: the clusters do not
    depend on the request, so that a request is a look-up. Rows that come with a request (replacements, strangers) are
    laid beside such a block, and the greedy choice goes on with them alone. Blind to near-duplicates, which keep each
    other company: see `Coalition`. The request's score is the mean of one over the cluster sizes.

    Attributes:
        budget: medoids as a share of a block's rows.
        smallest: clusters with fewer rows are isolated.
        features: compare the last layer's whole gradients; False compares its bias's (probabilities less one-hot).
        most: rows of a class that are clustered together; larger classes are cut into random blocks.

    Cost: `most` squared numbers a block; about 10 s for 60,000 rows of 10 classes.
    """

    budget: float = 0.2
    smallest: int = 2
    features: bool = False
    most: int = 2000

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise Misuse(f"budget must lie above 0 and at most at 1, got {self.budget}")
        if self.smallest < 1 or self.most < 1:
            raise Misuse(f"smallest and most must be >= 1, got {self.smallest} and {self.most}")

    def prepare(self, scene: Scene, *, rng: Generator) -> Reader:
        """Cluster all rows, class by class."""
        rows = self._of(scene.whole)
        labels = groups(scene)
        blocks: dict[int, list[Block]] = {}
        for label in labels.unique().tolist():
            inside = (labels == label).nonzero().flatten()
            order = torch.randperm(len(inside), generator=child(rng, "isolation", int(label)))
            parts = torch.tensor_split(inside[order], math.ceil(len(inside) / self.most))
            blocks[int(label)] = [self.block(rows, part.sort().values) for part in parts]
        sizes = torch.zeros(len(labels), dtype=torch.int64)
        for block in (one for several in blocks.values() for one in several):
            sizes[block.rows] = block.sizes
        return partial(self._measure, scene, rows, sizes, blocks)

    def _of(self, gradients: Gradients) -> Gradients:
        return gradients if self.features else gradients.without_features()

    def block(self, gradients: Gradients, rows: Tensor) -> Block:
        """Cluster these rows of one class."""
        apart = distances(gradients.take(rows))
        chosen, gains = cover(apart.max() - apart, max(1, math.ceil(self.budget * len(rows))))
        near, cluster = apart[:, chosen].min(1)
        sizes = torch.bincount(cluster, minlength=len(chosen))[cluster]
        return Block(
            rows=rows,
            medoids=torch.tensor(chosen),
            sizes=sizes.cpu(),
            near=near,
            cluster=cluster.cpu(),
            least=float(gains[-1]),
        )

    def _measure(
        self, scene: Scene, rows: Gradients, sizes: Tensor, blocks: dict[int, list[Block]], asked: Asked
    ) -> Measure:
        found = sizes[scene.index(asked)]
        if asked.new is not None:
            found = self._beside(scene, rows, blocks, asked)
        elif asked.strangers is not None:
            alone = replace(asked, ids=(), places=asked.places[:0])
            found = torch.cat([found, self._beside(scene, rows, blocks, alone)])
        score = 1 / found.double()

        def reason(row: int) -> str:
            return f"one of {int(found[row])} alike in gradient space within its class, isolated below {self.smallest}"

        return Measure(rows=score, whole=float(score.mean()), flagged=found < self.smallest, reason=reason)

    def _beside(self, scene: Scene, rows: Gradients, blocks: dict[int, list[Block]], asked: Asked) -> Tensor:
        """Cluster sizes of rows that came with the request, each class beside its first block."""
        given = self._of(scene.of(asked))
        labels = groups(scene)[scene.index(asked)] if asked.strangers is None else labels_of(asked.strangers)
        sizes = torch.ones(len(given), dtype=torch.int64)
        for label in labels.unique().tolist():
            mine = (labels == label).nonzero().flatten()
            if int(label) in blocks:
                sizes[mine] = self.joining(rows, blocks[int(label)][0], given.take(mine))
        return sizes

    def joining(self, rows: Gradients, block: Block, given: Gradients) -> Tensor:
        """Cluster sizes of new rows beside a block: each opens a cluster while that adds more than the last one did."""
        base = rows.take(block.rows)
        to_block, among = distances(given, base), distances(given)
        first = to_block[:, block.medoids].min(1)
        near = torch.cat([block.near, first.values])
        cluster = torch.cat([block.cluster, first.indices.cpu()])
        columns = torch.cat([to_block, among], 1)
        for number in range(len(given)):
            gains = (near - columns).clamp_min(0).sum(1)
            pick = int(gains.argmax())
            if float(gains[pick]) <= block.least:
                break
            closer = columns[pick] < near
            cluster[closer.cpu()] = len(block.medoids) + number
            near = torch.minimum(near, columns[pick])
        return torch.bincount(cluster, minlength=len(block.medoids))[cluster][len(block.rows) :]


def distances(a: Gradients, b: Gradients | None = None) -> Tensor:
    """(n, m) distances between rows' gradients, by ``||g||^2 + ||h||^2 - 2 <g, h>``; no gradient is made."""
    other = a if b is None else b
    squares = a.squares()[:, None] + other.squares()[None] - 2 * a.cross(other)
    apart = squares.clamp_min(0).sqrt()
    if b is None:
        apart.fill_diagonal_(0)
    return apart


def groups(scene: Scene) -> Tensor:
    """(n,) the class of each row; one for all where targets are numbers."""
    return labels_of(scene.rows)


def labels_of(records: Records) -> Tensor:
    """(n,) classes, or zeros for numbers."""
    return records.y.cpu() if records.classes is not None else torch.zeros(len(records), dtype=torch.int64)
