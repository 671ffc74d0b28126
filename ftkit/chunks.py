"""The output head and the loss, some of the supervised items, or of the classes, at a time: the logits of all never exist together.

A language model's logits take n x V numbers, more than all its hidden states.  Each chunk goes through head and loss,
and back again at once, so that only the gradients of hidden states and weights are kept until the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ftkit import slices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ftkit.data.types import Items, Scores
    from ftkit.objectives import Objective

LOGITS = {"cpu": 2**22, "cuda": 2**26}  # in a chunk: 16 and 256 MiB in float32, and three times that with gradients
MOST = {"cpu": 2**26, "cuda": 2**28}  # in a chunk where the head learns
ROUND = 32
MANY = 2**15  # classes: in bfloat16 on a CPU, slices of that many are faster than chunks of items, by a third with 131,072 on two cores


def chunk_size(items: Items, learning: Sequence[nn.Parameter] = ()) -> int:
    """How many items are computed together.

    As many as there are weights of the head, if it is among the `learning` parameters: its gradient, which each chunk
    adds to, is as large.  A round number, if not below that: kernels are made for each.  All, where there are logits already.
    """
    if items.head is None:
        return max(1, len(items))
    device = items.states.device.type if items.states.device.type in LOGITS else "cuda"
    most, weights = LOGITS[device], items.num_classes * items.states.shape[-1]
    if any(parameter.numel() == weights for parameter in learning):
        most = min(max(most, weights), MOST[device])
    size = max(1, most // items.num_classes)
    return size if size < ROUND else size - size % ROUND


def sliced(items: Items, objective: Objective) -> nn.Linear | None:
    """The layer whose rows, the classes, are gone through a slice at a time, where that is possible and faster."""
    half = items.states.dtype is torch.bfloat16 or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16)
    faster = half and items.num_classes >= MANY and items.states.device.type == "cpu"
    return items.layer if faster and objective.label_smoothing is not None else None


def scores(items: Items) -> Iterator[Scores]:
    """The scores of the items, a chunk at a time."""
    return (items.scores(part) for part in items.parts(chunk_size(items)))


def loss(items: Items, objective: Objective, parameters: list[nn.Parameter]) -> torch.Tensor:
    """The objective's sum over the items, float32, with its gradient for their states and for those of `parameters` that the head uses."""
    if not objective.in_chunks:
        return objective.loss(items.scores())
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    device = items.states.device.type
    if (layer := sliced(items, objective)) and len(items) > chunk_size(items) and torch.is_grad_enabled():
        total, of_states, of_weights = slices.cross_entropy(items, layer, objective.label_smoothing or 0.0, learning)
    elif len(items) <= (size := chunk_size(items, learning)) or not torch.is_grad_enabled():
        return sum((objective.loss(items.scores(part)) for part in items.parts(size)), start=torch.zeros((), device=items.states.device))
    elif torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16:
        return _recomputed(items, objective, size)
    else:
        total, of_states, of_weights = _in_chunks(items, objective, size, learning)
    weights = [learning[place] for place in of_weights]
    return _Known.apply([of_states, *of_weights.values()], total, items.states, *weights)


def _in_chunks(items: Items, objective: Objective, size: int, learning: Sequence[nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """The loss, its gradient for the states, and, by their places, for those of `learning` that the head uses."""
    total = torch.zeros((), device=items.states.device)
    of_states = torch.empty_like(items.states)
    of_weights: dict[int, torch.Tensor] = {}
    used = dict(enumerate(learning))
    for part in items.parts(size):
        states = items.states[part].detach().requires_grad_()
        value = objective.loss(items.scores(part, states))
        of_states[part], *gradients = torch.autograd.grad(value, [states, *used.values()], allow_unused=True)
        total += value.detach()
        for place, gradient in zip(used, gradients, strict=True):
            if gradient is not None:
                of_weights[place] = of_weights[place].add_(gradient) if place in of_weights else gradient
        used = {place: used[place] for place in of_weights}  # all parts use the same
    return total, of_states, of_weights


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
