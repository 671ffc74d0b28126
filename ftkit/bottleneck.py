"""The module of a bottleneck adapter: down, activation, up, and around."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

STD = 1e-2  # of the first weights (arXiv 1902.00751, 3.6); those of the way up are 0


class Bottleneck(nn.Module):
    """x + up(activation(down(x))): the identity at first."""

    def __init__(self, width: int, narrow: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        self.activation, self.dropout = ACT2FN[activation], nn.Dropout(dropout)
        nn.init.trunc_normal_(self.down.weight, std=STD, a=-2 * STD, b=2 * STD)
        for parameter in (self.down.bias, *self.up.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.down(self.dropout(x.to(self.down.weight.dtype)))
        return x + self.up(self.activation(narrow)).to(x.dtype)


def add(module: nn.Module, width: int, narrow: int, activation: str, dropout: float, dtype: torch.dtype, device: torch.device) -> None:
    """Let a module's outputs, `width` numbers each, go through an adapter of its own."""
    with torch.device("meta" if device.type == "meta" else "cpu"):  # drawn alike wherever the model is
        made = Bottleneck(width, narrow, activation, dropout)
    module.add_module("bottleneck", made.to(device=device, dtype=dtype).train(module.training))
    module.register_forward_hook(_pass_on)


def _pass_on(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return module.bottleneck(output)
