"""What tasks share that look for places in a text: long texts in windows of tokens, and of which characters each token is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from ftkit.data.types import Limits


class Window(NamedTuple):
    """A part of a text that fits into the model, behind another text, if there is one."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    spans: list[tuple[int, int] | None]  # the characters of the text that a token is of, from and to; None for special ones and those of the other text


def check_tokenizer(tokenizer: Any, kind: str, consequence: str) -> None:
    """Refuse a tokenizer that does not say which characters its tokens are of."""
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(
            f"task {kind}: the tokenizer of {tokenizer.name_or_path or 'this run'} does not say where in a text its tokens stand, so {consequence}; "
            "use one that is made by the tokenizers library (a tokenizer.json)"
        )


def windows_of(tokenizer: Any, text: str, limits: Limits, stride: int, room: int, before: str | None = None) -> list[Window]:
    """The text in windows of at most `max_length` tokens, each with the whole of the text `before` it.

    Neighbours share `stride` tokens, but no more than half of the `room` that a window has for the text.
    """
    encoded = tokenizer(
        *([text] if before is None else [before, text]),
        truncation="only_first" if before is None else "only_second",
        max_length=limits.max_length,
        stride=max(0, min(stride, room // 2)),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    tokenizer("", verbose=False)  # which forgets what it was told about lengths: it would be saved so
    own = 0 if before is None else 1
    found = []
    for number, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        types = encoded["token_type_ids"][number] if "token_type_ids" in encoded else None
        found.append(Window(ids, types, [span if of == own else None for of, span in zip(encoded.sequence_ids(number), offsets, strict=True)]))
    return found
