"""NEFTune (arXiv 2310.05914): uniform noise on the token embeddings while training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ftkit.data.types import Batch


class Noise:
    """Noise of U(-1, 1) * alpha / sqrt(L * d) on what an embedding gives for a row of L real tokens, d numbers each."""

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self._batch: Batch | None = None  # None: no noise
        self._hook = embedding.register_forward_hook(self._add)

    @contextmanager
    def rows(self, batch: Batch) -> Iterator[None]:
        """What is called herein embeds the rows of this batch with noise."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def remove(self) -> None:
        self._hook.remove()

    def _add(self, embedding: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if (batch := self._batch) is None:
            return None
        if len(output) == len(batch.attention_mask):  # Reformer pads them further
            lengths = batch.attention_mask.sum(1)[:, None, None]
        else:  # a decoder's embedding sees the rows laid end to end
            assert batch.segments is not None
            ends = batch.segments.bounds.long().diff()
            lengths = ends.repeat_interleave(ends, output_size=output.shape[1])[None, :, None]
        bound = self.alpha / (lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * bound.to(output.dtype)
