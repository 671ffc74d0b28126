"""Of a frozen embedding, and of the head that may share its weights, a few rows learn: only these have gradients.

PEFT's own module puts the rows into a copy of the matrix in each forward pass, and that copy gets a gradient.  Of
128,256 tokens of 512 numbers, two layers and a head that shares the embedding, a step of 256 tokens took twice as long
on a CPU for it, and 500 MB more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from torch.nn import functional


def compute_apart(model: nn.Module) -> None:
    """Let PEFT's layers of trainable tokens compute these beside the frozen ones; names, weights and results are the same."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            layer: Any = module
            (tokens,) = layer.token_indices.values()  # ascending
            layer.register_buffer("tokens", torch.tensor(tokens, device=layer.base_layer.weight.device), persistent=False)
            layer.forward = partial(_forward, layer)


def _forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Token ids [...] -> [..., H], or states [..., H] -> logits [..., V]."""
    base, tokens = layer.base_layer, layer.tokens
    (learning,) = layer.trainable_tokens_delta.values()
    rows = learning.to(base.weight.dtype)
    if isinstance(base, nn.Embedding):
        places = torch.searchsorted(tokens, inputs).clamp(max=len(tokens) - 1)
        learned = functional.embedding(places, rows)
        if (scale := layer._get_embed_scale()) is not None:
            learned = learned * scale.to(learned.dtype)
        return torch.where((tokens[places] == inputs).unsqueeze(-1), learned, base(inputs))
    return base(inputs).index_copy_(-1, tokens, functional.linear(inputs, rows))
