"""A run beside another one, such as a student beside its teacher: how much of the score it keeps, how often both say the same, size and latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ftkit.data.batches import by_length, collate
from ftkit.errors import RecipeError
from ftkit.few_bits import num_values
from ftkit.latency import in_turns
from ftkit.summary import share_kept
from ftkit.tasks.classes import other_labels

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Scores
    from ftkit.evaluate import Measurable, Measured
    from ftkit.recipe.spec import Recipe

TIMED = {1: 32, 32: 8}  # rows in a batch -> batches whose median is told


def check(own: Recipe, other: Recipe, name: str) -> None:
    """Refuse a run of another task or of other labels, whose scores mean something else."""
    if other.task.kind != own.task.kind:
        raise RecipeError(f"--against: {name} was trained for {other.task.kind}, and this run for {own.task.kind}")
    if differing := other_labels(own.task, other.task):
        raise RecipeError(f"--against: {name} has {differing}. They must be the same, in the same order")


class Side(NamedTuple):
    """A run that was measured just now."""

    subject: Measurable
    measured: Mapping[str, Measured]


def compare(own: Side, other: Side, name: str) -> dict[str, Any]:
    """{run, metric, sets: {name: {own, other, kept, agreement}}, parameters, bytes, latency_seconds: {own, other} by rows in a batch}.

    `kept` is the share of the other's score, 1 where they are equal; `agreement` that of items for which both choose the
    same, None where they choose nothing, or where their items are not the same.
    """
    task = own.subject.recipe.task
    metric, sides = task.main_metric, {"own": own, "other": other}
    vocabularies = [side.subject.tokenizer.get_vocab() for side in sides.values()]
    same_items = vocabularies[0] == vocabularies[1] or task.auto_class == "AutoModelForSequenceClassification"
    sets = {}
    for split in own.measured:
        scores = {key: side.measured[split].metrics.compute()[metric] for key, side in sides.items()}
        sets[split] = {**scores, "kept": share_kept(metric, **scores), "agreement": _agreement(own.subject, other.subject, split) if same_items else None}
    parameters = {key: list(side.subject.trainee.model.parameters()) for key, side in sides.items()}
    return {
        "run": name,
        "metric": metric,
        "sets": sets,
        "parameters": {key: sum(map(num_values, each)) for key, each in parameters.items()},
        "bytes": {key: sum(parameter.nbytes for parameter in each) for key, each in parameters.items()},
        "latency_seconds": {str(rows): _latency(own.subject, other.subject, rows, count) for rows, count in TIMED.items()},
    }


def _agreement(own: Measurable, other: Measurable, split: str) -> float | None:
    choices, others = (_choices(subject, subject.splits[split][1]) for subject in (own, other))
    both = choices is not None and others is not None and len(choices) == len(others)
    return float(np.mean(choices == others)) if both else None


def _choices(subject: Measurable, features: FeatureSet) -> np.ndarray | None:
    """int64 [n]: of each item, in the order of the rows, the class or position of the highest logit; of each label, whether it is said to be true."""
    found: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []

    def judge(parts: Iterator[Scores]) -> None:
        for scores in parts:
            if scores.kind not in ("classes", "positions", "labels"):
                continue
            chosen = (scores.logits > 0).long() if scores.kind == "labels" else scores.logits.argmax(-1, keepdim=True)
            found.append(chosen.flatten().cpu())
            rows.append(scores.rows.repeat_interleave(chosen.shape[1]).cpu())

    for indices in by_length(features.lengths, subject.recipe.eval.batch_size):
        _run(subject, features, indices, judge)
    if not found:
        return None
    return torch.cat(found)[torch.cat(rows).argsort(stable=True)].numpy()


def _latency(own: Measurable, other: Measurable, rows: int, count: int) -> dict[str, float]:
    """Seconds that a batch of so many rows takes, tokenised already: the median of several."""

    def answering(subject: Measurable) -> Callable[[int], None]:
        features = next(iter(subject.splits.values()))[1]

        def answer(turn: int) -> None:
            indices = np.arange(turn * rows, (turn + 1) * rows) % len(features)
            _run(subject, features, indices, lambda parts: [scores.logits.float().cpu() for scores in parts])

        return answer

    return in_turns({"own": answering(own), "other": answering(other)}, count)


@torch.no_grad()
def _run(subject: Measurable, features: FeatureSet, indices: np.ndarray, judge: Callable[[Iterator[Scores]], Any]) -> None:
    batch = collate(features, indices, subject.tokenizer.pad_token_id)
    subject.wrapped.eval()(batch.to(subject.accelerator.device), judge)
