"""A run beside another one, such as a student beside its teacher: how much of the score it keeps, how often both say the same, size and latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ftkit.data.batches import by_length, collate
from ftkit.errors import RecipeError
from ftkit.model import num_values
from ftkit.summary import LOWER_IS_BETTER

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Scores
    from ftkit.evaluate import Measurable, Measured
    from ftkit.recipe.spec import Recipe
    from ftkit.tasks import Task

TIMED = {1: 32, 32: 8}  # rows in a batch -> batches whose median is told
WARM_UP = 2  # batches before these


class Side(NamedTuple):
    """What is told of either run."""

    scores: dict[str, float]  # of each set, by the task's main metric
    choices: dict[str, np.ndarray | None]  # of each set, what the model takes for right, item by item; None where it chooses nothing
    vocabulary: dict[str, int]
    parameters: int
    bytes: int  # that they take in memory
    latency_seconds: dict[int, float]  # by rows in a batch


def check(own: Recipe, other: Recipe, name: str) -> None:
    """Refuse a run of another task or of other labels, whose scores mean something else."""
    if other.task.kind != own.task.kind:
        raise RecipeError(f"--against: {name} was trained for {other.task.kind}, and this run for {own.task.kind}")
    labels, others = (list(getattr(each.task, "labels", None) or ()) for each in (own, other))
    if labels != others:
        raise RecipeError(f"--against: {name} has the labels {', '.join(others)}, and this run {', '.join(labels)}; they must be the same, in the same order")


def side(subject: Measurable, measured: Mapping[str, Measured]) -> Side:
    """Of a run that was measured just now."""
    metric, parameters = subject.recipe.task.main_metric, list(subject.trainee.model.parameters())
    features = next(iter(subject.splits.values()))[1]
    return Side(
        scores={name: result.metrics.compute()[metric] for name, result in measured.items()},
        choices={name: _choices(subject, features) for name, (_, features) in subject.splits.items()},
        vocabulary=subject.tokenizer.get_vocab(),
        parameters=sum(map(num_values, parameters)),
        bytes=sum(parameter.nbytes for parameter in parameters),
        latency_seconds={rows: _latency(subject, features, rows, count) for rows, count in TIMED.items()},
    )


def compare(own: Side, other: Side, task: Task, name: str) -> dict[str, Any]:
    """{run, metric, sets: {name: {own, other, kept, agreement}}, parameters, bytes, latency_seconds: {own, other}}.

    `kept` is the share of the other's score, 1 where they are equal; `agreement` None where the items of the two are not the same.
    """
    metric, sets = task.main_metric, {}
    same_items = own.vocabulary == other.vocabulary or task.auto_class == "AutoModelForSequenceClassification"
    for split, score in own.scores.items():
        better, base = (other.scores[split], score) if metric in LOWER_IS_BETTER else (score, other.scores[split])
        choices, others = own.choices[split], other.choices[split]
        both = same_items and choices is not None and others is not None and len(choices) == len(others)
        sets[split] = {
            "own": score,
            "other": other.scores[split],
            "kept": better / base if base else None,
            "agreement": float(np.mean(choices == others)) if both else None,
        }
    pairs = {key: {"own": getattr(own, key), "other": getattr(other, key)} for key in ("parameters", "bytes")}
    latency = {str(rows): {"own": seconds, "other": other.latency_seconds[rows]} for rows, seconds in own.latency_seconds.items()}
    return {"run": name, "metric": metric, "sets": sets, **pairs, "latency_seconds": latency}


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


def _latency(subject: Measurable, features: FeatureSet, rows: int, count: int) -> float:
    """Seconds that a batch of so many rows takes, tokenised already: the median of several."""
    seconds = []
    for number in range(WARM_UP + count):
        indices = np.arange(number * rows, (number + 1) * rows) % len(features)
        start = time.perf_counter()
        _run(subject, features, indices, lambda parts: [scores.logits.float().cpu() for scores in parts])
        seconds.append(time.perf_counter() - start)
    return median(seconds[WARM_UP:])


@torch.no_grad()
def _run(subject: Measurable, features: FeatureSet, indices: np.ndarray, judge: Callable[[Iterator[Scores]], Any]) -> None:
    batch = collate(features, indices, subject.tokenizer.pad_token_id)
    subject.wrapped.eval()(batch.to(subject.accelerator.device), judge)
