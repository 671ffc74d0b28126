"""The way into LoRA's updates: dropout and the first, narrow linear layer, of which the input and a mask are kept for the backward pass.

Beside a frozen layer nothing else is kept of that input, and all updates that share it keep it once.  Through
PEFT's own modules each keeps two more tensors of its size, and on a CPU drawing the masks takes a quarter of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.dropout import LEVELS, drawn, kept, num_lost

CHUNK = 1 << 18  # elements that are dropped out at a time on a CPU: they stay in its cache


class Entry(nn.Linear):
    """PEFT's `lora_A` with the dropout before it; weight, names and what it computes on average are the same."""

    def __init__(self, linear: nn.Linear, p: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.p = linear.weight, p

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        if self.training and torch.is_grad_enabled():
            found: torch.Tensor = _Entry.apply(x, self.weight, num_lost(self.p), dtype)
            return found
        return functional.linear(functional.dropout(x.to(dtype), self.p, self.training), self.weight.to(dtype))


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, lost: int, dtype: torch.dtype) -> torch.Tensor:
        """x: [..., in], weight: [out, in] -> [..., out] in `dtype`; `lost` of LEVELS elements of x count as zero, the others for more."""
        mask = kept(drawn(x), lost, torch.bool) if lost else None
        ctx.save_for_backward(x, weight, mask)
        ctx.scale, ctx.dtype = LEVELS / (LEVELS - lost), dtype
        weight = weight.to(dtype)
        found = [part @ weight.T for part in _dropped(x, mask, dtype)]
        return torch.cat(found).mul_(ctx.scale).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight, mask = ctx.saved_tensors
        grad = grad.flatten(0, -2).to(ctx.dtype) * ctx.scale
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for above, part in zip(grad.split(_rows_of_a_chunk(x)), _dropped(x, mask, ctx.dtype), strict=True):
                grad_weight += above.T @ part
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(ctx.dtype)).view_as(x)
            grad_x = (grad_x if mask is None else grad_x.mul_(mask.to(grad_x.dtype))).to(x.dtype)
        return grad_x, grad_weight, None, None


def _dropped(x: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows of x in `dtype`, with zeros where the mask is false, a chunk at a time: no copy of x is made."""
    parts = x.flatten(0, -2).split(_rows_of_a_chunk(x))
    if mask is None:
        yield from (part.to(dtype) for part in parts)
    else:
        yield from (part.to(dtype) * own.to(dtype) for part, own in zip(parts, mask.flatten(0, -2).split(_rows_of_a_chunk(x)), strict=True))


def _rows_of_a_chunk(x: torch.Tensor) -> int:
    """How many rows of x make a chunk; on other devices than a CPU they are one."""
    return max(1, (CHUNK if x.device.type == "cpu" else x.numel()) // x.shape[-1])


def begin_with_entries(model: nn.Module) -> None:
    """Let the updates of PEFT's LoRA layers begin with an `Entry`; not those of DoRA, which takes more from the dropped-out input."""
    for module in model.modules():
        layer: Any = module
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if name in layer.lora_A and name not in layer.lora_variant:
                layer.lora_A[name] = Entry(layer.lora_A[name], dropout.p if isinstance(dropout, nn.Dropout) else 0.0)
                layer.lora_dropout[name] = nn.Identity()
                layer.cast_input_dtype_enabled = False  # a cast copy would be kept for each update that shares the input
