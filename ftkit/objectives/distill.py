"""Knowledge distillation (arXiv 1503.02531): the student should say what a trained teacher says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.recipe.spec import Name, Spec, option

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Limits, Scores
    from ftkit.tasks import Task

IMPOSSIBLE = -1e4  # a logit whose probability float32 cannot tell from 0; with -inf differences are none


class Distill(Spec):
    """Scores of a teacher: alpha times the loss on the data's own targets, and (1 - alpha) T^2 times the divergence from softened scores."""

    kind: Literal["distill"] = "distill"
    teacher: Name = option(..., "run directory of the trained teacher, of the same task")
    alpha: float = option(0.1, "share of the loss on the data's own targets", "the considerably lower weight of arXiv 1503.02531, 2.2", ge=0, le=1)
    temperature: float = option(2.0, "what the scores of both are divided by; 1 in evaluation", "DistilBERT's train.py, within 1503.02531's 1 to 20", gt=0)
    divergence: Literal["forward", "reverse", "jensen-shannon"] = option(
        "forward", "KL(teacher || student); reverse: KL(student || teacher) (arXiv 2306.08543); jensen-shannon: of both from their mean (2306.13649)"
    )
    cache: bool = option(True, "ask the teacher once for all training rows and keep its answers for later epochs and runs; false: in each step")
    top_k: int = option(64, "of many classes, such as a vocabulary, the cache has the scores of so many, and what is left for the others", ge=1)
    in_chunks: bool = option(True, "in training, output heads and loss for some of the supervised items at a time, where they are many")

    label_smoothing: ClassVar[None] = None

    def check(self, task: Task, tokenizer: Any, limits: Limits) -> None:
        from ftkit import teachers

        teachers.check(self.teacher, task, tokenizer, limits)

    def loss(self, scores: Scores) -> torch.Tensor:
        """Weighted sum over the n supervised items, in float32."""
        from ftkit.objectives import losses

        if len(scores.targets) == 0:  # keep the graph, so that every process has gradients to add up
            return scores.logits.float().sum()
        assert scores.teacher is not None
        student, teacher = _of_same_classes(scores.logits, scores.teacher)
        soft = self.temperature**2 * divergence(student, teacher, self.temperature, self.divergence, scores.kind == "labels")
        return ((self.alpha * losses(scores) + (1 - self.alpha) * soft) * scores.weights).sum()


def _of_same_classes(*logits: torch.Tensor) -> list[torch.Tensor]:
    """Those that all have: models of one tokenizer may be filled up to round numbers of tokens that do not exist."""
    count = min(each.shape[-1] for each in logits)
    return [each[..., :count] for each in logits]


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float, kind: str, independent: bool = False) -> torch.Tensor:
    """float32 [n]: how far the student's distribution over C classes is from the teacher's, both [n, C] logits.

    `independent`: of C yes-no answers instead, their mean.  A class that cannot be (-inf) counts for nothing, in gradients, too.
    """
    import torch
    from torch.nn import functional as F

    def distribution(logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, [n, C] or [n, C, 2]."""
        logits = (logits.float() / temperature).clamp(min=IMPOSSIBLE)
        return torch.stack((F.logsigmoid(logits), F.logsigmoid(-logits)), -1) if independent else logits.log_softmax(-1)

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """KL(one || other)."""
        return (one.exp() * (one - other)).sum(-1)

    own, given = distribution(student), distribution(teacher)
    if kind == "forward":
        found = kl(given, own)
    elif kind == "reverse":
        found = kl(own, given)
    else:
        middle = torch.logaddexp(own, given) - torch.log(own.new_tensor(2.0))
        found = (kl(given, middle) + kl(own, middle)) / 2
    return found.mean(-1) if independent else found
