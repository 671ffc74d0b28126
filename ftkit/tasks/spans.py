"""Spans of tagged words, as conlleval reads them: IOB1, IOB2, IOE and IOBES tags alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OUTSIDE = "O"
PREFIXES = ("B", "I", "E", "S")


class Span(NamedTuple):
    """The words from `start` to before `end`."""

    label: str
    start: int
    end: int


def tagged(labels: Iterable[str]) -> bool:
    """Whether labels say where spans begin and go on (`B-PER`, `I-PER`, `O`), or are of words alone (`NOUN`)."""
    names = set(labels) - {OUTSIDE}
    return bool(names) and all(name[:1] in PREFIXES and name[1:2] == "-" and name[2:] for name in names)


def types_of(labels: Iterable[str]) -> list[str]:
    """What spans can be, in alphabetic order."""
    return sorted({name[2:] for name in labels if name != OUTSIDE})


def spans(tags: Sequence[str]) -> Iterator[Span]:
    """The spans of a row of tags, one after the other.

    A tag that goes on with another type than the one before, or with none before it, begins a span: the rules of
    conlleval (www.clips.uantwerpen.be/conll2000/chunking/conlleval.txt).
    """
    start, before, label = 0, OUTSIDE, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = (OUTSIDE, "") if tag == OUTSIDE else (tag[0], tag[2:])
        begins = prefix in "BS" or (prefix in "EI" and (before in "ESO" or kind != label))
        if before != OUTSIDE and (begins or prefix == OUTSIDE):
            yield Span(label, start, place)
        if begins:
            start = place
        before, label = prefix, kind
