"""Reranking: how well a text answers a query, read together (a cross-encoder, arXiv 1901.04085)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.data.types import Row
from ftkit.recipe.spec import option
from ftkit.tasks import Column, Shape
from ftkit.tasks.problems import ScoreRange, auroc, share_of
from ftkit.tasks.streaming import Streaming
from ftkit.tasks.text_classification import EXAMPLES
from ftkit.tasks.text_task import TextTask

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Losses, Scores, Targets

QUERY = Column("text", "a query", "query", "question", "anchor", "sentence1")
PASSAGE = Column("text_pair", "a text that may answer it", "passage", "document", "answer", "response", "positive", "sentence2")
RELEVANCE = Column("score", "how well it does: 0, 1, or between", "relevance", "label", "labels", "similarity_score")


class Reranking(TextTask):
    """A number from 0 to 1 for a query and a text: how well it answers it."""

    kind: Literal["reranking"] = "reranking"
    score_range: ScoreRange = option([0.0, 1.0], "the scores of a text that does not answer at all, and of one that answers as well as can be, such as [0, 3]")

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(QUERY, PASSAGE, RELEVANCE),)

    @property
    def _problem(self) -> Relevance:
        return Relevance(self.score_range)

    def examples(self) -> list[dict[str, Any]]:
        """A true sentence and a false one for each of half as many queries."""
        low, high = self.score_range
        queries = [text for text, _, _ in EXAMPLES[::2] for _ in range(2)]
        return [
            {"text": query, "text_pair": pair, "score": high if i % 2 else low} for i, (query, (_, pair, _)) in enumerate(zip(queries, EXAMPLES, strict=True))
        ]

    def resolve(self, rows: Iterable[Row]) -> Reranking:
        """Nothing depends on the rows."""
        return self

    def config_kwargs(self) -> dict[str, Any]:
        """One output, as sentence-transformers' CrossEncoder has it."""
        return {"num_labels": 1, "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": self._problem.problem_type}

    def _target(self, row: Row) -> list[float]:
        """The relevance, and the query in two numbers."""
        return [*super()._target(row), *_key(row.values["text"])]


class Relevance:
    """How well a text answers a query, the sigmoid of one logit; targets [n, 3] also say which query it is."""

    targets: ClassVar[Targets] = "numbers"
    column: ClassVar[str] = "score"
    problem_type: ClassVar[str] = "multi_label_classification"  # which transformers learns by binary cross-entropy
    main_metric: ClassVar[str] = "auroc"
    metric_names: tuple[str, ...] = ("auroc", "mrr_10", "ndcg_10", "loss")

    def __init__(self, score_range: list[float]) -> None:
        self.score_range = score_range

    def target(self, value: Any) -> list[float]:
        return [share_of(value, self.score_range)]

    @property
    def nothing(self) -> list[float]:
        return [0.0]

    @property
    def losses(self) -> Losses:
        """Binary cross-entropy, BinaryCrossEntropyLoss of sentence-transformers."""
        from torch.nn import functional as F

        return lambda logits, targets: F.binary_cross_entropy_with_logits(logits.squeeze(-1), targets[:, 0], reduction="none")

    def metrics(self) -> RankingMetrics:
        return RankingMetrics()

    def records(self, scores: Scores) -> Iterator[dict[str, Any]]:
        for gold, said in zip(scores.targets[:, 0].tolist(), scores.logits.float().sigmoid().squeeze(-1).tolist(), strict=True):
            yield {"relevance": gold, "prediction": said}

    def answers(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        return [{"score": said} for said in logits.float().sigmoid().squeeze(-1).tolist()]


class RankingMetrics(Streaming):
    """How relevant texts are ranked among those of their query, and among all."""

    def update(self, scores: Scores) -> None:
        import torch

        self.add_loss(scores)
        self.keep("rows", torch.cat((scores.logits.float(), scores.targets), 1)[scores.weights > 0])

    def compute(self) -> dict[str, float]:
        """Fractions from 0 to 1; queries whose texts are all as relevant have no rank to measure, and a set of such ones only no `mrr_10` and `ndcg_10`.

        A text that is half as relevant as can be, or more, is one that answers, for `auroc` and `mrr_10`; the gain of `ndcg_10`
        is the relevance.  Of equal numbers the less relevant text is taken to come first.
        """
        import torch

        said, gold, *key = self.all("rows").unbind(1)
        _, query = torch.stack(key, 1).unique(dim=0, return_inverse=True)
        order = gold.argsort(stable=True)
        order = order[said[order].argsort(descending=True, stable=True)]
        order = order[query[order].argsort(stable=True)]
        ranked = [part for part in gold[order].split(query.bincount().tolist()) if part.min() < part.max()]
        found = {"auroc": auroc(said, gold)}
        if ranked:
            found["mrr_10"] = sum(map(_reciprocal_rank, ranked)) / len(ranked)
            found["ndcg_10"] = sum(_gain(part) / _gain(part.sort(descending=True).values) for part in ranked) / len(ranked)
        return {name: value for name, value in found.items() if value == value} | self.loss()


def _reciprocal_rank(relevance: torch.Tensor) -> float:
    """1 / the place of the first text that answers, if that is among the first ten; float64 [n], in the order of the ranks."""
    places = (relevance[:10] >= 0.5).nonzero()
    return 1 / (places[0].item() + 1) if len(places) else 0.0


def _gain(relevance: torch.Tensor) -> float:
    """Discounted cumulative gain of the first ten (doi:10.1145/582415.582418)."""
    import torch

    first = relevance[:10]
    return (first / torch.arange(2, len(first) + 2).log2()).sum().item()


def _key(text: str) -> list[float]:
    """A query as two whole numbers that float32 holds: of 100,000 queries two have the same in one case of 50,000."""
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
    return [float(int.from_bytes(digest[:3])), float(int.from_bytes(digest[3:]))]
