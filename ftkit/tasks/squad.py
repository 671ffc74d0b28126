"""Exact match and F1 of answers, as the official evaluation scripts of SQuAD 1.1 and 2.0 count them (rajpurkar.github.io/SQuAD-explorer).

The same for every language, as TyDi QA's gold passage task has it (arXiv 2003.05002): words are what stands between spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Score(NamedTuple):
    """How right an answer is, from 0 to 1."""

    exact_match: float
    f1: float


def normalised(text: str) -> str:
    """In lower case, without punctuation, then without articles, a space between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def score(said: str, answers: Sequence[str], version: int) -> Score:
    """Beside the right answer that is most like it.

    Version 1 knows no questions without an answer: what is said to one is wrong.  In version 2 an empty text is right
    for these, and right answers of which nothing is left when they are normalised do not count.
    """
    own, right = normalised(said), [normalised(answer) for answer in answers]
    if version == 2:
        right = [answer for answer in right if answer] or [""]
    return Score(
        exact_match=max((float(own == answer) for answer in right), default=0.0),
        f1=max((_f1(own.split(), answer.split(), version) for answer in right), default=0.0),
    )


def _f1(said: list[str], right: list[str], version: int) -> float:
    """Of words; where there is none, version 2 asks whether both are empty."""
    if version == 2 and not (said and right):
        return float(said == right)
    both = (Counter(said) & Counter(right)).total()
    return 2 * both / (len(said) + len(right)) if both else 0.0


class Judged(NamedTuple):
    """The best answer to a question, and how much better no answer is."""

    null_margin: float  # score of no answer minus that of the best answer
    score: float  # how right the best answer is
    answerable: bool


def best_threshold(questions: Iterable[Judged]) -> tuple[float, float]:
    """The mean score, were no answer said just where the margin is above the best threshold; and that threshold."""
    ordered = sorted(questions, key=lambda question: question.null_margin)
    best = total = float(sum(not question.answerable for question in ordered))
    threshold = 0.0
    for question in ordered:  # as if this one and all before it were answered
        total += question.score if question.answerable else -1
        if total > best:
            best, threshold = total, question.null_margin
    return best / len(ordered), threshold
