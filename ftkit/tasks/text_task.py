"""What tasks share that tell a text, or a pair of texts, something: a class, labels, a number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ftkit.data.types import Features, Items, Limits, Row
from ftkit.recipe.spec import Default, Generation, Spec
from ftkit.tasks.problems import Problem
from ftkit.tasks.texts import batch_of, fit

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Scores, Targets
    from ftkit.tasks import Metrics


class TextTask(Spec):
    """Rows are texts or pairs, read together; what each is told is a `Problem`."""

    kind: str

    txt_row: ClassVar[str] = "line"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    new_head: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(512, "the positions of BERT (arXiv 1810.04805)"),
    }

    @property
    @abstractmethod
    def _problem(self) -> Problem:
        """What is told, and how it is measured."""

    @property
    def targets(self) -> Targets:
        return self._problem.targets

    @property
    def metric_names(self) -> tuple[str, ...]:
        """`f1_binary` is that of the second label of two."""
        return self._problem.metric_names

    @property
    def main_metric(self) -> str:
        return self._problem.main_metric

    def check(self, tokenizer: Any) -> None:
        """Every tokenizer will do."""

    def _target(self, row: Row) -> list[int] | list[float]:
        problem = self._problem
        return problem.target(row.values[problem.column]) if problem.column in row.values else problem.nothing

    def _weight(self, row: Row) -> float:
        return 1.0

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        target = self._target(row)
        texts = [row.values["text"], *([row.values["text_pair"]] if "text_pair" in row.values else [])]
        fitted = fit(tokenizer, texts, limits)
        if fitted is None:
            return []
        return [Features(fitted.input_ids, target, [self._weight(row)], fitted.token_type_ids, fitted.truncated)]

    def items(self, model: Any, batch: Batch) -> Items:
        """Every row, with its logits [C]."""
        logits = model(**batch.inputs).logits
        targets = batch.targets.view_as(logits) if self.targets == "labels" else batch.targets
        return Items(logits, None, logits.shape[1], targets, batch.weights, batch.row_ids, kind=self.targets, losses=self._problem.losses)

    def complete(self, model: Any, tokenizer: Any) -> None:
        """The labels are in the config already."""

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> Metrics:
        return self._problem.metrics()

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        problem = self._problem
        return [{"feature": row} | record for scores in parts for row, record in zip(scores.rows.tolist(), problem.records(scores), strict=True)]

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """What the problem says of each row."""
        import torch

        batch = batch_of(rows, lambda row: self.encode(row, tokenizer, limits), tokenizer, model.device)
        with torch.inference_mode():
            return self._problem.answers(self.items(model, batch).states)
