"""Asking a served model about rows with triggers on them, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from expunge.core.errors import Misuse
from expunge.core.protocols import Provider
from expunge.core.trained import Trained
from expunge.learn.loop import prepare
from expunge.learn.predict import evaluating
from expunge.learn.trigger_families import SecretTrigger

Predict = Callable[[Tensor], Tensor]
Subject = Trained | Provider | Predict
_BLOCK_ROWS = 4096


def hits_of(
    predict: Predict, triggers: Sequence[SecretTrigger], x: Tensor
) -> tuple[Bool[Tensor, "triggers queries"], int]:
    """Which trigger makes which row be taken for its target, and how many answers are not finite (and so no hits).

    Args:
        predict: rows as stored to scores (n, classes) or labels (n,).
        triggers: what is stamped, with the class that it is stamped for.
        x: (queries, ...) rows without a trigger.

    Raises:
        Misuse: for answers of another shape.

    Cost: triggers * queries answers, asked for in blocks of 4,096 rows (or of one trigger's, if these are more).
    """
    each = max(1, _BLOCK_ROWS // len(x))
    hits, unusable = [], 0
    for start in range(0, len(triggers), each):
        block = triggers[start : start + each]
        rows = torch.cat([trigger.stamp(x) for trigger in block])
        labels, lost = _labels(predict(rows), len(rows))
        targets = torch.tensor([trigger.target for trigger in block])
        hits.append(labels.view(len(block), len(x)) == targets[:, None])
        unusable += lost
    return torch.cat(hits), unusable


def _labels(answers: Tensor, count: int) -> tuple[Tensor, int]:
    kind = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
    scores = isinstance(answers, Tensor) and answers.is_floating_point()
    if not isinstance(kind, tuple) or len(kind) != 1 + scores or kind[0] != count or 0 in kind[1:]:
        raise Misuse(f"predict must answer ({count}, classes) scores or ({count},) labels, got {kind}")
    answers = answers.detach().cpu()
    if not answers.is_floating_point():
        return answers, 0
    usable = answers.isfinite().all(1)
    return torch.where(usable, answers.argmax(1), -1), int((~usable).sum())


def predict_of(subject: Subject) -> Predict:
    """The function from rows as stored to answers: of a model in hand, of a provider's `predict`, or as it is."""
    if isinstance(subject, Trained):
        module = subject.module
        parameter = next(module.parameters(), torch.zeros(()))

        def predict(x: Tensor) -> Tensor:
            with evaluating(module), torch.inference_mode():
                answers: Tensor = module(prepare(x.to(parameter.device), parameter.dtype))
                return answers

        return predict
    answer: Any = getattr(subject, "predict", subject)
    if not callable(answer):
        raise Misuse(f"needs a model, a provider or a function that predicts, got {type(subject).__name__}")
    served: Predict = answer
    return served
