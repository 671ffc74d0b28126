"""Sentences laid together as inputs of an encoder, as RoBERTa's are (arXiv 1907.11692, 4.2).

A piece is `Features` without special tokens, whose targets tell words: a negative one goes on with the word before it.
A `Frame` puts special tokens around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ftkit.data.types import Features, Limits, RowError


class Frame(NamedTuple):
    """What a tokenizer puts around a text."""

    before: list[int]
    between: list[int]  # of two texts
    after: list[int]
    special: frozenset[int]  # all tokens that are no text
    types: bool  # whether its models are told which of two texts a token is of

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        whole = tokenizer("a", return_special_tokens_mask=True, verbose=False)
        own = [place for place, special in enumerate(whole["special_tokens_mask"]) if not special]
        before, after = whole["input_ids"][: own[0]], whole["input_ids"][own[-1] + 1 :]
        two = tokenizer("a", "a", return_special_tokens_mask=True, verbose=False)
        special = two["special_tokens_mask"]
        between = [token for token, is_special in zip(two["input_ids"], special, strict=True) if is_special][len(before) : sum(special) - len(after)]
        return cls(before, between, after, frozenset(tokenizer.all_special_ids), "token_type_ids" in tokenizer.model_input_names)

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)

    @property
    def size_of_two(self) -> int:
        """What it puts around two texts."""
        return self.size + len(self.between)

    def around(self, piece: Features, two: bool = False) -> Features:
        """An input of the model; nothing is supervised in its special tokens.  Those between `two` texts, not yet told apart, stand behind both."""
        after = [*self.between, *self.after] if two else self.after
        input_ids = self.before + piece.input_ids + after
        return Features(
            input_ids=input_ids,
            targets=self.before + piece.targets + after,  # type: ignore[operator]
            weights=[0.0] * len(self.before) + piece.weights + [0.0] * len(after),
            token_type_ids=[0] * len(input_ids) if self.types else None,
        )


def fits(pieces: list[Features], length: int, around: int, limits: Limits) -> bool:
    """Whether a row of these pieces is used: it is cut into inputs of `length` tokens and special ones `around`, unless `truncation` is otherwise.

    Raises RowError where it is `error`, and the row is longer than one input.
    """
    total = sum(len(piece.input_ids) for piece in pieces)
    if limits.truncation == "error" and total > length:
        raise RowError(f"{total + around} tokens, more than data.max_length: {limits.max_length}")
    return limits.truncation != "drop" or total <= length


def cut(piece: Features, length: int) -> Iterator[Features]:
    """The piece in parts of at most `length` tokens, which begin with a word, but within words that are longer."""
    start, end = 0, len(piece.input_ids)
    while start < end:
        stop = min(start + length, end)
        if stop < end:
            stop = next((place for place in range(stop, start, -1) if piece.targets[place] >= 0), stop)
        part = slice(start, stop)
        yield Features(piece.input_ids[part], piece.targets[part], piece.weights[part])
        start = stop


def packed(pieces: Iterable[tuple[int, Features]], length: int, separator: int | None = None) -> Iterator[tuple[int, Features]]:
    """As many whole pieces together as fit into `length` tokens, in order; each piece, and what comes out, with its document.

    Between those of two documents there is a separator, if there is one; what crosses the border has the number of the first.
    """
    held, first, last = Features([], [], []), 0, 0
    for document, piece in pieces:
        between = [] if separator is None or document == last else [separator]
        if held.input_ids and len(held.input_ids) + len(between) + len(piece.input_ids) > length:
            yield first, held
            held = Features([], [], [])
        if not held.input_ids:
            first, between = document, []
        held = Features(
            input_ids=held.input_ids + between + piece.input_ids,
            targets=held.targets + between + piece.targets,  # type: ignore[operator]
            weights=held.weights + [0.0] * len(between) + piece.weights,
        )
        last = document
    if held.input_ids:
        yield first, held
