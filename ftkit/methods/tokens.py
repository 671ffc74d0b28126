"""Tokens whose embeddings learn beside an adapter: what a recipe calls them, and where in a model they are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from ftkit.model import Base

FIELD = "method.trainable_token_indices"


def trainable_token_indices(base: Base, tokens: Sequence[int | str], added: Sequence[int] = ()) -> list[int] | dict[str, list[int]] | None:
    """PEFT's setting of that name: ids where the head is the embedding, if there is one, else those of both by the name of their module.

    `added` are the ids of tokens that the stored model does not know, which learn in any case.
    """
    from torch import nn

    if not tokens and not added:
        return None
    field = FIELD if tokens else "model.add_tokens"
    model: Any = base.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    scaled = hasattr(embedding, "embed_scale")  # by a number, which PEFT knows
    if not isinstance(embedding, nn.Embedding) or (type(embedding).forward is not nn.Embedding.forward and not scaled):
        raise RecipeError(f"{field}: {type(model).__name__} does more than look its tokens up in an embedding; leave it out, or use method: full")
    if head is not None and getattr(head, "bias", None) is not None:
        raise RecipeError(
            f"{field}: the head of {type(model).__name__} has a bias, which PEFT leaves out where tokens of a head learn; leave it out, or use method: full"
        )
    named = range(len(tokens)) if base.tokenizer is None else _ids(tokens, base.tokenizer, embedding.padding_idx)  # without one, they are only counted
    ids = sorted({*named, *added})
    if head is None or head.weight is embedding.weight:
        return ids
    return {name: ids for name, module in model.named_modules() if module in (embedding, head) and name not in base.new_modules}


def _ids(tokens: Sequence[int | str], tokenizer: Any, padding: int | None) -> list[int]:
    """The ids of tokens, ascending; refuses unknown ones with the nearest, those that are named twice, and what gets no gradient."""
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    found: dict[int, int | str] = {}
    for token in tokens:
        if token not in (known if isinstance(token, int) else vocabulary):
            raise RecipeError(f"{FIELD}: {token!r} is not in the vocabulary{_nearest(token, tokenizer, vocabulary)}")
        index = token if isinstance(token, int) else vocabulary[token]
        if index in found:
            raise RecipeError(f"{FIELD}: {found[index]!r} and {token!r} are the same token; name it once")
        if index == padding:
            raise RecipeError(f"{FIELD}: {token!r} is padding, about which nothing is learned; leave it out")
        found[index] = token
    return sorted(found)


def _nearest(token: int | str, tokenizer: Any, vocabulary: dict[str, int]) -> str:
    """What else may have been meant: how the tokenizer writes that text, if it is one token, or what looks alike."""
    if isinstance(token, int):
        return f", whose ids end at {max(vocabulary.values())}"
    written = tokenizer.tokenize(token)
    if len(written) == 1 and written[0] in vocabulary and written[0] != tokenizer.unk_token:
        return f"; the token of this text is {written[0]!r}"
    close = difflib.get_close_matches(token, vocabulary, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
