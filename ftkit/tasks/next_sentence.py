"""Next-sentence prediction (arXiv 1810.04805, 3.1): whether one segment of text follows another, and masked language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.errors import DataError
from ftkit.tasks.pairing import FromAnotherRow
from ftkit.tasks.sentence_pairs import SentencePairs

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.tasks.pairing import Made


class NextSentence(SentencePairs):
    """Whether a segment of text is the next one or of another document, and which tokens stood where some are hidden: as BERT was pre-trained."""

    kind: Literal["next-sentence"] = "next-sentence"

    answers: ClassVar[tuple[str, str]] = ("next", "not_next")

    def _made(self, features: FeatureSet, tokenizer: Any) -> Made:
        if features.row[0] == features.row[-1]:
            raise DataError(
                f"task {self.kind}: false next segments are taken from other documents (a txt file is one, or a row of other formats), and there is only one; "
                "give more of them in each set, or use task: sentence-order, which needs no others"
            )
        return FromAnotherRow(features, self._frame(tokenizer))
