"""The model should say what the data says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ftkit.recipe.spec import Spec, option

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Scores


class Supervised(Spec):
    """The data's own targets: cross-entropy of classes and positions, binary cross-entropy of labels (their mean), squared error of numbers."""

    kind: Literal["supervised"] = "supervised"
    in_chunks: bool = option(
        True, "in training, output head and loss for some of the supervised items, or of the classes, at a time, where they are many; false: all logits at once"
    )

    label_smoothing: float = option(
        0.0, "share of the probability spread over all classes in training, such as 0.1 (arXiv 1512.00567); metrics are of the loss without", ge=0, lt=1
    )

    def loss(self, scores: Scores) -> torch.Tensor:
        """Weighted sum of losses over the n supervised items, in float32."""
        from ftkit.objectives import losses

        if len(scores.targets) == 0:  # keep the graph, so that every process has gradients to add up
            return scores.logits.float().sum()
        return (losses(scores, self.label_smoothing) * scores.weights).sum()
