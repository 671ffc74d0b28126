"""Dropout that keeps 16 random bits an element for the backward pass.

On a CPU torch's own `bernoulli_` takes a tenth of the step of a small encoder, and so does filling by a mask; what its
dropout keeps has four bytes an element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

LEVELS = 1 << 16  # of the random numbers: the share that is dropped out is rounded to 1 / LEVELS


class Dropout(nn.Dropout):
    """torch's own, drawn faster on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or self.inplace or torch.compiler.is_compiling():
            return super().forward(input)
        return dropped(input, self.p if self.training else 0.0)


def quicken(model: nn.Module) -> None:
    """Let all of a model's dropout be ours."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p, child.inplace).train(child.training))


def dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    """x with a share `p` of its elements set to zero, and the others larger for it."""
    if not p or not x.numel():
        return x
    found: torch.Tensor = _Dropped.apply(x, num_lost(p))
    return found


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lost: int) -> torch.Tensor:
        bits = drawn(x)
        ctx.save_for_backward(bits)
        ctx.lost = lost
        return _scaled(x, bits, lost)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (bits,) = ctx.saved_tensors
        return _scaled(grad, bits, ctx.lost), None


def _scaled(x: torch.Tensor, bits: torch.Tensor, lost: int) -> torch.Tensor:
    """x where it is kept, larger for what is not."""
    return torch.addcmul(x.new_zeros(()), x, kept(bits, lost, x.dtype), value=LEVELS / (LEVELS - lost))


def num_lost(p: float) -> int:
    """How many of LEVELS random numbers mean that an element is dropped out; never all."""
    return min(round(p * LEVELS), LEVELS - 1)


def drawn(x: torch.Tensor) -> torch.Tensor:
    """int16, like x: a random number for each element."""
    four = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return four.view(torch.int16)[: x.numel()].view(x.shape)


def kept(bits: torch.Tensor, lost: int, dtype: torch.dtype) -> torch.Tensor:
    """1 for what is kept and 0 for what is dropped out.  To multiply by such numbers is many times faster than to fill by a mask."""
    return torch.ge(bits, lost - LEVELS // 2, out=torch.empty(bits.shape, dtype=dtype, device=bits.device))
