"""Texts as tokens that fit into a model, and rows of them that are asked about as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit.data.types import Features, Limits, Row, RowError

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch


class Fitted(NamedTuple):
    """The tokens of a text, or of a pair of texts, and how many did not fit."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    truncated: int


def fit(tokenizer: Any, texts: Sequence[str], limits: Limits) -> Fitted | None:
    """A text, or a pair, cut as the limits say; None if it is dropped for its length.  Raises RowError."""
    encoded = tokenizer(*texts, truncation=False, verbose=False)
    excess = len(encoded["input_ids"]) - limits.max_length
    if excess > 0:
        if limits.truncation == "drop":
            return None
        if limits.truncation == "error":
            raise RowError(f"{len(encoded['input_ids'])} tokens, more than data.max_length: {limits.max_length}")
        side, tokenizer.truncation_side = tokenizer.truncation_side, limits.truncation
        encoded = tokenizer(*texts, truncation="longest_first", max_length=limits.max_length)
        tokenizer.truncation_side = side
    if not encoded["input_ids"]:
        raise RowError("no tokens")
    return Fitted(encoded["input_ids"], encoded.get("token_type_ids"), max(excess, 0))


def features_of(rows: Iterable[Row], encode: Callable[[Row], list[Features]]) -> FeatureSet:
    """Those of rows that are to be answered.  Raises DataError for a row that cannot be used."""
    from ftkit.data.features import FeatureSet

    def encoded(row: Row) -> list[Features]:
        with row.named():
            return encode(row)

    return FeatureSet.of(map(encoded, rows))


def batch_of(rows: Iterable[Row], encode: Callable[[Row], list[Features]], tokenizer: Any, device: Any) -> Batch:
    """Their features side by side."""
    import numpy as np

    from ftkit.data.batches import collate

    features = features_of(rows, encode)
    return collate(features, np.arange(len(features)), tokenizer.pad_token_id).to(device)
