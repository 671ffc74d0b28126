"""Activations that are computed again in the backward pass instead of kept: of all layers, or of as few as a budget asks for.

Gradient checkpointing (arXiv 1604.06174).  The lowest layers are chosen: the backward pass comes to them last, when
what the others kept is free again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ftkit.attention import layers_of
from ftkit.errors import RecipeError
from ftkit.quantities import size
from ftkit.recipe.spec import num_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Kept(NamedTuple):
    """Bytes that a layer keeps for the backward pass of one batch: as it is, and when its activations are computed again."""

    as_it_is: int
    recomputed: int


def everywhere(model: PreTrainedModel) -> None:
    """Compute the activations of each layer again; transformers 5.17 knows it as gradient checkpointing only."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    # Made for reentrant checkpoints: it would send gradients through frozen layers below the first one that learns.
    model.disable_input_require_grads()


def within(model: PreTrainedModel, budget: str, compute: Callable[[], Any]) -> str:
    """Compute again what the fewest layers keep, so that all together keep at most `budget` of the batch that `compute` computes.

    Returns what was chosen, in words.  Raises RecipeError where layers cannot be chosen singly, or all of them keep more.
    """
    layers = layers_of(model)
    everywhere(model)
    if not layers or not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise RecipeError(f"train.gradient_checkpointing: the layers of {type(model).__name__} cannot be chosen singly; give true instead of {budget}")
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    of_all = dict(zip(layers, measured(layers, model, compute), strict=True))
    busy = {layer: kept for layer, kept in of_all.items() if kept.as_it_is}  # frozen ones below keep nothing
    count = fewest(list(busy.values()), num_bytes(budget))
    if count is None:
        least = sum(kept.recomputed for kept in busy.values())
        raise RecipeError(
            f"train.gradient_checkpointing: with all layers computed again, {size(least)} are kept, more than {budget}; a larger train.accumulate takes less"
        )
    for layer in list(busy)[:count]:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
    remaining = sum(kept.recomputed if layer.gradient_checkpointing else kept.as_it_is for layer, kept in busy.items())
    return f"activations of {count} of {len(busy)} layers are computed again: of the largest batch {size(remaining)} are kept, of {budget} allowed"


def fewest(kept: list[Kept], budget: int) -> int | None:
    """How many of the lowest layers must compute again; None where all do not suffice."""
    for count in range(len(kept) + 1):
        if sum(each.recomputed for each in kept[:count]) + sum(each.as_it_is for each in kept[count:]) <= budget:
            return count
    return None


def measured(layers: list[nn.Module], model: nn.Module, compute: Callable[[], Any]) -> list[Kept]:
    """What each layer keeps, by running one at a time with gradients: more than one layer's activations never exist."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: list[Kept] = []
    flows = _gradients_reach(layers[0], compute)

    def measuring(forward: Callable[..., Any]) -> Callable[..., Any]:
        def one(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal flows
            others = weights | {value.untyped_storage().data_ptr() for value in _tensors((args, kwargs))}  # the same for all layers
            kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other tensor takes their place in memory

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in others:
                    kept[storage.data_ptr()] = storage
                return tensor

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = forward(states.detach().requires_grad_(flows), *args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            flows = first.requires_grad
            found.append(Kept(sum(storage.nbytes() for storage in kept.values()), states.untyped_storage().nbytes()) if flows else Kept(0, 0))
            return tuple(map(_detached, output)) if isinstance(output, tuple) else output.detach()

        return one

    for layer in layers:
        layer.forward = measuring(layer.forward)
    try:
        with torch.no_grad():
            compute()
    finally:
        for layer in layers:
            del layer.forward
    assert len(found) == len(layers), "each layer runs once"
    return found


class _Reached(Exception):
    """A layer was reached: nothing above it is wanted."""


def _gradients_reach(layer: nn.Module, compute: Callable[[], Any]) -> bool:
    """Whether what goes into a layer needs gradients, because something below it learns."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0].requires_grad)

    hook = layer.register_forward_pre_hook(stop)
    try:
        compute()
    except _Reached as reached:
        return bool(reached.args[0])
    finally:
        hook.remove()
    raise AssertionError("the first layer was not reached")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists, maps and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for child in children for tensor in _tensors(child)]
