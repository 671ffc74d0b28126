"""Networks that soft prompts and prefixes are learned through; only what they give is kept."""

from __future__ import annotations

import torch
from torch import nn


class MLP(nn.Sequential):
    """[n, width] -> [n, width]: three linear layers, as in PEFT's PromptEncoder."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width))


class LSTM(nn.Module):
    """[n, width] -> [n, width]: a bidirectional LSTM of two layers, and two linear ones (arXiv 2103.10385, 3.2)."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, num_layers=2, dropout=dropout, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(self.lstm(x)[0])
        return output
