"""Dropout on what goes into the updates of an adapter, without a copy of it in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class DroppedLinear(nn.Linear):
    """Dropout and a linear layer, of which only the input is kept for the backward pass, where dropout draws the same numbers again.

    Beside a frozen layer nothing else is kept of this input, and all updates that share it keep it once; the mask and
    the dropped-out copy would be two more tensors of its size for each.
    """

    def __init__(self, linear: nn.Linear, p: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.p = linear.weight, linear.bias, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            found: torch.Tensor = checkpoint(self._compute, x, use_reentrant=False)
            return found
        return self._compute(x)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.dropout(x, self.p, self.training), self.weight, self.bias)


def keep_inputs_only(model: nn.Module) -> None:
    """Move the dropout of PEFT's LoRA layers into the first linear layer of their updates; numbers and names stay what they are.

    Not of DoRA, which takes the dropped-out input for more than that.
    """
    for module in model.modules():
        layer: Any = module
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout) and name in layer.lora_A and name not in layer.lora_variant:
                layer.lora_A[name] = DroppedLinear(layer.lora_A[name], dropout.p)
                layer.lora_dropout[name] = nn.Identity()
