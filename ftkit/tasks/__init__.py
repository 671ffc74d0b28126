"""Tasks: what the data means.  One file a kind; `Task` is the contract they all fulfil."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ftkit.data.formats import OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Features, Items, Limits, Row, Scores, Targets
    from ftkit.recipe.spec import Default, Generation
    from ftkit.tasks.streaming import Kept


class Column:
    """A column that a task reads: the names it is detected under, most specific first."""

    __slots__ = ("aliases", "doc", "name")

    def __init__(self, name: str, doc: str, *aliases: str) -> None:
        self.name, self.doc, self.aliases = name, doc, (name, *aliases)


class Shape:
    """One combination of columns that a row may have; `asked` are those that a question must have, by default all required ones that are no answers."""

    __slots__ = ("asked", "optional", "required")

    def __init__(self, *required: Column, optional: tuple[Column, ...] = (), asked: tuple[Column, ...] | None = None) -> None:
        self.required, self.optional = required, optional
        self.asked = tuple(column for column in required if column.name not in OUTPUTS) if asked is None else asked


class Metrics(Protocol):
    """Streaming metrics of one evaluation: sums, so that memory is flat and processes add up, and no more numbers of each item than a metric needs.

    Those that measure whole rows, whose features may be in several batches, may have `records()` in place of the task's: one
    object a row of all that was measured, `feature` being the index of its first feature.
    """

    sums: dict[str, torch.Tensor]  # float64; adding those of all processes gives those of the whole set
    kept: dict[str, Kept]  # in any order; those of all processes, one after the other, are those of the whole set

    def update(self, scores: Scores) -> None: ...

    def compute(self) -> dict[str, float]:
        """Bare metric names to values, plus `loss` and its denominator `loss_count`."""
        ...

    def details(self) -> dict[str, Any]:
        """What is more than a number, for details.json: `intervals` of metrics, [from, to] by name; tables of classes; nothing, as it is."""
        ...


class Task(Protocol):
    """What a row is, what is supervised in it, and how outputs become metrics and predictions.

    A task with metrics of what `predict` says has `written`, a map of their names to the packages that they need (or
    None), `judge(answers, rows, names)`, which computes them, `reference(row)`, the right answer or None, and
    `asked(row)`, what it is an answer to.  They are among `metric_names`, and computed at the end only, if eval.metrics
    names them: generating takes long.

    A task whose features change each time they are used has `corruption(features, tokenizer, seed)`, which says how (a
    `ftkit.data.features.Corruption`).  One whose inputs cross the borders of rows has `packed(features, tokenizer, limits)`,
    which makes them, each with the index of the row that it begins in, of what `encode` gave for each index.

    One whose rows cannot be measured if all are of one class has `classes_of(row)`, their names.

    One whose rows are compared with each other in training is `coupled`.  One whose models sentence-transformers loads has
    `lay_out(directory, config, max_length)`, which writes the files that it takes beside the weights, and `read_off(model, rows)`,
    what a fresh process must make of rows by these.

    One whose loss is a sum of several means gives `items` of each, a tuple, and has `counts(batch)`, float64 [K], the weights
    of each.  One whose `auto_class` has different heads in different architectures has `head`, the name of its own among
    `ftkit.architectures.TRAITS`, and `lacks(model)`: what a model without it has instead, in words, or None.

    One that lets something learn beside its model, and no part of it, has `beside(model)`, which makes it (or None), and
    `companion`, what it is called.  Such a module makes of a batch what the model is given, and items of its own, the first
    part of the loss, in `prior(beside, batch)`; or it judges the model's items in `judged(beside, items)`.
    `write_beside(beside, directory)` saves it within the model's directory and tells how transformers loads it, or None;
    `read_beside(model, directory)` reads it there.
    """

    kind: str
    shapes: ClassVar[tuple[Shape, ...]]  # combinations of columns, most specific first
    auto_class: ClassVar[str]  # transformers' Auto class that has the head
    peft_type: ClassVar[str | None]  # PEFT's task_type; None if it has none that hands on what the model is given
    targets: Targets  # what items have
    new_head: ClassVar[bool]  # the head starts from random weights and always learns
    defaults: ClassVar[Mapping[str, Default]]  # dotted recipe key -> value and source

    @property
    def txt_row(self) -> str:
        """What one row of a txt file is: "line" or "file"."""
        ...

    @property
    def main_metric(self) -> str:
        """What the summary leads with; higher is better unless `ftkit.summary` knows otherwise (`loss`, `mse`, ...)."""
        ...

    @property
    def metric_names(self) -> tuple[str, ...]:
        """All that `metrics` may compute; some may depend on what `resolve` fills in."""
        ...

    def examples(self) -> list[dict[str, Any]]:
        """A dozen short rows with all columns, for a rehearsal without data."""
        ...

    def resolve(self, rows: Iterable[Row]) -> Task:
        """This task with what only the training rows tell (label names) filled in."""
        ...

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that the task cannot work with (RecipeError)."""
        ...

    def config_kwargs(self) -> dict[str, Any]:
        """Overrides for the model's config: num_labels, id2label, ..."""
        ...

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """The row as features: none if it was dropped for its length, several if it is windowed.

        Raises RowError with the reason if the row cannot be used.
        """
        ...

    def items(self, model: Any, batch: Batch) -> Items | tuple[Items, ...]:
        """One forward pass up to the output head, or with it where logits are few, reduced to the supervised items."""
        ...

    def complete(self, model: Any, tokenizer: Any) -> None:
        """Set what the saved model must carry beside its weights, such as the tokens that end a generation."""
        ...

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> Metrics:
        """Those of a split, of which nothing was measured yet."""
        ...

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        """What the model said, one JSON object for each feature in the batch, `feature` being its index; the batch's items come in parts."""
        ...

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """Answers for rows without labels, one JSON object a row, in order."""
        ...
