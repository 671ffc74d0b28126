"""Which tokens are hidden, and behind what: single ones, whole words, or spans of words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

SPAN_P, LONGEST_SPAN = 0.2, 10  # of SpanBERT's geometric distribution of lengths, in words (arXiv 1907.10529, 3.1)


@dataclass(frozen=True)
class Masking:
    """A change of examples: some of their tokens are hidden, and these are what is supervised.

    As in BERT's create_pretraining_data.py a share of the tokens is hidden, rounded, one at least, rather than each by
    chance; a word is hidden where all of its tokens still fit into that number.  Where no word does, one is hidden all
    the same.  An example's weights tell what can be hidden.  Its targets tell words: ~token goes on with the one before.
    """

    probability: float
    unit: Literal["token", "whole-word", "span"]
    mask_share: float  # of hidden tokens, or spans, that the mask token stands for
    random_share: float  # that other tokens stand for; the rest is seen as it is
    mask_token: int
    others: np.ndarray  # int [k]: what may stand for a token

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        import numpy as np

        tokens, input_ids = example["input_ids"], example["input_ids"].copy()
        weights = np.zeros_like(example["weights"])
        can = example["weights"] > 0
        if can.any():
            goes_on = (example["targets"] < 0) & np.concatenate(([False], can[:-1]))
            chosen, group = self._chosen(np.flatnonzero(can), np.flatnonzero(can & ~goes_on), rng)
            weights[chosen] = 1
            drawn = rng.random(group[-1] + 1)[group]
            input_ids[chosen[drawn < self.mask_share]] = self.mask_token
            by_others = chosen[(drawn >= self.mask_share) & (drawn < self.mask_share + self.random_share)]
            input_ids[by_others] = self.others[rng.integers(len(self.others), size=len(by_others))]
        return example | {"input_ids": input_ids, "targets": tokens, "weights": weights}

    def _chosen(self, places: np.ndarray, begins: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The places that are hidden, of those that can be, and to which group, replaced alike, each belongs: numbers from 0.

        Words begin at `begins`.
        """
        import numpy as np

        firsts = np.searchsorted(places, begins)
        sizes = np.diff(np.append(firsts, len(places)))
        beside = np.concatenate(([False], places[firsts[1:]] == places[firsts[1:] - 1] + 1))  # a word, and the one before it
        lengths = np.ones(len(begins), np.int64)
        order = rng.permutation(len(begins))
        if self.unit == "span":
            shares = (1 - SPAN_P) ** np.arange(LONGEST_SPAN)
            lengths = 1 + rng.choice(LONGEST_SPAN, len(begins), p=shares / shares.sum())
        spans = _spans(order.tolist(), lengths.tolist(), sizes.tolist(), beside.tolist(), max(1, round(self.probability * len(places))))
        bounds = [(firsts[first], firsts[last] + sizes[last]) for first, last in spans]
        chosen = np.concatenate([places[start:stop] for start, stop in bounds])
        alike = [stop - start for start, stop in bounds] if self.unit == "span" else [1] * len(chosen)
        return chosen, np.repeat(np.arange(len(alike)), alike)


def _spans(order: list[int], lengths: list[int], sizes: list[int], beside: list[bool], budget: int) -> list[tuple[int, int]]:
    """First and last word of spans that begin in this `order`, of so many words at most, and of `budget` tokens together."""
    taken, found = [False] * len(sizes), []
    for first, length in zip(order, lengths, strict=True):
        word = first
        while word < len(sizes) and word < first + length and not taken[word] and sizes[word] <= budget and (word == first or beside[word]):
            taken[word] = True
            budget -= sizes[word]
            word += 1
        if word > first:
            found.append((first, word - 1))
        if not budget:
            break
    return found or [(order[0], order[0])]
