"""Next-sentence prediction (arXiv 1810.04805, 3.1): whether one segment of text follows another, and masked language modelling."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.errors import DataError
from ftkit.tasks.pairing import FromAnotherRow
from ftkit.tasks.sentence_pairs import SentencePairs

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Row
    from ftkit.tasks.pairing import Made


class NextSentence(SentencePairs):
    """Whether a segment of text is the next one or of another document, and which tokens stood where some are hidden: as BERT was pre-trained."""

    kind: Literal["next-sentence"] = "next-sentence"

    answers: ClassVar[tuple[str, str]] = ("next", "not_next")

    def resolve(self, rows: Iterable[Row]) -> NextSentence:
        """Refuses a document alone."""
        if next(islice(rows, 1, None), None) is None:
            raise self._alone()
        return self

    def _made(self, features: FeatureSet, tokenizer: Any) -> Made:
        if features.row[0] == features.row[-1]:
            raise self._alone()
        return FromAnotherRow(features, self._frame(tokenizer))

    def _alone(self) -> DataError:
        return DataError(
            f"task {self.kind}: false next segments are taken from other documents (a txt file is one, or a row of other formats), and there is only one; "
            "give more of them in each set, or use task: sentence-order, which needs no others"
        )
