"""Sentence-order prediction (arXiv 1909.11942, 3.1): whether two segments of a text stand in their order, and masked language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.tasks.pairing import swapped
from ftkit.tasks.sentence_pairs import SentencePairs

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.tasks.pairing import Made


class SentenceOrder(SentencePairs):
    """Whether two segments of a text stand in their order or were swapped, and which tokens stood where some are hidden: as ALBERT was pre-trained."""

    kind: Literal["sentence-order"] = "sentence-order"

    answers: ClassVar[tuple[str, str]] = ("in_order", "swapped")

    def _made(self, features: FeatureSet, tokenizer: Any) -> Made:
        return swapped
