"""Of a token embedding that learns, only the rows whose tokens occur in the training data get gradients and optimizer state.

The others could but decay, by a factor that is known; the result is the same.  In a vocabulary of 30,000 tokens a small
data set has some thousands; in one of 250,000, gradients and optimizer state of the others are most of what a run takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from ftkit.data.features import FeatureSet

LEAST = 1 << 20  # weights that nothing computes with must be so many: else it is not worth it
PART = 1 << 20  # tokens that are looked at together


class Used:
    """An embedding of a model whose used rows are a parameter of their own, `used`, until `restore` puts them back."""

    def __init__(self, embedding: nn.Embedding, tokens: torch.Tensor) -> None:
        """tokens: int64 [n], the rows in use, in ascending order; in training there must be no others."""
        weight = embedding.weight
        self.embedding, self.tokens = embedding, tokens.to(weight.device)
        self.place = torch.full((len(weight),), -1, device=weight.device).index_copy(0, self.tokens, torch.arange(len(tokens), device=weight.device))
        self.rows = nn.Parameter(weight.detach()[self.tokens])
        self.decayed = torch.ones((), dtype=torch.float64, device=weight.device)  # what is left of the other rows
        self.padding = None if embedding.padding_idx is None else int(self.place[embedding.padding_idx])  # that row never gets a gradient
        weight.requires_grad_(False)
        embedding.register_parameter("used", self.rows)
        embedding.register_buffer("decayed", self.decayed, persistent=False)  # part of checkpoints
        embedding.forward = self._forward  # type: ignore[assignment]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the rows out of use decay with this optimizer's steps, which must be AdamW's: theirs would be nothing but that.

        A step raises RecipeError if the model took its embeddings from elsewhere, so that none of them would learn.
        """

        def decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self.rows.grad is None:
                raise RecipeError("this architecture does not look its tokens up in its embedding; set train.skip_unused_embeddings: false")
            group = next(group for group in optimizer.param_groups if any(parameter is self.rows for parameter in group["params"]))
            self.decayed.mul_(1 - group["lr"] * group["weight_decay"])

        optimizer.register_step_post_hook(decay)

    def restore(self) -> None:
        """One weight again, all of whose rows are as if all had learned."""
        weight = self.embedding.weight
        with torch.no_grad():
            weight.mul_(self.decayed.item()).index_copy_(0, self.tokens, self.rows)
        weight.requires_grad_(True)
        del self.embedding.used, self.embedding.decayed, self.embedding.forward

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = self.place[ids]
        if self.embedding.training:
            return functional.embedding(places, self.rows, self.padding)
        others = functional.embedding(ids, self.embedding.weight) * self.decayed.to(self.rows.dtype)
        return torch.where((places < 0).unsqueeze(-1), others, functional.embedding(places.clamp(min=0), self.rows))


def choose(model: PreTrainedModel, features: FeatureSet, more: Iterable[int | None]) -> torch.Tensor | None:
    """The rows of the model's token embedding that training uses: int64 [n]; None where it must stay as it is, or little would be spared.

    more: tokens that batches have beside those of the rows, such as padding.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters
        return None
    weight = getattr(embedding, "weight", None)
    uses = sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False))
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad or uses > 1 or embedding.max_norm or embedding.scale_grad_by_freq:
        return None
    if features.apart or features.corruption:  # a decoder may look up what it writes, too; and other tokens may be put into rows
        return None
    size, width = embedding.weight.shape
    seen = np.zeros(size, bool)
    seen[[token for token in (*more, embedding.padding_idx) if token is not None]] = True
    for start in range(0, len(features.input_ids), PART):
        seen[features.input_ids[start : start + PART]] = True
        if (size - np.count_nonzero(seen)) * width < LEAST:
            return None
    return torch.from_numpy(np.flatnonzero(seen))
