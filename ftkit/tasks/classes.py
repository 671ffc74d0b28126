"""What tasks with classes share: their names as data files spell them, their order, and metrics of a confusion matrix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ftkit.data.types import RowError
from ftkit.errors import DataError, RecipeError
from ftkit.tasks.streaming import RESAMPLES

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Row
    from ftkit.tasks import Task

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


def name_of(label: Any, column: str = "label") -> str:
    """The name of a label as data files spell it: 1, 1.0, "1" and " 1" are one label, and so are true and "true"."""
    if isinstance(label, bool):
        return str(label).lower()
    if label is None or isinstance(label, list | dict):
        raise RowError(f"{column} {label!r} is neither a word nor a number")
    if isinstance(label, float):
        if not label.is_integer():
            raise RowError(f"{column} {label!r} is not a whole number; for regression use a regression task")
        label = int(label)
    name = str(label).strip()
    if not name:
        raise RowError(f"the {column} is empty")
    return name


def in_order(names: Collection[str]) -> list[str]:
    """Numbers in numeric order, words in alphabetic order."""
    numeric = all(WHOLE_NUMBER.fullmatch(name) for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)


def occurring(rows: Iterable[Row], named: Callable[[Row], Iterable[str]]) -> Counter[str]:
    """How often each label occurs in training rows, of which some may have none that can be used.  DataError where none has."""
    found, flaw = Counter[str](), ""
    for row in rows:
        try:
            found.update(named(row))
        except RowError as error:  # encode() says it of each such row
            flaw = flaw or f"{row.where}: {error}"
    if not found:
        raise DataError(f"the training rows have no label that can be used{f': {flaw}' if flaw else ''}")
    return found


def ordered(found: Collection[str], given: Sequence[str] | None, word: str = "label", at_least: int = 2) -> list[str]:
    """The names in the order of the model's outputs: those `given` as task.labels, or those of the training rows.

    Raises DataError where the rows have other names, or fewer than wanted, RecipeError where names are given twice.
    """
    names = in_order(found) if given is None else list(given)
    if missing := sorted(set(found) - set(names)):
        raise DataError(f"task.labels lacks {word}s of the training rows: {some(missing)}")
    if len(found) < at_least:
        raise DataError(f"the training rows have one {word} only ({some(sorted(found))}): there is nothing to tell apart")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"task.labels repeats a {word}: {some(repeated)}")
    return names


def other_labels(own: Task, other: Task) -> str | None:
    """What labels another run has, in comparison with this run's own, for a message; None where they are the same in the same order."""
    labels, others = (list(getattr(task, "labels", None) or ()) for task in (own, other))
    if labels == others:
        return None
    what = "the same labels in another order" if sorted(labels) == sorted(others) else "other labels"
    return f"{what}: {', '.join(others)}; this run has {', '.join(labels)}"


def some(names: list[str], limit: int = 10) -> str:
    """The first ones, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def of_confusion(confusion: torch.Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and MCC, from weighted counts [gold, predicted]: fractions from 0 to 1, and from -1.

    `f1` is averaged over the labels that occur or were predicted; `f1_binary`, of two labels, is that of the second.
    MCC is R_K of Gorodkin 2004 (doi:10.1016/j.compbiolchem.2004.09.006); of two classes that of Matthews 1975.
    """
    total, correct = confusion.sum().item(), confusion.trace().item()
    gold, said, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    f1 = (2 * hits / (gold + said).clamp(min=1e-12))[(gold + said) > 0]
    covariance = correct * total - (gold @ said).item()
    spread = ((total**2 - (said @ said).item()) * (total**2 - (gold @ gold).item())) ** 0.5
    metrics = {"accuracy": correct / total, "f1": f1.mean().item(), "mcc": covariance / spread if spread else 0.0}
    if len(confusion) == 2:
        metrics["f1_binary"] = (2 * hits[1] / (gold[1] + said[1]).clamp(min=1e-12)).item()
    return metrics


def redrawn(confusion: torch.Tensor) -> Iterator[torch.Tensor]:
    """Counts of as many items, drawn from the counted ones with replacement, again and again."""
    import numpy as np
    import torch

    generator = np.random.default_rng(0)
    filled = confusion.nonzero(as_tuple=True)
    counts = confusion[filled].long().numpy()
    for _ in range(RESAMPLES):
        drawn = torch.zeros_like(confusion)
        drawn[filled] = torch.from_numpy(generator.multinomial(counts.sum(), counts / counts.sum())).to(drawn.dtype)
        yield drawn


def counts_of(confusion: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    """How often each class is right, was said, and both."""
    return confusion.sum(1).tolist(), confusion.sum(0).tolist(), confusion.diagonal().tolist()


def by_class(names: Sequence[str], gold: Sequence[float], said: Sequence[float], both: Sequence[float]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each class, from how often it is right, was said, and both: 0 where it never was."""
    return {
        name: {"precision": b / s if s else 0.0, "recall": b / g if g else 0.0, "f1": 2 * b / (g + s) if g + s else 0.0, "support": int(g)}
        for name, g, s, b in zip(names, gold, said, both, strict=True)
    }
