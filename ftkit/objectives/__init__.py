"""Objectives: what is minimised.  One file a kind; `Objective` is the contract they all fulfil."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Scores


def losses(scores: Scores, label_smoothing: float = 0.0) -> torch.Tensor:
    """float32 [n]: how far each item is from its target, as the task or the kind of target says; only the loss of classes is smoothed."""
    import torch
    from torch.nn import functional as F

    logits = scores.logits.float()
    if scores.losses is not None:
        with torch.autocast(logits.device.type, enabled=False):  # products of embeddings need float32, too
            return scores.losses(logits, scores.targets)
    if scores.kind == "labels":
        return F.binary_cross_entropy_with_logits(logits, scores.targets, reduction="none").mean(-1)
    if scores.kind == "numbers":
        return (logits.squeeze(-1) - scores.targets).square()
    smoothing = label_smoothing if scores.kind == "classes" else 0.0
    return F.cross_entropy(logits, scores.targets, reduction="none", label_smoothing=smoothing)


class Objective(Protocol):
    """A loss over supervised items.

    One that compares with a teacher has `teacher`, the run that this is: its scores of the items lie beside the model's in training.
    One that asks something of the task or the rows has `check(task, tokenizer, limits)`, which raises RecipeError before anything is loaded;
    one that names something on the hub has `pinned()`, which gives it with the very commit.
    """

    kind: str
    in_chunks: bool  # output head and loss see some of the supervised items at a time
    label_smoothing: float | None  # of a cross-entropy with the targets, which can also see some of the classes at a time; None: another loss

    def loss(self, scores: Scores) -> torch.Tensor:
        """The weighted SUM of the losses of the items, float32; the loop divides by the sum of the weights."""
        ...
