"""Measuring a model: streaming sums, flat memory, the same numbers on one process and on many."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from accelerate.utils import gather_object
from torch import nn

from ftkit.data.batches import ahead, by_length, collate
from ftkit.data.ondisk import Records
from ftkit.errors import Diverged
from ftkit.tasks.streaming import Kept

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Limits, Row, RowList, Scores
    from ftkit.loop import Trainee
    from ftkit.recipe.spec import Recipe
    from ftkit.report import Reporter
    from ftkit.signals import StopRequest
    from ftkit.tasks import Metrics, Task


class Measurable(Protocol):
    """What measuring needs: a session has it, and so has a finished run."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def trainee(self) -> Trainee: ...
    @property
    def wrapped(self) -> nn.Module: ...  # the trainee as accelerate prepared it
    @property
    def tokenizer(self) -> Any: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def splits(self) -> Mapping[str, tuple[RowList, FeatureSet]]: ...


class Measured(NamedTuple):
    """One split, measured."""

    values: dict[str, float]  # what eval.metrics asks for, and the loss with its denominator
    metrics: Metrics  # with the sums that the values came from
    records: Records  # what the model said of this process's share, if asked for


def evaluate(
    accelerator: Accelerator,
    trainee: nn.Module,
    task: Task,
    rows: Sequence[Row],
    features: FeatureSet,
    batch_size: int,
    pad_token_id: int,
    advance: Callable[[int], None] = lambda rows: None,
    interrupted: Callable[[], bool] = lambda: False,
    keep_records: bool = False,
) -> tuple[Metrics, Records]:
    """Metrics over all features, summed over processes, and what the model said of this process's share.

    `trainee` is a `Trainee`, as accelerate prepared it or alone.  Stops early, with sums that mean nothing, as soon as `interrupted` says so.
    """
    metrics: Any = task.metrics(rows, features)
    whole = hasattr(metrics, "records")  # of rows, whose features may be in several batches
    records = Records()
    was_training = trainee.training
    trainee.eval()
    with torch.no_grad():
        shares = by_length(features.lengths, batch_size, accelerator.num_processes, accelerator.process_index)
        for indices, batch in ahead(lambda indices: (indices, collate(features, indices, pad_token_id)), shares):
            if interrupted():
                break
            records.extend(_judged(trainee, batch.to(accelerator.device), metrics, task if keep_records and len(indices) and not whole else None))
            advance(len(indices) * accelerator.num_processes)
    trainee.train(was_training)
    for name, value in metrics.sums.items():
        metrics.sums[name] = accelerator.reduce(value.to(accelerator.device), "sum").cpu()
    if accelerator.num_processes > 1:
        for name, parts in metrics.kept.items():
            metrics.kept[name] = Kept(gather_object([parts.all()]))
    if keep_records and whole:
        records.extend(metrics.records()[accelerator.process_index :: accelerator.num_processes])
    return metrics, records


def _judged(trainee: nn.Module, batch: Batch, metrics: Metrics, task: Task | None) -> list[dict[str, Any]]:
    """Add a batch to the metrics; what the model said of it, if there is a task to ask."""
    records: list[dict[str, Any]] = []

    def counted(parts: Iterator[Scores]) -> Iterator[Scores]:
        for scores in parts:
            metrics.update(scores)
            yield scores

    def judge(parts: Iterator[Scores]) -> None:
        if task:
            records.extend(task.records(counted(parts)))
        else:
            deque(counted(parts), maxlen=0)

    trainee(batch, judge)
    return records


def measure(session: Measurable, names: Iterable[str], report: Reporter, stop: StopRequest, keep_records: bool = False) -> dict[str, Measured]:
    """Measure the named splits; those after a request to stop, at whichever process, are missing.

    With `keep_records`, the model also writes text where eval.metrics asks for metrics of it.  Raises Diverged where the loss is not finite.
    """
    measured = {}
    asked = session.recipe.eval.metrics
    alone = session.recipe.train.parallel == "ddp"  # under FSDP a forward pass waits for the other processes: none may break off
    for name in names:
        rows, features = session.splits[name]
        with report.stage(f"evaluating {name}", len(features)) as stage:
            metrics, records = evaluate(
                session.accelerator,
                session.wrapped,
                session.recipe.task,
                rows,
                features,
                session.recipe.eval.batch_size,
                session.tokenizer.pad_token_id,
                stage.advance,
                lambda: stop.requested and alone,
                keep_records,
            )
        written = [metric for metric in asked or () if metric in getattr(session.recipe.task, "written", {})] if keep_records else []
        answers = _written(session, name, report, stop) if written else {}
        if stop.agreed(session.accelerator):
            break
        values = metrics.compute()
        if not math.isfinite(values["loss"]):
            raise Diverged(f"{name}: the loss is {values['loss']}; the weights, or numbers on the way to it, are no longer finite")
        if written:
            values |= session.recipe.task.judge(list(answers.values()), [rows[row] for row in answers], written)  # type: ignore[attr-defined]
            plain, records = records, Records()
            records.extend(record | answers[int(features.row[record["feature"]])] for record in plain)
        measured[name] = Measured(selected(values, asked), metrics, records)
    return measured


def samples(session: Measurable, report: Reporter, stop: StopRequest) -> list[str]:
    """What the model writes for the first rows of the first split, as many as the recipe wants to see."""
    count = session.recipe.eval.generation.samples
    return [answer["text"] for answer in _written(session, next(iter(session.splits)), report, stop, count).values()] if count else []


def side_by_side(session: Measurable, before: list[str], after: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The samples of the first split, with what they are answers to and the right ones."""
    rows, features = next(iter(session.splits.values()))
    task: Any = session.recipe.task
    shown = zip((rows[i] for i in features.rows()), before, after, strict=False)
    return {"samples": [{"row": row.number, "asked": task.asked(row), "reference": task.reference(row), "before": b, "after": a} for row, b, a in shown]}


def _written(session: Measurable, name: str, report: Reporter, stop: StopRequest, first: int | None = None) -> dict[int, dict[str, Any]]:
    """What the model writes for the rows of a split that are measured, or the first ones, by their places in it, on every process."""
    rows, features = session.splits[name]
    accelerator, recipe = session.accelerator, session.recipe
    own = list(features.rows())[:first][accelerator.process_index :: accelerator.num_processes]
    order = sorted(own, key=lambda row: len(str(rows[row].values)))  # rows of like length are written together
    model: Any = session.trainee
    was_training = model.training
    model.eval()
    said: list[tuple[int, dict[str, Any]]] = []
    with report.stage(f"writing {name}", len(own)) as stage, accelerator.autocast():
        for start in range(0, len(order), recipe.eval.batch_size):
            if stop.requested:
                break
            chosen = order[start : start + recipe.eval.batch_size]
            answers = recipe.task.predict(model.model, session.tokenizer, [rows[row] for row in chosen], session.limits, recipe.eval.generation)
            said += zip(chosen, answers, strict=True)
            stage.advance(len(chosen))
    model.train(was_training)
    return dict(sorted(gather_object(said)))


def details_of(measured: Mapping[str, Measured], report: Reporter) -> dict[str, dict[str, Any]]:
    """What details.json holds of each split; drawing intervals may take a while."""
    with report.stage("drawing intervals"):
        return {name: result.metrics.details() for name, result in measured.items()}


def selected(metrics: dict[str, float], names: list[str] | None) -> dict[str, float]:
    """The metrics that eval.metrics asks for; the loss and its denominator are always there."""
    return metrics if names is None else {name: value for name, value in metrics.items() if name in {*names, "loss", "loss_count"}}


def predictions(records: Records, rows: Sequence[Row], features: FeatureSet) -> Iterator[str]:
    """JSON lines of what the model said, in the order of the rows, each with the number of its row."""
    for record in records:
        row = rows[int(features.row[record["feature"]])]
        line = {"row": row.number} | {name: value for name, value in record.items() if name != "feature"}
        yield json.dumps(line, ensure_ascii=False) + "\n"
