"""LoRA's updates: dropout, two narrow linear layers and a sum, of which the input and a mask are kept for the backward pass.

Beside a frozen layer nothing else is kept of that input, and all updates that share it keep it once.  Through
PEFT's own modules each keeps two more tensors of its size, and scaled products are written and read again to be added;
on a CPU drawing the masks takes a quarter of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.dropout import LEVELS, drawn, kept, num_lost

CHUNK = 1 << 18  # elements that are dropped out at a time on a CPU: they stay in its cache


class Updated:
    """What PEFT's layers with updates become: one vanilla update at work is computed as below; else they are as ever."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer: Any = self
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if args or kwargs or layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
            found: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        return _updated(layer, active[0], x)


@torch.compiler.disable
def _updated(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """What the base makes of x, and the update."""
    base, kind, dropout = layer.base_layer, x.device.type, layer.lora_dropout[name]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
    frozen = _frozen(base, dtype)
    lost = num_lost(dropout.p) if layer.training and isinstance(dropout, nn.Dropout) else 0
    result = None if frozen else base(x)
    if result is not None and base._forward_hooks:
        result = result.clone()  # the update is added in place, and a hook may keep what the base gave
    found: torch.Tensor = _Update.apply(result, x, a, b, frozen, lost, layer.scaling[name], dtype)
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
    if changed or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    if type(base) is nn.Linear:
        known = base.weight.is_floating_point() and (base.weight.dtype == dtype or torch.is_autocast_enabled(base.weight.device.type))
        return Frozen(base.weight, base.bias) if known else None
    state = getattr(base.weight, "quant_state", None)  # on a CPU, bitsandbytes packs them in another way at times
    return Frozen(base.weight, base.bias, state) if state is not None and base.weight.is_cuda and base.compute_dtype is dtype else None


class _Update(torch.autograd.Function):
    """The base's product is part of it where that is `Frozen`: then no sum is a kernel of its own, forward or backward."""

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor | None,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: Frozen | None,
        lost: int,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """result: [..., out], x: [..., in], a: [r, in], b: [out, r] -> [..., out]; `lost` of LEVELS elements of x count as zero, the others for more."""
        ctx.scale, ctx.dtype, ctx.types, ctx.base = scale, dtype, (x.dtype, a.dtype, b.dtype), base
        ctx.kept_scale = LEVELS / (LEVELS - lost)
        a, b = a.to(dtype), b.to(dtype)
        mask = None
        if lost and x.device.type != "cpu":
            dropped, mask = torch.native_dropout(x.to(dtype), lost / LEVELS, True)
            narrow = dropped.flatten(0, -2) @ a.T
        else:
            mask = kept(drawn(x), lost, torch.bool) if lost else None
            parts = [_scaled_product(part, a.T, ctx.kept_scale) for part in _masked_parts(x, mask, dtype)]
            narrow = parts[0] if len(parts) == 1 else torch.cat(parts)
        matrix = None
        if base is not None:
            matrix = base.matrix(dtype)
            result = functional.linear(x.to(dtype), matrix, None if base.bias is None else base.bias.to(dtype))
        assert result is not None
        ctx.save_for_backward(x, a, b, mask, narrow, None if base is None or base.state else matrix)
        if result.dtype != dtype or (base is None and result._is_view()):  # autograd would copy the gradient of a view
            return (result + _scaled_product(narrow, b.T, scale).view_as(result)).to(result.dtype)
        if base is None:
            ctx.mark_dirty(result)
        result.view(-1, result.shape[-1]).addmm_(narrow, b.T, alpha=scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, mask, narrow, matrix = ctx.saved_tensors
        above = grad.flatten(0, -2).to(ctx.dtype)
        below = _scaled_product(above, b, ctx.scale * ctx.kept_scale)
        type_x, type_a, type_b = ctx.types
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_x = below @ a
            if mask is not None:
                grad_x = _masked(grad_x, mask.view_as(grad_x), in_place=True)
            if ctx.base is not None:
                grad_x.addmm_(above, ctx.base.matrix(ctx.dtype) if matrix is None else matrix)
            grad_x = grad_x.view_as(x).to(type_x)
        if ctx.needs_input_grad[2]:
            parts = [own.T @ part for own, part in zip(_parts(below, _size(x)), _masked_parts(x, mask, ctx.dtype), strict=True)]
            grad_a = parts[0].to(type_a) if len(parts) == 1 else torch.stack(parts).sum(0, dtype=type_a)
        if ctx.needs_input_grad[3]:
            grad_b = _scaled_product(above.T, narrow, ctx.scale).to(type_b)
        return None if ctx.base is not None else grad, grad_x, grad_a, grad_b, None, None, None, None


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
