"""What metrics are made of while the batches of an evaluation go by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from ftkit.data.types import Scores

RESAMPLES = 1000


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

    def draws(self) -> Iterable[dict[str, float]]:
        """Metrics of sets of as many items, drawn from these with replacement; of none, as it is."""
        return ()

    @staticmethod
    def redrawn(items: torch.Tensor) -> Iterator[torch.Tensor]:
        """As many of the items, drawn with replacement, again and again."""
        import torch

        generator = torch.Generator().manual_seed(0)
        for _ in range(RESAMPLES):
            yield items[torch.randint(len(items), (len(items),), generator=generator)]

    def details(self) -> dict[str, Any]:
        """`intervals`: of each metric that is drawn again, where 95 % of the draws lie (Efron 1979, doi:10.1214/aos/1176344552)."""
        import numpy as np

        found: dict[str, list[float]] = {}
        for draw in self.draws():
            for name, value in draw.items():
                found.setdefault(name, []).append(value)
        return {"intervals": {name: np.quantile(values, (0.025, 0.975)).tolist() for name, values in found.items()}} if found else {}
