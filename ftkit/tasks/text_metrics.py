"""Metrics of written text against one reference each: fractions from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# What each is computed with, beside this file
PACKAGES: Mapping[str, str | None] = {"exact_match": None, "rouge_l": None, "bleu": "sacrebleu", "chrf": "sacrebleu", "stop_rate": None}
WORD = re.compile(r"[^\W_]+")


def measured(answers: Sequence[Mapping[str, Any]], references: Sequence[str], names: Collection[str]) -> dict[str, float]:
    """Those of `names`, over all answers, each a `text` that `finished` by itself or not.

    Exact match but for white space; the stop rate is how many finished.
    BLEU (aclanthology.org/P02-1040) and chrF2 (aclanthology.org/W15-3049) of the whole set as sacrebleu computes them by
    default, mixed case, 13a words; ROUGE-L as the mean over the texts.
    """
    found, texts = {}, [answer["text"] for answer in answers]
    if {"bleu", "chrf"} & set(names):
        from sacrebleu.metrics import BLEU, CHRF

        for name, metric in (("bleu", BLEU), ("chrf", CHRF)):
            if name in names:
                found[name] = metric().corpus_score(texts, [list(references)]).score / 100
    if "rouge_l" in names:
        found["rouge_l"] = sum(map(rouge_l, texts, references)) / len(texts)
    if "exact_match" in names:
        found["exact_match"] = sum(text.split() == reference.split() for text, reference in zip(texts, references, strict=True)) / len(texts)
    if "stop_rate" in names:
        found["stop_rate"] = sum(answer["finished"] for answer in answers) / len(answers)
    return found


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (aclanthology.org/W04-1013, 3.1; beta 1, as github.com/google-research rouge).

    Words are runs of letters and digits in lower case, of any script.
    """
    one, other = (WORD.findall(each.lower()) for each in (text, reference))
    common = _longest_common_subsequence(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, a row of the usual table at a time."""
    best = [0] * (len(other) + 1)  # with the first words of `other`, so many of them
    for word in one:
        before = 0  # of one word less in both
        for place, each in enumerate(other, 1):
            before, best[place] = best[place], before + 1 if word == each else max(best[place], best[place - 1])
    return best[-1]
