"""What a text can be told: its one class, any of several labels, or a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeAlias

from pydantic import AfterValidator, Field

from ftkit.data.types import RowError
from ftkit.tasks.classes import by_class, counts_of, name_of, of_confusion, redrawn, some
from ftkit.tasks.streaming import Streaming

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Losses, Scores, Targets
    from ftkit.tasks import Metrics

BINS = 15  # of probabilities, for the calibration error (arXiv 1706.04599)
RANKED_CLASSES = 20  # up to here all probabilities are kept, for AUROC


class Problem(Protocol):
    """How values become targets, and logits answers."""

    targets: ClassVar[Targets]
    column: ClassVar[str]
    problem_type: ClassVar[str]  # transformers' name of it
    metric_names: tuple[str, ...]
    main_metric: ClassVar[str]

    @property
    def losses(self) -> Losses | None:
        """Other ones than those of the targets."""
        ...

    def target(self, value: Any) -> list[int] | list[float]:
        """What a row's column says, as the numbers that make up a target.  Raises RowError."""
        ...

    @property
    def nothing(self) -> list[int] | list[float]:
        """The target of a row without the column."""
        ...

    def metrics(self) -> Metrics: ...

    def records(self, scores: Scores) -> Iterator[dict[str, Any]]:
        """What was said of each item beside what it is."""
        ...

    def answers(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        """What is said of each item, logits [n, C]."""
        ...


class OneClass:
    """One of the classes; probabilities are the softmax of the logits."""

    targets: ClassVar[Targets] = "classes"
    column: ClassVar[str] = "label"
    problem_type: ClassVar[str] = "single_label_classification"
    main_metric: ClassVar[str] = "accuracy"
    losses: Losses | None = None

    def __init__(self, names: Sequence[str] | None) -> None:
        self.names = names or ()
        of_two = ("f1_binary",) if names is None or len(names) == 2 else ()
        of_few = ("auroc",) if names is None or len(names) <= RANKED_CLASSES else ()
        self.metric_names = ("accuracy", "f1", *of_two, *of_few, "mcc", "ece", "loss")

    def target(self, value: Any) -> list[int]:
        name = name_of(value)
        if name not in self.names:
            raise RowError(f"label {name!r} does not occur in the training rows (known: {some(list(self.names))})")
        return [self.names.index(name)]

    @property
    def nothing(self) -> list[int]:
        return [0]

    def metrics(self) -> ClassMetrics:
        return ClassMetrics(self.names)

    def records(self, scores: Scores) -> Iterator[dict[str, Any]]:
        best, index = scores.logits.float().softmax(-1).max(-1)
        for gold, said, p in zip(scores.targets.tolist(), index.tolist(), best.tolist(), strict=True):
            yield {"label": self.names[gold], "prediction": self.names[said], "probability": p}

    def answers(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        answers = [dict(zip(self.names, row, strict=True)) for row in logits.float().softmax(-1).tolist()]
        return [{"label": max(scores, key=scores.__getitem__), "probability": max(scores.values()), "scores": scores} for scores in answers]


class AnyLabels:
    """Any of the labels, or none; each has a probability of its own, the sigmoid of its logit."""

    targets: ClassVar[Targets] = "labels"
    column: ClassVar[str] = "label"
    problem_type: ClassVar[str] = "multi_label_classification"
    main_metric: ClassVar[str] = "f1"
    metric_names: tuple[str, ...] = ("f1", "f1_micro", "accuracy", "auroc", "loss")
    losses: Losses | None = None

    def __init__(self, names: Sequence[str] | None, threshold: float) -> None:
        self.names, self.threshold = names or (), threshold

    def target(self, value: Any) -> list[float]:
        given = self.named(value)
        if unknown := [name for name in given if name not in self.names]:
            raise RowError(f"label {unknown[0]!r} does not occur in the training rows (known: {some(list(self.names))})")
        return [float(name in given) for name in self.names]

    @property
    def nothing(self) -> list[float]:
        return [0.0] * len(self.names)

    @staticmethod
    def named(value: Any) -> list[str]:
        """The names in a list of labels; a label alone is a list of one."""
        return [name_of(each) for each in value] if isinstance(value, list) else [name_of(value)]

    def metrics(self) -> LabelMetrics:
        return LabelMetrics(self.names, self.threshold)

    def records(self, scores: Scores) -> Iterator[dict[str, Any]]:
        for gold, answer in zip(scores.targets.tolist(), self.answers(scores.logits), strict=True):
            labels = [name for name, target in zip(self.names, gold, strict=True) if target]
            yield {"labels": labels, "predictions": answer["labels"], "probabilities": answer["scores"]}

    def answers(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        answers = [dict(zip(self.names, row, strict=True)) for row in logits.float().sigmoid().tolist()]
        return [{"labels": [name for name, p in scores.items() if p >= self.threshold], "scores": scores} for scores in answers]


class Number:
    """A number, such as how alike two texts are."""

    targets: ClassVar[Targets] = "numbers"
    column: ClassVar[str] = "score"
    problem_type: ClassVar[str] = "regression"
    main_metric: ClassVar[str] = "spearman"
    metric_names: tuple[str, ...] = ("pearson", "spearman", "mse", "loss")
    losses: Losses | None = None

    def target(self, value: Any) -> list[float]:
        return [number_of(value)]

    @property
    def nothing(self) -> list[float]:
        return [0.0]

    def metrics(self) -> NumberMetrics:
        return NumberMetrics()

    def records(self, scores: Scores) -> Iterator[dict[str, Any]]:
        for gold, said in zip(scores.targets.tolist(), scores.logits.float().squeeze(-1).tolist(), strict=True):
            yield {"score": gold, "prediction": said}

    def answers(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        return [{"score": said} for said in logits.float().squeeze(-1).tolist()]


def number_of(score: Any) -> float:
    """What a row's score says.  Raises RowError."""
    try:
        number = float(score)
    except (TypeError, ValueError):
        raise RowError(f"score {score!r} is not a number") from None
    if isinstance(score, bool) or not math.isfinite(number):
        raise RowError(f"score {score!r} is not a finite number")
    return number


def _ascending(bounds: list[float]) -> list[float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("give the lowest score, then the highest")
    return bounds


ScoreRange: TypeAlias = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_ascending)]


def share_of(score: Any, bounds: Sequence[float]) -> float:
    """Where a score lies between the lowest and the highest one, 0 to 1.  Raises RowError."""
    lowest, highest = bounds
    number = number_of(score)
    if not lowest <= number <= highest:
        raise RowError(f"score {score!r} is outside of task.score_range: {lowest:g} to {highest:g}")
    return (number - lowest) / (highest - lowest)


# --- metrics --------------------------------------------------------------------------------------------------------


class ClassMetrics(Streaming):
    """Of one confusion matrix: accuracy, F1 and MCC; of probabilities: the calibration error, and AUROC of a few classes."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        super().__init__(confusion=(len(names), len(names)), bins=(BINS, 3))  # [gold, predicted]; rows, probabilities, right ones

    def update(self, scores: Scores) -> None:
        import torch

        self.add_loss(scores)
        counted = scores.weights > 0
        probabilities = scores.logits[counted].float().softmax(-1)
        best, said = (part.cpu() for part in probabilities.max(-1))
        gold = scores.targets[counted].cpu()
        ones = torch.ones(len(gold), dtype=torch.float64)
        self.sums["confusion"].index_put_((gold, said), ones, accumulate=True)
        places = (best * BINS).ceil().long().clamp(1, BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
        self.sums["bins"].index_add_(0, places, torch.stack((ones, best.double(), (gold == said).double()), 1))
        if len(self.names) <= RANKED_CLASSES:
            self.keep("ranked", torch.cat((probabilities.cpu(), gold.float().unsqueeze(1)), 1))

    def compute(self) -> dict[str, float]:
        """Fractions from 0 to 1; `f1` and `auroc` are means over the labels, one against the rest, of which they are defined."""
        rows, probabilities, right = self.sums["bins"].unbind(1)
        found = of_confusion(self.sums["confusion"]) | {"ece": ((probabilities - right).abs().sum() / rows.sum()).item()}
        return found | (self._ranked(self.all("ranked")) if self.kept else {}) | self.loss()

    def _ranked(self, items: torch.Tensor) -> dict[str, float]:
        """AUROC of rows of probabilities and the class, float64 [k, C + 1]; of two classes that of the second."""
        first = 1 if len(self.names) == 2 else 0
        classes = range(first, len(self.names))
        return mean_auroc(items[:, first:-1].T, [items[:, -1] == i for i in classes])

    def draws(self) -> Iterator[dict[str, float]]:
        """Of what is counted, and AUROC of two classes."""
        yield from map(of_confusion, redrawn(self.sums["confusion"]))
        if len(self.names) == 2 and self.kept:
            yield from map(self._ranked, self.redrawn(self.all("ranked")))

    def details(self) -> dict[str, Any]:
        """Beside the intervals, each class, and `confusion`, [label, prediction]."""
        confusion = self.sums["confusion"]
        classes = by_class(self.names, *counts_of(confusion))
        return super().details() | {"classes": classes, "confusion": confusion.long().tolist()}


class LabelMetrics(Streaming):
    """F1 over the labels (macro) and over all (micro), rows that are right in all labels, and the mean AUROC of the labels."""

    def __init__(self, names: Sequence[str], threshold: float) -> None:
        super().__init__()
        self.names, self.threshold = names, threshold

    def update(self, scores: Scores) -> None:
        import torch

        self.add_loss(scores)
        counted = scores.weights > 0
        self.keep("labels", torch.stack((scores.logits[counted].float().sigmoid(), scores.targets[counted]), 1))

    def compute(self) -> dict[str, float]:
        """Fractions from 0 to 1; `f1` and `auroc` leave out labels of which they are not defined."""
        items = self.all("labels")
        probabilities, gold = items.unbind(1)
        return self._counted(items) | mean_auroc(probabilities.T, gold.T) | self.loss()

    def _counted(self, items: torch.Tensor) -> dict[str, float]:
        """Metrics of probabilities and labels, float64 [k, 2, L]."""
        gold, said, both = self._counts(items)
        f1 = (2 * both / (gold + said).clamp(min=1e-12))[gold + said > 0]
        right = (items[:, 0] >= self.threshold) == (items[:, 1] > 0)
        return {
            "f1": f1.mean().item() if len(f1) else 0.0,
            "f1_micro": (2 * both.sum() / (gold + said).sum().clamp(min=1e-12)).item(),
            "accuracy": right.all(1).double().mean().item(),
        }

    def _counts(self, items: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """How often each label is right, was said, and both, float64 [L]."""
        said, gold = items[:, 0] >= self.threshold, items[:, 1] > 0
        return gold.sum(0).double(), said.sum(0).double(), (gold & said).sum(0).double()

    def draws(self) -> Iterable[dict[str, float]]:
        """Of what is counted."""
        return map(self._counted, self.redrawn(self.all("labels")))

    def details(self) -> dict[str, Any]:
        """Beside the intervals, each label."""
        return super().details() | {"classes": by_class(self.names, *(part.tolist() for part in self._counts(self.all("labels"))))}


class NumberMetrics(Streaming):
    """Correlation by numbers and by ranks, and the mean squared error."""

    def update(self, scores: Scores) -> None:
        import torch

        self.add_loss(scores)
        self.keep("pairs", torch.stack((scores.logits.float().squeeze(-1), scores.targets), 1)[scores.weights > 0])

    def compute(self) -> dict[str, float]:
        """`pearson` and `spearman` from -1 to 1; 0 where all numbers are the same."""
        return of_numbers(self.all("pairs")) | self.loss()

    def draws(self) -> Iterable[dict[str, float]]:
        """Of all."""
        return map(of_numbers, self.redrawn(self.all("pairs")))


def of_numbers(pairs: torch.Tensor) -> dict[str, float]:
    """Metrics of numbers said and right ones, float64 [n, 2]."""
    said, gold = pairs.unbind(1)
    return correlations(said, gold) | {"mse": (said - gold).square().mean().item()}


def correlations(said: torch.Tensor, gold: torch.Tensor) -> dict[str, float]:
    """By numbers and by ranks, float64 [n] each."""
    return {"pearson": pearson(said, gold), "spearman": pearson(ranks(said), ranks(gold))}


def pearson(one: torch.Tensor, other: torch.Tensor) -> float:
    """The correlation of two rows of numbers, float64 [n]; 0 where one of them does not vary."""
    one, other = one - one.mean(), other - other.mean()
    scale = (one.square().sum() * other.square().sum()).sqrt().item()
    return (one @ other).item() / scale if scale else 0.0


def ranks(numbers: torch.Tensor) -> torch.Tensor:
    """float64 [n], from 1: the place of each in ascending order, the mean of their places for equal ones."""
    _, of_each, counts = numbers.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[of_each].double()


def auroc(said: torch.Tensor, gold: torch.Tensor) -> float:
    """How often one of the class is said to be likelier than one of the other, ties by half (doi:10.1016/j.patrec.2005.10.010); NaN where one is missing."""
    positive = gold > 0.5
    ones, zeros = positive.sum().item(), (~positive).sum().item()
    if not ones or not zeros:
        return math.nan
    return (ranks(said)[positive].sum().item() - ones * (ones + 1) / 2) / (ones * zeros)


def mean_auroc(said: Iterable[torch.Tensor], gold: Iterable[torch.Tensor]) -> dict[str, float]:
    """`auroc`, the mean of that of each class (scikit-learn's macro average); of none where it is not defined for any."""
    defined = [value for value in map(auroc, said, gold) if not math.isnan(value)]
    return {"auroc": sum(defined) / len(defined)} if defined else {}


def balanced(counts: Mapping[str, int]) -> dict[str, float]:
    """Weights with which all classes count alike, of a mean of 1 over the rows (scikit-learn's `balanced`)."""
    total = sum(counts.values())
    return {name: total / (len(counts) * count) for name, count in counts.items()}
