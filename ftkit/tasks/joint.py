"""Metrics of two losses that are added: that of hidden tokens, and that of one more question about the same text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftkit.tasks import language_model
from ftkit.tasks.language_model import LanguageModelMetrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from ftkit.data.types import Scores

NAMES = ("loss", "perplexity", "token_accuracy", "accuracy", "f1_binary")
TOKENS, QUESTION = 0, 1  # the parts that items and scores are of


class JointMetrics(LanguageModelMetrics):
    """`perplexity` and `token_accuracy` of the hidden tokens, `accuracy` and `f1_binary` of the question; `loss`: both means, added as in training.

    The question is told of items that are no tokens by their part; it has two answers, as classes or as one label.
    """

    def __init__(self, share: float = 1.0) -> None:
        import torch

        super().__init__()
        self.share = share  # of the question's mean in the loss
        self.sums |= {f"question_{name}": torch.zeros((), dtype=torch.float64) for name in ("loss", "count", "correct", "hit", "said", "true")}

    def update(self, scores: Scores) -> None:
        if scores.part != QUESTION:
            super().update(scores)
            return
        from ftkit.objectives import losses

        said, true = answers(scores)
        found = {"loss": losses(scores), "count": said.new_ones(said.shape), "correct": said == true, "hit": said & true, "said": said, "true": true}
        weights = scores.weights.double()
        for name, values in found.items():
            self.sums[f"question_{name}"] += (values.double() * weights).sum().cpu()

    def compute(self) -> dict[str, float]:
        """`loss_count` is that of both."""
        values = super().compute()
        question = {name.removeprefix("question_"): value.item() for name, value in self.sums.items() if name.startswith("question_")}
        count = question["count"] or float("nan")
        return values | {
            "loss": values["loss"] + self.share * question["loss"] / count,
            "accuracy": question["correct"] / count,
            "f1_binary": 2 * question["hit"] / max(question["said"] + question["true"], 1e-12),
            "loss_count": values["loss_count"] + question["count"],
        }


def answers(scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [n], [n]: whether the second of two answers was given to each question, and whether it is right."""
    if scores.kind == "labels":
        return scores.logits.squeeze(-1) > 0, scores.targets.squeeze(-1) > 0
    return scores.logits.argmax(-1) == 1, scores.targets == 1


def probabilities(scores: Scores) -> torch.Tensor:
    """float32 [n]: of the second answer."""
    logits = scores.logits.float()
    return logits.squeeze(-1).sigmoid() if scores.kind == "labels" else logits.softmax(-1)[:, 1]


def of_masks(parts: Iterable[Scores]) -> tuple[dict[int, dict[str, Any]], list[Scores]]:
    """Of each feature how many of its tokens are hidden and their mean loss; and the scores of the question."""
    known = list(parts)
    found = language_model.records(each for each in known if each.part == TOKENS)
    masks = {record["feature"]: {"masks": record["tokens"], "mask_loss": record["loss"]} for record in found}
    return masks, [each for each in known if each.part == QUESTION]
