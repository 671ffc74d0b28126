"""The three shapes data takes: rows as read, features as tokenised, batches as computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ftkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ftkit.data.features import FeatureSet
    from ftkit.data.ondisk import Spool


@dataclass(slots=True, frozen=True)
class Row:
    """One example under the task's column names, and where it stands for error messages."""

    values: dict[str, Any]
    file: str
    number: int  # from 1: the line in jsonl and txt files; in other formats the record, the header not counted

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Say where the row stands that cannot be used: RowError becomes DataError."""
        try:
            yield
        except RowError as error:
            raise DataError(f"{self.where}: {error}") from error


# What an item has: one of C classes, any of C labels, a number, one of the positions of its own row, or a text of its own.
Targets: TypeAlias = Literal["classes", "labels", "numbers", "positions", "matches"]
RowList: TypeAlias = "list[Row] | Spool[Row]"  # in memory or on disk
Losses: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"  # float32 logits and targets of n items -> float32 [n]


@dataclass(slots=True)
class Rows:
    """The rows of a run by split; `validation` maps names to rows (one, called `validation`, as a rule)."""

    train: RowList
    validation: dict[str, RowList]
    test: RowList
    sha256: dict[str, str]  # file or hub id -> content hash, for the manifest and the cache key
    columns: dict[str, str]  # what the task calls a column -> what the file calls it
    bad: list[str]  # "file:row: reason" of each row left out under on_bad_rows: skip
    pool: RowList  # what `train`, and a fraction for validation, were drawn from: what tasks know all labels from


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, without the place."""


class Limits(NamedTuple):
    """How long a row may be, in tokens, and what happens to a longer one."""

    max_length: int
    truncation: str  # right | left | drop | error


@dataclass(slots=True)
class Features:
    """One tokenised row.

    `targets` and `weights` are aligned with `input_ids` for tasks that supervise positions (already
    shifted: targets[i] is what position i must predict), and have one entry for tasks that supervise rows.
    Where a target is several numbers, these follow each other, and there is a weight for each target.
    `apart`, they are a sequence of their own, as long as it likes: what a decoder writes.
    """

    input_ids: list[int]
    targets: list[int] | list[float]
    weights: list[float]  # 0 where nothing is supervised
    token_type_ids: list[int] | None = None
    truncated: int = 0  # tokens that did not fit into max_length
    untrained_answers: int = 0  # of a chat: answers that its template shows differently once the chat goes on
    silent_words: int = 0  # of a row of words: those that the tokenizer makes nothing of
    apart: bool = False  # alike in all features of a set
    spans: list[int] | None = None  # two numbers a token: from and to which character of the row it is; equal where it is of none
    texts: list[int] | None = None  # of a row of several texts that are read apart: how many of the tokens are each's; as many in all features of a set

    @property
    def tokens(self) -> list[int]:
        """All that the model reads or writes."""
        return [*self.input_ids, *map(int, self.targets)] if self.apart else self.input_ids


class Padding(NamedTuple):
    """How N real tokens lie among the S positions of padded groups of rows."""

    places: torch.Tensor  # int64 [N]: where the tokens are
    sources: torch.Tensor  # int64 [S]: which token is there; any, for padding
    empty: torch.Tensor  # int64 [S - N]: where padding is


@dataclass(slots=True, frozen=True)
class Segments:
    """Where the real tokens of a padded batch are: N of them in B rows of L positions."""

    shape: tuple[int, int]  # B, L
    lengths: list[int]  # real tokens of each row, with which it begins
    index: torch.Tensor  # int64 [N]: their places among the B * L positions
    bounds: torch.Tensor  # int32 [B + 1]: 0, and where each row ends among the N tokens
    groups: list[tuple[int, int]]  # (count, length): how many rows in succession attend in one call, padded to which length
    padding: Padding | None  # that of the groups, if they have any
    filler: int = 0  # the first row is no row: so many tokens that are copies of those after it, to a round N

    @property
    def rows(self) -> slice:
        """Where the real rows are, among lengths and bounds."""
        return slice(bool(self.filler), None)

    def to(self, device: Any, non_blocking: bool = False) -> Segments:
        return self._with(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        return self._with(lambda part: part.pin_memory())

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
        padding = self.padding and Padding(*map(change, self.padding))
        return replace(self, index=change(self.index), bounds=change(self.bounds), padding=padding)

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [1, N, ...]."""
        return padded.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def scatter(self, flat: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [B, L, ...], with 0 for padding."""
        padded = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[2:])
        return padded.index_copy(0, self.index[self.filler :], self.without_filler(flat).squeeze(0)).unflatten(0, self.shape)

    def with_filler(self, flat: torch.Tensor) -> torch.Tensor:
        """[1, N - filler, ...] -> [1, N, ...]."""
        import torch

        return torch.cat((flat[:, : self.filler], flat), 1) if self.filler else flat

    def without_filler(self, flat: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [1, N - filler, ...]."""
        return flat[:, self.filler :]


@dataclass(slots=True)
class Batch:
    """Rows side by side for one forward pass, padded on the right.  B rows of L positions.

    Of rows of P texts each, these are beside each other: there are B * P where inputs have B.
    """

    input_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # int64 [B, L]: 1 on real tokens
    targets: torch.Tensor  # int64 or float32, [B, L], [B], or [B, T] of a decoder, padded as input_ids are; [..., W] if each is W numbers
    weights: torch.Tensor  # float32, as targets, one for each
    supervised: torch.Tensor  # int64 [n]: where weights are not 0, among the B * L or B * T positions, or the B rows
    row_ids: torch.Tensor  # int64 [B]: index into the feature set
    source: tuple[FeatureSet, np.ndarray]  # that the rows come from, and row_ids where no device has to be asked
    token_type_ids: torch.Tensor | None = None  # int64 [B, L]
    segments: Segments | None = None  # None where there is no padding
    filled: Segments | None = None  # the real tokens again, with filler to a round number; None: not wanted, or the number is round
    written: torch.Tensor | None = None  # bool [B]: rows whose answers the model itself wrote; None: of none

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What an encoder is given: keyword arguments of its forward, [B, L] each."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **types}

    def to(self, device: Any) -> Batch:
        return self._with(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In memory that a GPU can copy from while it computes."""
        return self._with(lambda part: part.pin_memory())

    def _with(self, change: Callable[[Any], Any]) -> Batch:
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: change(part) for name, part in parts.items() if hasattr(part, "pin_memory")})


@dataclass(slots=True)
class Scores:
    """What the model said on supervised items, beside what it should have said.

    n is the number of items (positions or rows), C the number of classes (or the vocabulary).
    """

    logits: torch.Tensor  # float [n, C]; of numbers [n, 1]; of positions [n, L], -inf behind the end of a row; of texts [n, P, H], their embeddings
    targets: torch.Tensor  # as `kind` says: int64 [n], float32 [n, C] of 0 and 1, float32 [n], or int64 [n]; matches have none that means anything
    weights: torch.Tensor  # float32 [n]
    rows: torch.Tensor  # int64 [n]: the feature (index into the feature set) that an item belongs to
    counted: torch.Tensor | None = None  # bool [n]: what metrics beside the loss count; all if None
    kind: Targets = "classes"
    losses: Losses | None = None  # other ones than those of the kind
    part: int = 0  # of the loss, where that is a sum of several
    written: torch.Tensor | None = None  # bool [n]: targets that the model itself wrote; None: none
    teacher: torch.Tensor | None = None  # float [n, C]: a teacher's logits, where the objective asks one


@dataclass(slots=True)
class Items:
    """The supervised items of a batch before the output head: logits of them all need not exist at one time."""

    states: torch.Tensor  # float [n, ...]: what the head makes logits of
    head: Callable[[torch.Tensor], torch.Tensor] | None  # states of m items -> logits [m, C]; None: the states are logits
    num_classes: int  # C
    targets: torch.Tensor  # [n]
    weights: torch.Tensor  # float32 [n]
    rows: torch.Tensor  # int64 [n]
    counted: torch.Tensor | None = None  # as those of the scores
    kind: Targets = "classes"
    layer: nn.Linear | None = None  # within the head: [C, H], where a logit takes what it gives for its own row, nothing else of it
    losses: Losses | None = None  # as those of the scores
    part: int = 0  # of the loss, where that is a sum of several, each divided by weights of its own
    share: float = 1.0  # what that part's mean is multiplied by
    written: torch.Tensor | None = None  # as those of the scores
    teacher: Items | None = None  # the same ones, as a teacher has them

    def __len__(self) -> int:
        return len(self.targets)

    def scores(self, part: slice = slice(None), states: torch.Tensor | None = None) -> Scores:
        """Those of a part of the items; `states` in place of their own."""
        states = self.states[part] if states is None else states
        counted, written = (None if each is None else each[part] for each in (self.counted, self.written))
        logits = self.head(states) if self.head else states
        teacher = None if self.teacher is None else self.teacher.scores(part).logits
        return Scores(logits, self.targets[part], self.weights[part], self.rows[part], counted, self.kind, self.losses, self.part, written, teacher)

    def parts(self, size: int) -> Iterator[slice]:
        """Slices of `size` items; one, if there are no items."""
        return (slice(start, start + size) for start in range(0, max(1, len(self)), size))
