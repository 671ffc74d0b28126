"""LoRA's updates: dropout, two narrow linear layers and a sum, of which the input and a mask are kept for the backward pass.

Beside a frozen layer nothing else is kept of that input, and all updates that share it keep it once.  Through
PEFT's own modules each keeps two more tensors of its size, and scaled products are written and read again to be added;
on a CPU drawing the masks takes a quarter of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.dropout import LEVELS, drawn, kept, num_lost

CHUNK = 1 << 18  # elements that are dropped out at a time on a CPU: they stay in its cache


class Updated:
    """What PEFT's layers with updates become: one vanilla update at work is computed as below; else they are as ever."""

    followers: tuple[Any, ...] = ()  # layers that get the same input after this one, as `sharing` saw
    ahead: tuple[torch.Tensor, torch.Tensor] | None = None  # an input, and what was made of it together with other layers

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (ahead := vars(self).pop("ahead", None)) is not None and ahead[0] is x:
            made: torch.Tensor = ahead[1]
            return made
        if args or kwargs or (update := _vanilla(self)) is None:
            found: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        return _updated(self, update, x)


class Update(NamedTuple):
    """One at work: low-rank matrices a [r, in] and b [out, r]; `lost` of LEVELS elements of what comes in are dropped out."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    lost: int


def _vanilla(layer: Any) -> Update | None:
    """The update of a layer, where one is at work and it is as in LoRA's paper."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    (name,) = active
    dropout = layer.lora_dropout[name]
    lost = num_lost(dropout.p) if layer.training and isinstance(dropout, nn.Dropout) else 0
    return Update(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], lost)


@torch.compiler.disable
def _updated(layer: Any, update: Update, x: torch.Tensor) -> torch.Tensor:
    """What the base makes of x, and the update; and at once, what the layer's followers make of it."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else update.a.dtype
    base, result = _frozen(layer.base_layer, dtype), None
    followers: Sequence[Any] = layer.followers if base else ()
    theirs = [(_frozen(follower.base_layer, dtype), _vanilla(follower)) for follower in followers]
    if not all(frozen is not None and found is not None and found.lost == update.lost for frozen, found in theirs):
        followers, theirs = (), []
    if base is None:
        result = layer.base_layer(x)
        if layer.base_layer._forward_hooks:
            result = result.clone()  # the update is added in place, and a hook may keep what the base gave
    bases, updates = zip((base, update), *theirs, strict=True)
    weights = (*(each.a for each in updates), *(each.b for each in updates))
    own, *others = _Update.apply(x, result, bases, [each.scale for each in updates], update.lost, dtype, *weights)
    for follower, made in zip(followers, others, strict=True):
        vars(follower)["ahead"] = x, made
    found: torch.Tensor = own
    return found


class Frozen(NamedTuple):
    """A linear module that does not learn."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    state: Any = None  # how bitsandbytes gives back weights of 4 bits

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]"""
        if self.state is None:
            return self.weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.state).to(dtype)


def _frozen(base: Any, dtype: torch.dtype) -> Frozen | None:
    """The module, where nothing but its own matrix product in `dtype` is to be computed."""
    changed = "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks
    weight, bias = base.weight, base.bias
    if changed or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if type(base) is nn.Linear:
        known = weight.is_floating_point() and (weight.dtype == dtype or torch.is_autocast_enabled(weight.device.type))
        return Frozen(weight, bias) if known else None
    state = getattr(weight, "quant_state", None)  # on a CPU, bitsandbytes packs them in another way at times
    if state is None or not weight.is_cuda or base.compute_dtype is not dtype:
        return None
    return Frozen(weight.data, bias, state)  # a plain tensor: each operation on bitsandbytes' own goes through Python first


class _Update(torch.autograd.Function):
    """Layers with updates, of one input: its mask is drawn and kept once, and one narrow product is made for all.

    The base's product is part of it where that is `Frozen`: then no sum is a kernel of its own, forward or backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        result: torch.Tensor | None,
        bases: Sequence[Frozen | None],
        scales: Sequence[float],
        lost: int,
        dtype: torch.dtype,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """x: [..., in]; weights: a [r, in] of each layer, then b [out, r] of each -> [..., out] of each.

        A layer whose base is not Frozen is alone, and `result` is what its base gave.  `lost` of LEVELS elements of x
        count as zero, the others for more.
        """
        num = len(bases)
        ctx.bases, ctx.scales, ctx.dtype, ctx.types = bases, scales, dtype, (x.dtype, weights[0].dtype)
        ctx.converted = weights[0].dtype != dtype
        ctx.ranks, ctx.kept_scale = [a.shape[0] for a in weights[:num]], LEVELS / (LEVELS - lost)
        a, b = _joined(weights, dtype)
        mask = None
        if lost and x.device.type != "cpu":
            dropped, mask = torch.native_dropout(x.to(dtype), lost / LEVELS, True)
            narrow = dropped.flatten(0, -2) @ a.T
        else:
            mask = kept(drawn(x), lost, torch.bool) if lost else None
            parts = [_scaled_product(part, a.T, ctx.kept_scale) for part in _masked_parts(x, mask, dtype)]
            narrow = parts[0] if len(parts) == 1 else torch.cat(parts)
        found, matrices = [], list[torch.Tensor | None]()
        for base, own, up, scale in zip(bases, narrow.split(ctx.ranks, 1), b, scales, strict=True):
            made, matrix = result, None
            if base is not None:
                matrix = base.matrix(dtype)
                made = functional.linear(x.to(dtype), matrix, None if base.bias is None else base.bias.to(dtype))
            assert made is not None
            matrices.append(None if base is None or base.state else matrix)
            if made.dtype != dtype or (base is None and made._is_view()):  # autograd would copy the gradient of a view
                found.append((made + _scaled_product(own, up.T, scale).view_as(made)).to(made.dtype))
                continue
            if base is None:
                ctx.mark_dirty(made)
            made.view(-1, made.shape[-1]).addmm_(own, up.T, alpha=scale)
            found.append(made)
        ctx.save_for_backward(x, mask, narrow, *matrices, *((a, *b) if ctx.converted else weights))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (type_x, type_weights), num = ctx.types, len(grads)
        x, mask, narrow, *others = ctx.saved_tensors
        matrices, weights = others[:num], others[num:]
        a, b = (weights[0], weights[1:]) if ctx.converted else _joined(weights, ctx.dtype)
        above = [grad.flatten(0, -2).to(ctx.dtype) for grad in grads]
        below = torch.empty_like(narrow)
        for own, grad, up, scale in zip(below.split(ctx.ranks, 1), above, b, ctx.scales, strict=True):
            own.addmm_(grad, up, beta=0, alpha=scale * ctx.kept_scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = below @ a
            if mask is not None:
                grad_x = _masked(grad_x, mask.view_as(grad_x), in_place=True)
            for grad, base, matrix in zip(above, ctx.bases, matrices, strict=True):
                if base is not None:
                    grad_x.addmm_(grad, base.matrix(ctx.dtype) if matrix is None else matrix)
            grad_x = grad_x.view_as(x).to(type_x)
        grads_of_weights: Sequence[torch.Tensor | None] = [None] * 2 * num
        if any(ctx.needs_input_grad[6:]):
            parts = [own.T @ part for own, part in zip(_parts(below, _size(x)), _masked_parts(x, mask, ctx.dtype), strict=True)]
            grad_a = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=type_weights)
            grad_b = [_scaled_product(grad.T, own, scale) for grad, own, scale in zip(above, narrow.split(ctx.ranks, 1), ctx.scales, strict=True)]
            grads_of_weights = [*grad_a.to(type_weights).split(ctx.ranks), *(grad.to(type_weights) for grad in grad_b)]
        return grad_x, grads[0] if ctx.needs_input_grad[1] else None, None, None, None, None, *grads_of_weights


def _joined(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The first half of them, [r, in] each, as one matrix, and the others, in `dtype`: by two operations, however many they are."""
    num = len(weights) // 2
    if num == 1:
        return weights[0].to(dtype), [weights[1].to(dtype)]
    flat = _flatten_dense_tensors(weights).to(dtype)
    rank, width = sum(a.shape[0] for a in weights[:num]), weights[0].shape[1]
    return flat[: rank * width].view(rank, width), _unflatten_dense_tensors(flat, weights)[num:]


def _scaled_product(one: torch.Tensor, other: torch.Tensor, scale: float) -> torch.Tensor:
    """As one operation."""
    return torch.addmm(one.new_empty(1), one, other, beta=0, alpha=scale)


def _masked(x: torch.Tensor, mask: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """x with zeros where the mask is false."""
    if x.device.type == "cpu":  # to multiply is many times faster there
        return x.mul_(mask.to(x.dtype)) if in_place else x * mask.to(x.dtype)
    found: torch.Tensor = torch.ops.aten.native_dropout_backward(x, mask, 1.0)
    return found


def _masked_parts(x: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows of x in `dtype`, with zeros where the mask is false, a chunk at a time: no copy of x is made."""
    parts = _parts(x.flatten(0, -2), _size(x))
    if mask is None:
        yield from (part.to(dtype) for part in parts)
    else:
        yield from (_masked(part.to(dtype), own) for part, own in zip(parts, _parts(mask.flatten(0, -2), _size(x)), strict=True))


def _size(x: torch.Tensor) -> int | None:
    """How many rows of x make a chunk; on other devices than a CPU they are one."""
    return max(1, CHUNK // x.shape[-1]) if x.device.type == "cpu" else None


def _parts(rows: torch.Tensor, size: int | None) -> Sequence[torch.Tensor]:
    return (rows,) if size is None else rows.split(size)


@cache
def _with_updates(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Updated, kind), {"__module__": kind.__module__})


def add_in_place(model: nn.Module) -> None:
    """Let PEFT's LoRA layers around linear modules be `Updated`."""
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            layer.__class__ = _with_updates(type(layer))  # type: ignore[arg-type]


@contextmanager
def sharing(model: nn.Module) -> Iterator[None]:
    """Layers with updates that get the same input herein, one after the other, are computed together from now on.

    They then drop out the same elements of it, as loralib's merged layers do (arXiv 2106.09685).
    """
    layers = [module for module in model.modules() if isinstance(module, Updated)]
    rows: dict[nn.Module, set[tuple[nn.Module, ...]]] = {}  # those that followed each layer, each time
    row, last = list[nn.Module](), None

    def met(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal row, last
        if last is not args[0]:
            close()
            row, last = [], args[0]
        row.append(layer)

    def close() -> None:
        if row:
            rows.setdefault(row[0], set()).add(tuple(row[1:]))

    hooks = [layer.register_forward_pre_hook(met) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    close()
    following = {follower for seen in rows.values() for row in seen for follower in row}
    for leader, seen in rows.items():
        if len(seen) == 1 and leader not in following:
            (leader.followers,) = seen  # type: ignore[assignment]
