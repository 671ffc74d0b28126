"""What metrics are made of while the batches of an evaluation go by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Scores


class Streaming:
    """Sums, and what must be kept of each item, beside the loss."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        import torch

        # float64: counts stay exact, and those of several processes add up
        self.sums: dict[str, torch.Tensor] = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in {**shapes, "loss": (), "weights": ()}.items()}
        self.kept: dict[str, list[torch.Tensor]] = {}

    def add_loss(self, scores: Scores) -> None:
        """By weight; labels are not smoothed."""
        from ftkit.objectives import losses

        weights = scores.weights.double()
        self.sums["loss"] += (losses(scores).double() * weights).sum().cpu()
        self.sums["weights"] += weights.sum().cpu()

    def keep(self, name: str, values: torch.Tensor) -> None:
        """Numbers that only all items together make sense of, float32 [k, ...]."""
        self.kept.setdefault(name, []).append(values.detach().float().cpu())

    def all(self, name: str) -> torch.Tensor:
        """Those of all items, float64."""
        import torch

        return torch.cat(self.kept[name]).double()

    def loss(self) -> dict[str, float]:
        """The mean loss and its denominator."""
        count = self.sums["weights"].item()
        return {"loss": self.sums["loss"].item() / count, "loss_count": count}
