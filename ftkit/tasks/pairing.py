"""Two segments of text as an input, the second the one that follows the first, or not: what BERT and ALBERT learn beside hidden tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ftkit.tasks.packing import Frame

if TYPE_CHECKING:
    import numpy as np

    from ftkit.data.features import Example, FeatureSet

LINE = 2  # weight of a token that a line begins with; of others that can be hidden it is 1


@dataclass(frozen=True)
class Segment:
    """Some tokens of a text, as a feature has them."""

    input_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, part: slice) -> Segment:
        return Segment(self.input_ids[part], self.targets[part], self.weights[part])

    def __add__(self, other: Segment) -> Segment:
        import numpy as np

        parts = ((self.input_ids, other.input_ids), (self.targets, other.targets), (self.weights, other.weights))
        return Segment(*map(np.concatenate, parts))


# Of the two segments of an example, and the index of its row, a pair that does not belong together; as long.
Made: TypeAlias = "Callable[[Segment, Segment, int, np.random.Generator], tuple[Segment, Segment]]"


@dataclass(frozen=True)
class Pairing:
    """A change of examples: their lines become two segments, which in half of the cases do not follow each other; then tokens are hidden.

    An example is the lines of a document within a frame.  The first segment ends with one of its lines, any of them; a
    line alone is cut between words.  The first position, of which the pooler of an encoder is, has the target ~1 where
    the pair was made, ~0 where it is the text's own: a negative one, which no token is.
    """

    frame: Frame
    masks: Callable[[Example, np.random.Generator], Example]
    made: Made

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        import numpy as np

        whole = text_of(example, self.frame)
        own = whole[: (cut := self._cut(whole, rng))], whole[cut:]
        false = bool(rng.random() < 0.5)
        first, second = self.made(*own, example["row"], rng) if false else own
        before, between, after = (self._special(tokens, example) for tokens in (self.frame.before, self.frame.between, self.frame.after))
        laid = before + first + between + second + after
        types = np.repeat(np.array([0, 1], np.int8), (len(before) + len(first) + len(between), len(second) + len(after)))
        weights = laid.weights.clip(max=1)
        changed = self.masks(example | {"input_ids": laid.input_ids, "targets": laid.targets, "weights": weights}, rng)
        targets, weights = changed["targets"].copy(), changed["weights"]
        targets[0], weights[0] = ~int(false), 1
        return changed | {"targets": targets, "token_type_ids": types if self.frame.types else None}

    def _cut(self, text: Segment, rng: np.random.Generator) -> int:
        """Where the second segment begins."""
        import numpy as np

        inner = text[1:]
        for begins in (inner.weights == LINE, inner.targets >= 0):
            if (places := np.flatnonzero(begins)).size:
                return int(rng.choice(places)) + 1
        return int(rng.integers(len(inner))) + 1

    def _special(self, tokens: list[int], example: Example) -> Segment:
        import numpy as np

        ids = np.array(tokens, example["input_ids"].dtype)
        return Segment(ids, ids.astype(example["targets"].dtype), np.zeros(len(ids), example["weights"].dtype))


def text_of(example: Example, frame: Frame) -> Segment:
    """A feature without the special tokens around it."""
    stop = len(example["input_ids"]) - len(frame.between) - len(frame.after)
    return Segment(example["input_ids"], example["targets"], example["weights"])[len(frame.before) : stop]


def swapped(first: Segment, second: Segment, row: int, rng: np.random.Generator) -> tuple[Segment, Segment]:
    """The same two, in the other order."""
    return second, first


class FromAnotherRow:
    """In place of the second segment lines of another document, any of them, cut to its length: features keep theirs, and lengths tell nothing."""

    def __init__(self, features: FeatureSet, frame: Frame) -> None:
        import numpy as np

        self.features, self.frame = features, frame
        row = features.row[:]
        self.firsts = np.flatnonzero(np.diff(row, prepend=-1))  # features that documents begin with
        self.documents = row[self.firsts]  # rows

    def __call__(self, first: Segment, second: Segment, row: int, rng: np.random.Generator) -> tuple[Segment, Segment]:
        import numpy as np

        own = int(np.searchsorted(self.documents, row))
        document = int(rng.integers(len(self.documents) - 1))
        document += document >= own
        bounds = [*self.firsts[document : document + 2].tolist(), len(self.features)]
        place = int(rng.integers(bounds[0], bounds[1]))
        text = self._text(place)
        lines = np.flatnonzero(np.append(LINE, text.weights[1:]) == LINE)
        found = text[int(rng.choice(lines)) :]
        while len(found) < len(second):
            place = (place + 1) % len(self.features)
            if self.features.row[place] != row:
                found = found + self._text(place)
        return first, found[: len(second)]

    def _text(self, place: int) -> Segment:
        return text_of(self.features.stored(place), self.frame)
