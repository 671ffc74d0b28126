"""Rows that learn from each other, in parts: the loss and the gradient are those of the whole batch, whatever the parts and processes.

All parts are computed first without gradients, for what the rows are to each other; then each part once more, among the
others, which are constants to it.  The gradients of the parts add up to that of the batch (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from ftkit.data.types import Batch, Items, Scores


def places(accelerator: Accelerator, trainee: nn.Module, micro_batches: list[Batch]) -> list[Callable[[Items], Items]]:
    """For each of this process's parts of a batch, what puts its items among those of all parts on all processes; collective.

    `trainee` is left to draw the dropout that it has drawn here once more.
    """
    parts: list[Scores] = []
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for batch in micro_batches:
            trainee(batch.to(accelerator.device), parts.extend)
    counted = [part.weights > 0 for part in parts]  # a part without rows has one that counts for nothing

    def gathered(own: list[torch.Tensor]) -> torch.Tensor:
        return accelerator.gather(accelerator.pad_across_processes(torch.cat(own)))

    weights = gathered([part.weights[real] for part, real in zip(parts, counted, strict=True)])
    rows = weights > 0  # those that fill up a process are not
    states, targets, row_ids = (
        gathered([getattr(part, name)[real] for part, real in zip(parts, counted, strict=True)])[rows] for name in ("logits", "targets", "rows")
    )
    first = int(rows[: accelerator.process_index * (len(rows) // accelerator.num_processes)].sum())
    starts = list(accumulate((int(real.sum()) for real in counted), initial=first))

    def place(start: int, stop: int) -> Callable[[Items], Items]:
        def among(items: Items) -> Items:
            own = items.states[items.weights > 0]
            return replace(items, states=torch.cat((states[:start], own, states[stop:])), targets=targets, weights=weights[rows], rows=row_ids)

        return among

    return [place(start, stop) for start, stop in pairwise(starts)]
