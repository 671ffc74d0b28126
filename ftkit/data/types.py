"""The three shapes data takes: rows as read, features as tokenised, batches as computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, frozen=True)
class Row:
    """One example under the task's column names, and where it stands for error messages."""

    values: dict[str, Any]
    file: str
    number: int  # from 1: the line in jsonl and txt files; in other formats the record, the header not counted

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(slots=True)
class Rows:
    """The rows of a run by split; `validation` maps names to rows (one, called `validation`, as a rule)."""

    train: list[Row]
    validation: dict[str, list[Row]]
    test: list[Row]
    sha256: dict[str, str]  # file or hub id -> content hash, for the manifest and the cache key
    columns: dict[str, str]  # what the task calls a column -> what the file calls it
    bad: list[str]  # "file:row: reason" of each row left out under on_bad_rows: skip
    pool: list[Row]  # what `train`, and a fraction for validation, were drawn from: what tasks know all labels from


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
    """

    input_ids: list[int]
    targets: list[int] | list[float]
    weights: list[float]  # 0 where nothing is supervised
    token_type_ids: list[int] | None = None
    truncated: int = 0  # tokens that did not fit into max_length
    untrained_answers: int = 0  # of a chat: answers that its template shows differently once the chat goes on


@dataclass(slots=True)
class Batch:
    """Rows laid out for one forward pass.  B rows of L positions.

    `segments` numbers the row that a position belongs to from 1; 0 is padding.
    """

    input_ids: torch.Tensor  # int64 [B, L]
    segments: torch.Tensor  # int64 [B, L]
    position_ids: torch.Tensor  # int64 [B, L], from 0 in each segment
    targets: torch.Tensor  # int64 or float32, [B, L] or [B]
    weights: torch.Tensor  # float32, as targets
    row_ids: torch.Tensor  # int64 [number of segments]: index into the feature set
    token_type_ids: torch.Tensor | None = None  # int64 [B, L]

    @property
    def attention_mask(self) -> torch.Tensor:
        """int64 [B, L]: 1 on real tokens."""
        return (self.segments > 0).long()

    def to(self, device: Any) -> Batch:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__ if getattr(self, name) is not None}
        return replace(self, **moved)


@dataclass(slots=True)
class Scores:
    """What the model said on the supervised items of a batch, beside what it should have said.

    n is the number of supervised positions (or rows), C the number of classes (or the vocabulary).
    """

    logits: torch.Tensor  # float [n, C]
    targets: torch.Tensor  # [n]
    weights: torch.Tensor  # float32 [n]
    rows: torch.Tensor  # int64 [n]: the feature (index into the feature set) that an item belongs to
