"""How embeddings are compared: the losses of rows of texts, which may look at all rows of a batch, and metrics of whole sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from ftkit.tasks.problems import correlations
from ftkit.tasks.streaming import Streaming

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Scores
    from ftkit.tasks import Metrics
    from ftkit.tasks.streaming import Kept

TIE = 1e-6  # cosines that differ by less are those of equal texts, computed in other batches
BLOCK = 1024  # rows that are compared with all at a time


class Contrast(Protocol):
    """What is asked of the embeddings of rows."""

    metric_names: ClassVar[tuple[str, ...]]  # the main one first

    def losses(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of n rows of P texts, [n, P, H] and [n]: float32 [n], whose mean is the loss of the batch."""
        ...

    def metrics(self) -> Metrics: ...


class InBatch:
    """The second text of a row is told from those of the other rows, and from all further ones: the cross-entropy of cosines times `scale`.

    MultipleNegativesRankingLoss of sentence-transformers (arXiv 1705.00652, 4.4); `symmetric`: by half that of the first texts.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("mrr_10", "ndcg_10", "recall_1", "recall_10", "loss")

    def __init__(self, scale: float, symmetric: bool) -> None:
        self.scale, self.symmetric = scale, symmetric

    def losses(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn import functional as F

        own = torch.arange(len(embeddings), device=embeddings.device)
        texts, candidates = sides(embeddings)
        losses = F.cross_entropy(self.scale * texts @ candidates.T, own, reduction="none")
        if self.symmetric:
            losses = (losses + F.cross_entropy(self.scale * candidates[own] @ texts.T, own, reduction="none")) / 2
        return losses

    def metrics(self) -> RetrievalMetrics:
        return RetrievalMetrics(self)


class Cosine:
    """The cosine of two texts is their score: squared error (CosineSimilarityLoss of sentence-transformers)."""

    metric_names: ClassVar[tuple[str, ...]] = ("spearman", "pearson", "loss")

    def losses(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.of(cosines(embeddings), targets)

    def of(self, said: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        """Of cosines [n] and scores [n]: [n]."""
        return (said - gold).square()

    def metrics(self) -> SimilarityMetrics:
        return SimilarityMetrics(self)


class Order:
    """Of two rows, that of the higher score has the higher cosine (CoSENT, doi:10.1109/TASLP.2024.3402087; CoSENTLoss of sentence-transformers).

    log(1 + sum of exp(scale * (cosine of the lower - cosine of the higher))) over all pairs of rows with different scores:
    one number for the batch, which each row has.
    """

    metric_names: ClassVar[tuple[str, ...]] = Cosine.metric_names

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def losses(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.of(cosines(embeddings), targets)

    def of(self, said: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        """Of cosines [n] and scores [n]: [n], all the same.  Sorted, n rows take n log n steps in place of n * n."""
        import torch

        gold, order = gold.sort()
        said = self.scale * said[order]
        nothing = said.new_full((1,), -torch.inf)
        from_here_up = torch.cat(((-said).flip(0).logcumsumexp(0).flip(0), nothing))  # log of the sum of exp(-cosine) from a row on
        higher = torch.searchsorted(gold, gold, right=True)  # the first row of a higher score
        return torch.cat((said.new_zeros(1), said + from_here_up[higher])).logsumexp(0).expand(len(gold))

    def metrics(self) -> SimilarityMetrics:
        return SimilarityMetrics(self)


def cosines(embeddings: torch.Tensor) -> torch.Tensor:
    """Of the first two texts of each row, [n, P, H]: float32 [n]."""
    from torch.nn import functional as F

    return F.cosine_similarity(embeddings[:, 0].float(), embeddings[:, 1].float(), dim=-1)


def sides(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first texts of rows [n, P, H] and all others, of length 1: [n, H] and [n * (P - 1), H], the second texts before the third ones."""
    from torch.nn import functional as F

    unit = F.normalize(embeddings, dim=-1)
    return unit[:, 0], unit[:, 1:].transpose(0, 1).flatten(0, 1)


class SimilarityMetrics(Streaming):
    """Correlation of cosines and scores, by ranks and by numbers; the loss is that of all rows as one batch."""

    def __init__(self, contrast: Cosine | Order) -> None:
        super().__init__()
        self.contrast = contrast

    def update(self, scores: Scores) -> None:
        import torch

        self.sums["weights"] += scores.weights.double().sum().cpu()
        self.keep("pairs", torch.stack((cosines(scores.logits), scores.targets), 1)[scores.weights > 0])

    def compute(self) -> dict[str, float]:
        """From -1 to 1; 0 where all numbers are the same."""
        said, gold = self.all("pairs").unbind(1)
        loss = self.contrast.of(said, gold).mean().item()
        return correlations(said, gold) | {"loss": loss, "loss_count": self.sums["weights"].item()}


class RetrievalMetrics(Streaming):
    """Where a text's own second text is among those of all rows, and all further ones, by cosine; the loss is that of all rows as one batch.

    Embeddings are on disk where they are many; of texts BLOCK at a time are compared with all others, BLOCK at a time.
    """

    def __init__(self, contrast: InBatch) -> None:
        super().__init__()
        self.contrast = contrast

    def update(self, scores: Scores) -> None:
        self.sums["weights"] += scores.weights.double().sum().cpu()
        self.keep("embeddings", scores.logits[scores.weights > 0])

    def compute(self) -> dict[str, float]:
        """Fractions from 0 to 1, of the ten nearest texts; equal texts are no nearer than each other."""
        import torch

        found = self.kept["embeddings"]
        places, total = [], 0.0
        for own in found.blocks(BLOCK):
            nearer, losses = self._among(found, *_unit(own))
            places.append(1 + nearer)
            total += losses.double().sum().item()
        place = torch.cat(places).double()
        near = place <= 10
        return {
            "mrr_10": (near / place).mean().item(),
            "ndcg_10": (near / (place + 1).log2()).mean().item(),
            "recall_1": (place == 1).double().mean().item(),
            "recall_10": near.double().mean().item(),
            "loss": total / len(found),
            "loss_count": self.sums["weights"].item(),
        }

    def _among(self, found: Kept, texts: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of k rows, texts [k, H] and their candidates [k, P - 1, H]: how many of all candidates are nearer than their own, and the loss."""
        import torch

        right = (texts * candidates[:, 0]).sum(-1)
        nearer = torch.zeros(len(texts), dtype=torch.int64)
        among_candidates, among_texts = (torch.full((len(texts),), -torch.inf) for _ in range(2))
        for others in found.blocks(BLOCK):
            other_texts, other_candidates = _unit(others)
            similarities = texts @ other_candidates.flatten(0, 1).T
            nearer += (similarities > right[:, None] + TIE).sum(1)
            among_candidates = torch.logaddexp(among_candidates, (self.contrast.scale * similarities).logsumexp(1))
            if self.contrast.symmetric:
                among_texts = torch.logaddexp(among_texts, (self.contrast.scale * candidates[:, 0] @ other_texts.T).logsumexp(1))
        losses = among_candidates - self.contrast.scale * right
        return nearer, (losses + among_texts - self.contrast.scale * right) / 2 if self.contrast.symmetric else losses


def _unit(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first texts of rows [n, P, H], and the others [n, P - 1, H], of length 1."""
    from torch.nn import functional as F

    unit = F.normalize(embeddings, dim=-1)
    return unit[:, 0], unit[:, 1:]
