"""What metrics are made of while the batches of an evaluation go by."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from ftkit.data.ondisk import Growing

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Scores

RESAMPLES = 1000
IN_MEMORY = 1 << 22  # numbers that are kept of a set under one name: 16 MiB; more are on disk


class Kept:
    """Numbers of items, float32 [k, ...] at a time, in the order in which they came."""

    def __init__(self, parts: Iterable[torch.Tensor] = ()) -> None:
        self._parts: list[torch.Tensor] = []
        self._file: Growing | None = None
        self._shape: tuple[int, ...] = ()  # of one item
        self._count = 0
        for part in parts:
            self.append(part)

    def __len__(self) -> int:
        return self._count

    def append(self, part: torch.Tensor) -> None:
        self._shape = tuple(part.shape[1:])
        self._count += len(part)
        if self._file is None and self._count * prod(self._shape) <= IN_MEMORY:
            self._parts.append(part)
            return
        if self._file is None:
            self._file = Growing("f")
        for each in (*self._parts, part):
            self._file.extend(array("f", each.contiguous().numpy().tobytes()))
        self._parts = []

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """The items, `size` at a time."""
        import torch

        if self._file is None:
            yield from self.all().split(size) if self._count else ()
            return
        stored, width = self._file.stored("<f4"), prod(self._shape)
        for numbers in stored.blocks(size * width):
            yield torch.from_numpy(numbers.copy()).view(-1, *self._shape)

    def all(self) -> torch.Tensor:
        """All items."""
        import torch

        return torch.cat(self._parts if self._file is None else list(self.blocks(self._count)))


class Streaming:
    """Sums, and what must be kept of each item, beside the loss."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        import torch

        # float64: counts stay exact, and those of several processes add up
        self.sums: dict[str, torch.Tensor] = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in {**shapes, "loss": (), "weights": ()}.items()}
        self.kept: dict[str, Kept] = {}

    def add_loss(self, scores: Scores) -> None:
        """By weight; labels are not smoothed."""
        from ftkit.objectives import losses

        weights = scores.weights.double()
        self.sums["loss"] += (losses(scores).double() * weights).sum().cpu()
        self.sums["weights"] += weights.sum().cpu()

    def keep(self, name: str, values: torch.Tensor) -> None:
        """Numbers that only all items together make sense of, float32 [k, ...]."""
        self.kept.setdefault(name, Kept()).append(values.detach().float().cpu())

    def all(self, name: str) -> torch.Tensor:
        """Those of all items, float64."""
        return self.kept[name].all().double()

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
