"""The output head and cross-entropy, some of the classes at a time: neither the logits nor their gradients ever exist together.

Two passes over the rows of the head's last layer: the first finds what each item's softmax is divided by, the second its
gradients, and those of a row are done when the row has been passed.  That multiplies by the layer's weights once
more than a chunk of items at a time does, but its numbers stay in a CPU's cache, and the gradient of the
layer is written once, where each chunk of items adds to all of it.  The same idea on GPUs: arXiv 2411.09009.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from ftkit.instead import instead

if TYPE_CHECKING:
    from ftkit.data.types import Items

CLASSES = 2048  # in a slice: with 400 items, 3 MiB of logits


def cross_entropy(
    items: Items, layer: nn.Linear, label_smoothing: float, learning: Sequence[nn.Parameter]
) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """The weighted sum of the items' cross-entropies, float32, and its gradients.

    The first one is for their states; the others, by place, for those of `learning` that the head uses.  `layer` is that of the items.
    """
    head, targets = items.head, items.targets
    assert head is not None
    own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    places = {id(parameter): place for place, parameter in enumerate(learning)}
    own_places = [places.get(id(parameter)) for parameter in own]
    others = [place for place in range(len(learning)) if place not in own_places]

    def logits(states: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        with instead(layer, lambda x: functional.linear(x, *parts)):
            return head(states)

    total = torch.full(targets.shape, -torch.inf, device=targets.device)  # log of the sum of exponentials
    right = torch.zeros_like(total)  # the logit of the target, and of all others as far as labels are smoothed
    with _uncached(targets.device.type), torch.no_grad():
        for part in _slices(items.num_classes):
            found = logits(items.states, [weight[part] for weight in own]).float()
            total = torch.logaddexp(total, found.logsumexp(1))
            column, within = _column(targets, part)
            right += (1 - label_smoothing) * found.gather(1, column).squeeze(1) * within
            if label_smoothing:
                right += label_smoothing / items.num_classes * found.sum(1)

    of_states = torch.zeros_like(items.states, dtype=torch.float32)
    of_weights: dict[int, torch.Tensor] = {place: torch.empty_like(learning[place]) for place in own_places if place is not None}
    for part in _slices(items.num_classes):
        states = items.states.detach().requires_grad_()
        rows = [weight.detach()[part].requires_grad_(place is not None) for weight, place in zip(own, own_places, strict=True)]
        with _uncached(targets.device.type):
            found = logits(states, rows)
        column, within = _column(targets, part)
        outer = (found.detach().float() - total[:, None]).exp_()
        if label_smoothing:
            outer -= label_smoothing / items.num_classes
        outer.scatter_add_(1, column, -(1 - label_smoothing) * within[:, None])
        outer *= items.weights[:, None]
        wanted = [states, *(row for row in rows if row.requires_grad), *(learning[place] for place in others)]
        of_part, *gradients = torch.autograd.grad(found, wanted, outer.to(found.dtype), allow_unused=True)
        of_states += of_part
        for place in own_places:
            if place is not None:
                of_weights[place][part] = gradients.pop(0)
        for place, gradient in zip(others, gradients, strict=True):
            if gradient is not None:
                of_weights[place] = of_weights[place].add_(gradient) if place in of_weights else gradient
    return ((total - right) * items.weights).sum(), of_states.to(items.states.dtype), of_weights


def _slices(classes: int) -> Iterator[slice]:
    return (slice(start, min(start + CLASSES, classes)) for start in range(0, classes, CLASSES))


def _column(targets: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the slice each target [n] is, int64 [n, 1], and whether it is in it at all, as a number: float32 [n]."""
    within = (targets >= part.start) & (targets < part.stop)
    return (targets - part.start).clamp(0, part.stop - part.start - 1)[:, None], within.float()


def _uncached(device: str) -> torch.autocast:
    """Autocast as it is, without keeping the converted weights: a slice is used once."""
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False)
