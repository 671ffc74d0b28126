"""The output head and the loss, some of the supervised items at a time: the logits of all never exist together.

A language model's logits take n x V numbers, more than all its hidden states.  Each chunk goes through head and loss,
and back again at once, so that only the gradients of hidden states and weights are kept until the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ftkit.data.types import Items, Scores
    from ftkit.objectives import Objective

LOGITS = {"cpu": 2**24, "cuda": 2**26}  # in a chunk: 64 and 256 MiB in float32, and three times that with gradients
MOST = 4  # times LOGITS are in a chunk where the head learns


def chunk_size(items: Items, learning: Sequence[nn.Parameter] = ()) -> int:
    """How many items are computed together.

    As many as there are weights of the head, if it is among the `learning` parameters: its gradient, which each chunk
    adds to, is as large.
    """
    most = LOGITS.get(items.states.device.type, LOGITS["cuda"])
    weights = items.num_classes * items.states.shape[-1]
    if any(parameter.numel() == weights for parameter in learning):
        most = min(max(most, weights), MOST * most)
    return max(1, most // items.num_classes)


def scores(items: Items) -> Iterator[Scores]:
    """The scores of the items, a chunk at a time."""
    return (items.scores(part) for part in items.parts(chunk_size(items)))


def loss(items: Items, objective: Objective, parameters: list[nn.Parameter]) -> torch.Tensor:
    """The objective's sum over the items, float32, with its gradient for their states and for those of `parameters` that the head uses."""
    if not objective.in_chunks:
        return objective.loss(items.scores())
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    size = chunk_size(items, learning)
    if len(items) <= size or not torch.is_grad_enabled():
        return sum((objective.loss(items.scores(part)) for part in items.parts(size)), start=torch.zeros((), device=items.states.device))
    if torch.is_autocast_enabled(items.states.device.type) and torch.get_autocast_dtype(items.states.device.type) is torch.float16:
        return _recomputed(items, objective, size)
    total = torch.zeros((), device=items.states.device)
    of_states = torch.empty_like(items.states)
    of_weights: dict[int, torch.Tensor] = {}
    for part in items.parts(size):
        states = items.states[part].detach().requires_grad_()
        value = objective.loss(items.scores(part, states))
        of_states[part], *gradients = torch.autograd.grad(value, [states, *learning], allow_unused=True)
        total += value.detach()
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                of_weights[index] = of_weights[index].add_(gradient) if index in of_weights else gradient
    weights = [learning[index] for index in of_weights]
    return _Known.apply([of_states, *of_weights.values()], total, items.states, *weights)


def _recomputed(items: Items, objective: Objective, size: int) -> torch.Tensor:
    """The same for float16, whose gradients need the scale that only the backward pass knows: each chunk is computed again there."""
    total = torch.zeros((), device=items.states.device)
    for part in items.parts(size):
        compute = partial(_one, items, objective, part)
        total = total + checkpoint(compute, items.states[part], use_reentrant=False)
    return total


def _one(items: Items, objective: Objective, part: slice, states: torch.Tensor) -> torch.Tensor:
    return objective.loss(items.scores(part, states))


class _Known(torch.autograd.Function):
    """A number, and tensors of which its gradients are known."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], number: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return number

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given, ctx.gradients = ctx.gradients, None  # held by nobody else, a gradient is taken over instead of copied
        return None, None, *(given.pop(0).mul_(outer[0]) for _ in range(len(given)))
