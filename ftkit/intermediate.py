"""What the layers of a model make of the real tokens of a batch, for a student that is to be like its teacher inside, too.

States are taken where layers begin and end; queries, keys and values where `attention.attend` sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ftkit import attention
from ftkit.attention import layers_of
from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from ftkit.data.types import Batch

UNSEEN = -1e4  # a logit whose probability is 0 in float32


@dataclass
class Inside:
    """What layers made of N real tokens, in the order of rows."""

    states: list[torch.Tensor] = field(default_factory=list)  # [N, H] each: what came into the first layer, and what each layer gave
    compared: list[list[torch.Tensor]] = field(default_factory=list)  # queries, keys and values, [N, heads, head_dim] each
    causal: bool = False  # whether tokens look at those before them alone


class Watch:
    """A model whose layers are watched while `rows` says so; `compared`: what they compare in attention, too.

    Raises RecipeError where the layers, or their attention, cannot be told from other modules.
    """

    def __init__(self, model: Any, compared: bool) -> None:
        layers = layers_of(model)
        attentions = [[module for module in layer.modules() if hasattr(module, "is_causal")][:1] for layer in layers]
        if not layers or (compared and not (all(attentions) and model._can_set_attn_implementation())):
            raise RecipeError(f"objective distill: the layers of {type(model).__name__} cannot be watched; compare its scores alone")
        self._inside: Inside | None = None
        self._batch: Batch | None = None
        self._hooks = [layers[0].register_forward_pre_hook(self._begins, with_kwargs=True), *(layer.register_forward_hook(self._ends) for layer in layers)]
        self._attentions = [module for (module,) in attentions] if compared else []
        self._causal = all(module.is_causal for module in self._attentions)
        self._model, self._before = model, model.config._attn_implementation
        if compared:
            attention.use(model)
        for module in self._attentions:
            module.watch = self._compares  # type: ignore[assignment]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for module in self._attentions:
            del module.watch
        if self._attentions:
            self._model.set_attn_implementation(self._before)

    @contextmanager
    def rows(self, batch: Batch) -> Iterator[None]:
        """What is called herein sees this batch, and is told by `seen`."""
        self._inside, self._batch = Inside(causal=self._causal), batch
        try:
            yield
        finally:
            self._batch = None

    def seen(self) -> Inside:
        """What the layers made of the last batch; it is let go of here."""
        assert self._inside is not None
        seen, self._inside = self._inside, None
        return seen

    def _begins(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._batch is not None and self._inside is not None:
            self._inside.states.append(self._real(args[0] if args else kwargs["hidden_states"]))

    def _ends(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._batch is not None and self._inside is not None:
            self._inside.states.append(self._real(output[0] if isinstance(output, tuple) else output))

    def _compares(self, *compared: torch.Tensor) -> None:
        """Queries, keys and values, [B, heads, L, head_dim] or flat [1, heads, N, head_dim] each."""
        if self._batch is not None and self._inside is not None:
            self._inside.compared.append([self._real(states.transpose(1, 2)) for states in compared])

    def _real(self, states: torch.Tensor) -> torch.Tensor:
        """[N, ...] of [B, L, ...], or of flat [1, N, ...]."""
        assert self._batch is not None
        segments = self._batch.segments
        if segments is None:
            return states.flatten(0, 1)
        return segments.without_filler(segments.gather(states) if states.shape[:2] == segments.shape else states).squeeze(0)


def token_weights(batch: Batch) -> torch.Tensor:
    """float32 [N]: 1 for each real token of a row in which something is supervised, 0 for others: those of a process that has no rows."""
    learned = (batch.weights != 0).view(len(batch.weights), -1).any(1)
    real = batch.attention_mask.bool()
    return learned[:, None].expand_as(real)[real].float()


def lengths_of(batch: Batch) -> list[int]:
    """Real tokens of each row."""
    if batch.segments is None:
        return [batch.input_ids.shape[1]] * len(batch.input_ids)
    return batch.segments.lengths


def layer_map(kind: str | Sequence[int], student: int, teacher: int) -> list[int]:
    """For each of the student's layers the teacher's that it is to be like, counted from 0.

    `uniform`: spread over the teacher's, its last one with its last one; `last`: the highest ones.  Raises ValueError where there are no such layers.
    """
    if kind == "uniform":
        return [(place + 1) * teacher // student - 1 for place in range(student)]
    if kind == "last":
        if student > teacher:
            raise ValueError(f"last, but the student has {student} layers, and the teacher {teacher}")
        return list(range(teacher - student, teacher))
    assert not isinstance(kind, str)
    if len(kind) != student:
        raise ValueError(f"it names {len(kind)} layers, one for each of the student's, which has {student}")
    if beyond := [layer for layer in kind if layer >= teacher]:
        raise ValueError(f"there is no layer {beyond[0]}: the teacher has {teacher}, counted from 0")
    return list(kind)


def squared(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """float32 [N]: the mean squared difference of each token's states (TinyBERT, arXiv 1909.10351, eq. 8 and 9)."""
    return (student.float() - teacher.float()).square().mean(-1)


def angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """float32 [N]: 1 - cosine of each token's states (DistilBERT, arXiv 1910.01108, 3)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def maps(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], lengths: Sequence[int], causal: bool) -> torch.Tensor:
    """float32 [N]: the mean squared difference, over heads and the tokens that each may look at, of attention before its softmax (TinyBERT, eq. 7)."""
    found = []
    for own, theirs in zip(*(_products(query, key, lengths) for query, key, _ in (student, teacher)), strict=True):  # [heads, n, n] each
        seen = _seen(own, causal)
        found.append(((own - theirs).square().mean(0) * seen).sum(-1) / seen.sum(-1))
    return torch.cat(found)


def relations(student: torch.Tensor, teacher: torch.Tensor, lengths: Sequence[int], heads: int, causal: bool) -> torch.Tensor:
    """float32 [N]: how far each token's relations to the tokens that it may look at are from the teacher's, KL(teacher || student), a mean over heads.

    These are of queries, keys or values, cut anew into so many heads (MiniLM v2, arXiv 2012.15828, 3.1).
    """
    found = []
    cut = [states.flatten(1).unflatten(1, (heads, -1)) for states in (student, teacher)]
    for own, theirs in zip(*(_products(states, states, lengths) for states in cut), strict=True):
        unseen = ~_seen(own, causal)
        one, other = (each.masked_fill(unseen, UNSEEN).log_softmax(-1) for each in (theirs, own))
        found.append((one.exp() * (one - other)).sum(-1).mean(0))
    return torch.cat(found)


def _products(left: torch.Tensor, right: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Of each row of n tokens float32 [heads, n, n]: how alike they are, scaled as in attention; [N, heads, head_dim] each, or fewer heads on the right."""
    right = right.repeat_interleave(left.shape[1] // right.shape[1], 1)
    rows = zip(left.float().split(list(lengths)), right.float().split(list(lengths)), strict=True)
    return [torch.einsum("ihd,jhd->hij", one, other) / one.shape[-1] ** 0.5 for one, other in rows]


def _seen(products: torch.Tensor, causal: bool) -> torch.Tensor:
    """bool [n, n]: which tokens each may look at."""
    every = torch.ones(products.shape[1:], dtype=torch.bool, device=products.device)
    return every.tril() if causal else every
