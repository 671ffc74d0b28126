"""All that happens before a model is loaded: rows, tokenizer, config, features.

It needs no process group and leaves its work in the cache, so that every process of a run can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data import files
from ftkit.data.types import Limits, RowError, Rows
from ftkit.errors import DataError, MissingDependency, RecipeError
from ftkit.recipe.spec import TrainedTokenizer

if TYPE_CHECKING:
    from ftkit.data.features import Encoded, FeatureSet
    from ftkit.data.types import Row, RowList
    from ftkit.recipe import Resolved
    from ftkit.recipe.spec import Recipe
    from ftkit.report import Reporter
    from ftkit.sources import Source
    from ftkit.tasks import Task


@dataclass
class Prepared:
    """A run's data in the model's own terms, and the recipe with everything that data and model decide filled in."""

    recipe: Recipe
    source: Source | None
    tokenizer: Any
    config: Any
    limits: Limits
    rows: Rows
    train: FeatureSet
    splits: dict[str, tuple[RowList, FeatureSet]]  # validation sets and `test`
    audits: dict[str, dict[str, Any]]

    @property
    def commit(self) -> str | None:
        """The hub's commit that the model comes from; None for a local one."""
        return getattr(self.config, "_commit_hash", None)

    @property
    def validation(self) -> list[str]:
        return list(self.rows.validation)


def prepare(resolved: Resolved, report: Reporter, poll: Callable[[], None] = lambda: None) -> Prepared:
    """Read, check and tokenise everything that the recipe names; cheap refusals come first.

    `poll` is called between rows and may raise to stop.
    """
    from ftkit import model, optim, reformer
    from ftkit.data.rows import load_rows
    from ftkit.sources import check_weights

    recipe = resolved.recipe
    source, config = model.architecture(recipe.model, recipe.task)
    check_weights(recipe.model, source)
    with report.stage("reading data"):
        rows = load_rows(recipe.data, recipe.task, recipe.train.seed, report.note, poll)
    task = labels_as_stored(recipe.task.resolve(rows.pool), recipe.task, source, config, report.note)
    rows = replace(rows, pool=rows.train)  # lets go of what data.limit left out
    recipe = recipe.model_copy(update={"task": task})
    check_metrics(recipe, rows)
    poll()
    tokenizer = load_tokenizer(recipe, source, rows, report, poll)
    config = model.load_config(recipe.model, source, tokenizer)
    if getattr(config, "type_vocab_size", 0) < 2 and "token_type_ids" in tokenizer.model_input_names:  # no embeddings for a second text
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names  # the latter is stored with the tokenizer
    task.check(tokenizer)
    check_targets(task, config)
    limits = Limits(max_length(resolved, config, tokenizer, report.note), recipe.data.truncation)
    if hasattr(recipe.objective, "check"):
        recipe.objective.check(task, tokenizer, limits)
    if hasattr(recipe.objective, "pinned"):
        recipe = recipe.model_copy(update={"objective": recipe.objective.pinned()})
    if decided := reformer.undecided(config, limits.max_length + recipe.method.positions, recipe.train.seed):
        recipe = _with_config(recipe, config, decided)
        settings = ", ".join(f"{name}: {value}" for name, value in decided.items())
        report.note(f"model.config: {settings}, so that LSH attention gives a row the same answer each time; in training its rotations are drawn anew")

    audits: dict[str, dict[str, Any]] = {}

    def encode(name: str, split: RowList) -> FeatureSet:
        seed = recipe.train.seed if name == "train" else 0  # what is measured is the same in all runs
        done = tokenise(name, split, task, tokenizer, limits, recipe.data.on_bad_rows, report, poll, seed)
        audits[name] = done.audit.to_dict()
        return done.features

    train = encode("train", rows.train)
    named = {**rows.validation, **({"test": rows.test} if rows.test else {})}
    splits = {name: (split, encode(name, split)) for name, split in named.items()}
    check_measurable(task, named)
    data = recipe.data.model_copy(update={"max_length": limits.max_length, "columns": rows.columns})
    rate = optim.learning_rate(resolved, config)
    if rate != recipe.train.learning_rate:
        report.note(f"train.learning_rate: {rate:g}, the default of {recipe.train.learning_rate:g} lowered for the width of the model")
    train_settings = recipe.train.model_copy(update={"learning_rate": rate})
    return Prepared(recipe.model_copy(update={"data": data, "train": train_settings}), source, tokenizer, config, limits, rows, train, splits, audits)


def _with_config(recipe: Recipe, config: Any, settings: dict[str, Any]) -> Recipe:
    """The recipe with more settings of the model, which its config gets, too."""
    for name, value in settings.items():
        setattr(config, name, value)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": recipe.model.config | settings})})


def tokenise(
    name: str,
    rows: RowList,
    task: Task,
    tokenizer: Any,
    limits: Limits,
    on_bad_rows: str,
    report: Reporter,
    poll: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> Encoded:
    """The rows of a split as features, with progress and an account of what was cut and left out; `seed` is that of their corruption, if there is any."""
    from ftkit.data import features

    with report.stage(f"tokenising {name}", len(rows)) as stage:
        done = features.encode(rows, task, tokenizer, limits, split=name, on_bad_rows=on_bad_rows, note=report.note, progress=stage, poll=poll)
    if not len(done.features):
        raise DataError(f"{name}: no row is left to use")
    if not done.audit.supervised:
        cut = f" (data.max_length: {limits.max_length} cuts it off)" if done.audit.truncated_rows else ""
        raise DataError(f"{name}: nothing is supervised in its {len(rows):,} rows, so there is nothing to measure{cut}")
    for line in features.describe(name, done.audit, done.features.apart):
        report.warn(line.removeprefix("WARNING ")) if line.startswith("WARNING ") else report.note(line)
    if not hasattr(task, "corruption"):
        return done
    corruption = task.corruption(done.features, tokenizer, seed)
    report.note(f"{name}: {corruption.told}")
    return done._replace(features=replace(done.features, corruption=corruption))


def labels_as_stored(task: Task, written: Task, source: Source | None, config: Any, note: Callable[[str], None]) -> Task:
    """The task of a recipe, as written and with the labels of its rows, with these in the order in which stored weights know them.

    A head for the same labels in another order would be taken over and say one for another.  Raises DataError where the
    recipe asks for such an order.
    """
    labels, id2label = getattr(task, "labels", None), getattr(config, "id2label", None) or {}
    own = {name.casefold(): name for name in labels or ()}
    stored = [str(id2label[index]).casefold() for index in sorted(id2label)]
    if source is None or labels is None or len(own) < len(labels) or list(own) == stored or sorted(own) != sorted(stored):
        return task
    ordered, name = [own[each] for each in stored], source.adapter or source.name
    order = ", ".join(ordered)
    if written.labels is not None:  # type: ignore[attr-defined]
        told = f"task.labels: {', '.join(labels)}, but {name} has learned them in the order {order}"
        raise DataError(f"{told}, and its head would say one for another; give them in that order, or leave task.labels out")
    note(f"labels: {order}, in the order of the head of {name}")
    return task.model_copy(update={"labels": ordered})  # type: ignore[attr-defined,no-any-return]


def check_measurable(task: Task, splits: Mapping[str, Iterable[Row]]) -> None:
    """Refuse rows to measure on that are all of one class: what says nothing else would be right everywhere."""
    if not hasattr(task, "classes_of"):
        return
    for name, split in splits.items():
        first: Row | None = None
        found, number = set[str](), 0
        for row in split:
            try:
                found.update(task.classes_of(row))
            except RowError:  # left out, by data.on_bad_rows
                continue
            first, number = first or row, number + 1
            if len(found) > 1:
                break
        if first and len(found) == 1:
            only = f"all {number:,} rows of {name} have the one label {found.pop()!r}"
            raise DataError(f"{first.where}: from this one on, {only}, so no metric can tell anything; measure on rows of two labels or more")


def check_metrics(recipe: Recipe, rows: Rows) -> None:
    """Refuse metrics that the task, which may depend on the rows, has not, and early stopping with nothing to watch."""
    known, written = recipe.task.metric_names, getattr(recipe.task, "written", {})
    rule = recipe.train.early_stopping
    for key, name in [*(("eval.metrics", name) for name in recipe.eval.metrics or ()), *([("train.early_stopping.metric", rule.metric)] if rule else [])]:
        if name not in known:
            raise RecipeError(f"{key}: {name!r} is not a metric of {recipe.task.kind} on these rows; there are {', '.join(known)}")
    check_packages(recipe)
    _check_company(recipe)
    if recipe.objective.label_smoothing and recipe.task.targets != "classes":
        raise RecipeError(
            f"objective.label_smoothing: {recipe.objective.label_smoothing} is for classes, and the rows have {recipe.task.targets}; leave it out"
        )
    _check_written(recipe, rows, written)
    if rule and rule.metric in written:
        measured = ", ".join(name for name in known if name not in written)
        raise RecipeError(f"train.early_stopping.metric: {rule.metric} is of text that the model writes after training; there are {measured}")
    if rule and not rows.validation:
        raise RecipeError("train.early_stopping needs validation rows (data.validation: a file, or a fraction such as 0.1)")


def _check_written(recipe: Recipe, rows: Rows, written: Mapping[str, Any]) -> None:
    """Refuse metrics and samples of what the model writes where it writes nothing, or nothing that there is an answer to."""
    asked = [f"eval.metrics: {name}" for name in recipe.eval.metrics or () if name in written]
    if count := recipe.eval.generation.samples:
        asked.append(f"eval.generation.samples: {count}")
    if not asked:
        return
    if not written:
        raise RecipeError(f"{asked[0]}, but models of task {recipe.task.kind} write no text; leave it out")
    splits = {**rows.validation, **({"test": rows.test} if rows.test else {})}
    if not splits:
        raise RecipeError(f"{asked[0]} is of rows that are not learned, and there are none; give data.validation")
    for split in splits.values():
        if all(recipe.task.reference(row) is None for row in split):  # type: ignore[attr-defined]
            raise RecipeError(f"{asked[0]} compares what the model writes with answers, and the rows of {split[0].file} have none")
    if recipe.train.parallel == "fsdp":
        raise RecipeError(f"{asked[0]} is of text that the model writes, which takes a whole one, not train.parallel: fsdp")


def _check_company(recipe: Recipe) -> None:
    """Refuse batches of one row, where rows learn from each other."""
    if getattr(recipe.task, "coupled", False) and recipe.train.batch_size == 1:
        raise RecipeError("train.batch_size: 1, but with this loss a row learns from the other rows of its batch; give 2 or more, such as 64")


def check_packages(recipe: Recipe) -> None:
    """Raise MissingDependency where a metric that is asked for needs a package that is not installed."""
    from importlib.util import find_spec

    for name in recipe.eval.metrics or ():
        if (package := getattr(recipe.task, "written", {}).get(name)) and find_spec(package) is None:
            raise MissingDependency(f"eval.metrics: {name} needs {package}, which is not installed: pip install 'ftkit[{package}]'")


def check_targets(task: Task, config: Any) -> None:
    """Refuse targets that are longer than a decoder has positions."""
    from ftkit.model import max_positions

    longest, positions = getattr(task, "max_target_length", None), max_positions(config)
    if longest is not None and positions is not None and longest > positions:
        raise RecipeError(f"task.max_target_length: {longest}, but the model has {positions} positions; give {positions} or fewer")


def load_tokenizer(recipe: Recipe, source: Source | None, rows: Rows, report: Reporter, poll: Callable[[], None] = lambda: None) -> Any:
    """The recipe's tokenizer: loaded, or trained on the rows."""
    from ftkit import model

    spec = recipe.model.tokenizer
    if not isinstance(spec, TrainedTokenizer):
        return model.load_tokenizer(recipe.model, source, None, ())
    if recipe.model.init != "random":
        raise RecipeError("model.tokenizer: a tokenizer trained here gives other token ids than the stored weights know; it goes with init: random")
    with report.stage(f"training a {spec.kind} tokenizer of {spec.vocab_size} tokens"):
        return model.load_tokenizer(recipe.model, source, spec, tokenizer_texts(spec, rows, poll))


def tokenizer_texts(spec: TrainedTokenizer, rows: Rows, poll: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The texts a tokenizer is trained on: the training rows' own, or those of files."""
    if spec.train == "data":
        for row in rows.train:
            poll()
            yield from _strings(row.values)
        return
    for name in [spec.train] if isinstance(spec.train, str) else spec.train:
        path = Path(name)
        if not path.is_file():
            raise DataError(f"model.tokenizer.train: there is no file {name} (`data` means the training rows)")
        if (format := files.format_of(path)) not in ("txt", None):
            raise DataError(f"model.tokenizer.train: {name} is a {format} file, and a tokenizer is trained on plain text (`data` means the training rows)")
        for text in files.read_text(path):
            poll()
            yield text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "role":
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def max_length(resolved: Resolved, config: Any, tokenizer: Any, note: Callable[[str], None]) -> int:
    """Tokens in a row at most: what the recipe says, or the default where model and tokenizer are made for as many."""
    from ftkit.model import max_positions

    taken = resolved.recipe.method.positions
    asked, positions, usual = resolved.recipe.data.max_length, max_positions(config), max_positions(config, tokenizer)
    if taken and positions is not None:
        if taken >= positions:
            raise RecipeError(f"method {resolved.recipe.method.kind}: {taken} virtual tokens leave none of the {positions} positions of the model for a row")
        positions, usual = positions - taken, min(usual or positions, positions - taken)
    if asked is not None and not resolved.origins.get("data.max_length", "default").startswith("default"):
        if positions is not None and asked > positions:
            left = f" beside {taken} virtual tokens" if taken else ""
            raise RecipeError(f"data.max_length: {asked}, but the model has {positions} positions{left}")
        return asked
    if usual is None or (asked is not None and asked <= usual):
        return asked or 512
    if asked is not None:
        more = f"more are possible, up to the {positions} positions of the model" if positions else "the model itself has no limit"
        of_model = f"the positions that {taken} virtual tokens leave" if taken else "the positions of the model"
        note(f"data.max_length: {usual}, " + (of_model if usual == positions else f"which the tokenizer is made for; {more}"))
    return usual
