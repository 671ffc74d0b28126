"""What a recipe tells before any weight is loaded: all that is wrong with it, and how many parameters it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ftkit.errors import DataError, FtkitError, MissingDependency
from ftkit.recipe.spec import TrainedTokenizer

if TYPE_CHECKING:
    from ftkit.data.types import Limits, Row, Rows
    from ftkit.recipe import Resolved
    from ftkit.recipe.spec import Recipe, Train
    from ftkit.report import Reporter
    from ftkit.sources import Source
    from ftkit.tasks import Task

T = TypeVar("T")

TRIED_ROWS = 200  # of each split are tokenised: a flaw of the whole file, such as an unknown label, shows in few


def check(resolved: Resolved, report: Reporter) -> list[FtkitError]:
    """Everything that stands in the way of `ftkit train` and can be seen without weights.

    Reads the data and the model's config and tokenizer, and applies the method to a model without weights.
    What depends on something that is missing is not looked at.  Writes nothing.
    """
    import numpy as np

    from ftkit import compiled, device, kernels, launch, layout, model, on_policy, optim, prepare, rundir, session, trackers
    from ftkit.data.batches import Sampler
    from ftkit.data.rows import load_rows
    from ftkit.data.types import Limits
    from ftkit.sources import check_weights

    model.quiet_libraries()
    recipe = resolved.recipe
    problems: list[FtkitError] = []

    def attempt(probe: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return probe(*arguments)
        except FtkitError as error:
            if str(error) not in map(str, problems):
                problems.append(error)
            return None

    attempt(rundir.check, Path(recipe.output), False, True)
    attempt(device.precision, recipe.train.precision, device.pick())
    attempt(_check_devices, recipe.train)
    attempt(kernels.check, recipe.train.liger, device.pick())
    attempt(session.check_attention, recipe)
    attempt(trackers.check, recipe.train.trackers)
    rows = attempt(load_rows, recipe.data, recipe.task, recipe.train.seed, report.note)
    task = attempt(recipe.task.resolve, rows.pool) if rows else None
    if rows:
        attempt(prepare.check_metrics, recipe.model_copy(update={"task": task or recipe.task}), rows)
    found = attempt(model.architecture, recipe.model, recipe.task)
    if found is None:
        return problems
    source, config = found
    attempt(check_weights, recipe.model, source)
    tokenizer = attempt(_tokenizer, recipe, source, rows, report)
    if tokenizer is None:
        return problems
    attempt(recipe.task.check, tokenizer)
    attempt(prepare.check_targets, recipe.task, config)
    length = attempt(prepare.max_length, resolved, config, tokenizer, report.note)
    if rows is None or task is None:
        return problems
    task = attempt(prepare.labels_as_stored, task, recipe.task, source, config, report.note) or task
    if length is not None:
        limits = Limits(length, recipe.data.truncation)
        attempt(_try_rows, rows, task, tokenizer, limits, recipe.data.on_bad_rows)
        attempt(prepare.check_measurable, task, {**rows.validation, "test": rows.test})
        if hasattr(recipe.objective, "check"):
            attempt(recipe.objective.check, task, tokenizer, limits)
        attempt(on_policy.check, recipe, rows.train[0])
    config = model.load_config(recipe.model, source, tokenizer)
    planned = attempt(model.plan, recipe.model, source, config, tokenizer, task, recipe.method, recipe.train.precision)
    if planned is not None and attempt(recipe.method.apply, planned) is not None:
        attempt(model.check_added, planned, recipe.method)
        attempt(session.beside_of, recipe.model_copy(update={"task": task}), planned)
        if recipe.train.gradient_checkpointing:
            attempt(session.check_checkpointing, planned, recipe.train)
        num_processes = attempt(launch.processes, recipe.train) or 1
        attempt(session.check_waiting, recipe.method, planned, num_processes)
    if planned is not None and recipe.train.compile:
        attempt(compiled.check, planned.model, device.pick())
    if planned is not None and recipe.train.layout == "flat" and (reason := layout.foreseen(recipe, planned.model)[1]):
        problems.append(layout.impossible(planned.model, reason))
    num_steps = recipe.train.steps
    if num_steps is None and recipe.train.batch_size:  # else rows would have to be tokenised first
        num_steps = Sampler(np.ones(len(rows.train)), recipe.train.batch_size, None, "flat", 0).steps(recipe.train.epochs or 0)
    if num_steps is not None:
        attempt(optim.schedule, recipe.train, num_steps)
    return problems


class Forecast(NamedTuple):
    """What a recipe will do, as a model without weights tells."""

    parameters: dict[str, dict[str, int]]  # trainable and total, by group; a quantised base counts unquantised
    layout: str  # padded | bucketed | flat
    not_flat: str | None  # why `auto` is not flat
    learning_rate: float  # the recipe's, or a default for a model of this width


def forecast(resolved: Resolved) -> Forecast:
    """Build the model without weights and apply the method.

    Reads the model's config, and the rows where the task's head depends on them.
    """
    from ftkit import layout, model, optim, session, vocabulary
    from ftkit.data.rows import load_rows
    from ftkit.sources import locate

    recipe = resolved.recipe

    def rows() -> Iterator[Row]:  # read only if the task wants them
        yield from load_rows(recipe.data, recipe.task, recipe.train.seed, lambda text: None).pool

    model.quiet_libraries()
    source, spec = locate(recipe.model), recipe.model
    tokenizer: Any = None
    if isinstance(spec.tokenizer, TrainedTokenizer):
        size = max(spec.tokenizer.vocab_size, spec.config.get("vocab_size", 0))
        spec = spec.model_copy(update={"config": spec.config | {"vocab_size": size}})
    elif spec.init == "random" or spec.add_tokens:
        tokenizer = model.load_tokenizer(spec, source, None, ())
    config = model.load_config(spec, source, tokenizer)
    task = recipe.task.resolve(rows())
    for key, value in task.config_kwargs().items():
        setattr(config, key, value)
    plain = model.skeleton(config, task)
    added = vocabulary.grow(plain, tokenizer, spec.add_tokens) if spec.add_tokens else []
    base = model.Base(plain, tokenizer, source if spec.init == "pretrained" else None, task, model.head_of(plain), added=added)
    learner = recipe.method.apply(base)
    recipe = recipe.model_copy(update={"task": task})
    beside = session.beside_of(recipe, base)
    parameters = model.parameters_by_group(learner, base.head) | session.parameters_beside(recipe, learner, beside)
    return Forecast(parameters, *layout.foreseen(recipe, plain), optim.learning_rate(resolved, config))


def _check_devices(train: Train) -> None:
    """Refuse more processes than GPUs, and what works on GPUs or with bitsandbytes only where these are not."""
    from importlib.util import find_spec

    import torch

    from ftkit import launch

    launch.processes(train)
    if train.parallel == "fsdp" and not torch.cuda.is_available():
        raise MissingDependency("train.parallel: fsdp needs GPUs; use parallel: ddp")
    if train.optimizer.endswith("_8bit") and find_spec("bitsandbytes") is None:
        raise MissingDependency(f"train.optimizer: {train.optimizer} needs bitsandbytes, which is not installed: pip install bitsandbytes")


def _tokenizer(recipe: Recipe, source: Source | None, rows: Rows | None, report: Reporter) -> Any:
    """The tokenizer of the recipe; None for one that would be trained on rows that cannot be read."""
    from ftkit import model, prepare

    if isinstance(recipe.model.tokenizer, TrainedTokenizer):
        return prepare.load_tokenizer(recipe, source, rows, report) if rows else None
    return model.load_tokenizer(recipe.model, source, None, ())


def _try_rows(rows: Rows, task: Task, tokenizer: Any, limits: Limits, on_bad_rows: str) -> None:
    """Tokenise the first rows of each split; DataError with those that cannot be used, unless they may be left out."""
    from ftkit.data.rows import report_bad
    from ftkit.data.types import RowError

    for split in (rows.train, *rows.validation.values(), rows.test):
        bad = []
        for row in split[:TRIED_ROWS]:
            try:
                task.encode(row, tokenizer, limits)
            except RowError as error:
                bad.append(f"{row.where}: {error}")
        if len(bad) == len(split[:TRIED_ROWS]) and bad:
            raise DataError(f"no row can be used: {bad[0]}")
        report_bad(bad, on_bad_rows, lambda text: None)
