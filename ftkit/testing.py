"""The contracts of plugins as checks: `check_task`, `check_method` and `check_objective`.

A plugin's own tests call them with a tiny model; ftkit's tests call them for every built-in kind.  They
raise AssertionError with what to change in the plugin.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from ftkit import finish, rundir, verify
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Batch, Features, Limits, Row, RowError, Scores
from ftkit.loop import Trainee
from ftkit.merge import merge
from ftkit.model import max_positions
from ftkit.objectives.supervised import Supervised
from ftkit.recipe import document
from ftkit.recipe.spec import Generation, Recipe, Spec
from ftkit.tasks.streaming import Kept

if TYPE_CHECKING:
    from torch import nn

    from ftkit.methods import Method
    from ftkit.model import Base
    from ftkit.objectives import Objective
    from ftkit.tasks import Metrics, Task

SAME = 1e-5  # relative to the largest value: float32 sums in another order


def check_task(task: Task, rows: Sequence[Row], tokenizer: Any, model_factory: Callable[[Task], nn.Module], questions: Sequence[Row] | None = None) -> None:
    """Whether `task` keeps the contract of `ftkit.tasks.Task`.

    `rows`: at least 4 rows with answers, of different lengths, that fit into the model.  `model_factory`
    gives a float32 model with the head of the resolved task.  `questions`: rows as `predict` gets them.
    """
    _check_spec(task)
    _check_declaration(task)
    task = task.resolve(rows)
    _check_spec(task)
    task.check(tokenizer)
    model: Any = model_factory(task).eval()
    limits = Limits(max_positions(model.config, tokenizer) or 512, "error")
    encoded = [task.encode(row, tokenizer, limits) for row in rows]
    for row, features in zip(rows, encoded, strict=True):
        _check_features(row, features, limits, len(tokenizer))
    _check_truncation(task, rows, encoded, tokenizer, limits)
    whole = FeatureSet.of(encoded)
    _require(len(set(whole.lengths.tolist())) > 1, "give check_task rows of different lengths, or padding is not tried")
    if hasattr(task, "corruption"):
        whole = replace(whole, corruption=task.corruption(whole, tokenizer, 0))
        _check_corruption(task, whole)
    with torch.inference_mode():
        plain: Any = Supervised()
        beside = task.beside(model) if hasattr(task, "beside") else None
        trainee = Trainee(model, model.base_model, task, plain, beside=beside).eval()
        scores = _check_scores(trainee, whole, tokenizer.pad_token_id)
        _check_metrics(task, trainee, rows, whole, tokenizer.pad_token_id)
        _check_records(task, scores, rows, whole)
        _check_predictions(task, model, tokenizer, list(questions or rows), limits)


def check_method(
    method: Method,
    base_factory: Callable[[Method], Base],
    rows: Sequence[Row],
    directory: Path,
    learns: Callable[[str], bool] | None = None,
    steps: int = 40,
    learning_rate: float = 5e-3,
) -> None:
    """Whether `method` keeps the contract of `ftkit.methods.Method`.

    `base_factory` loads a small float32 base for the method from a directory, its task resolved; `rows` are
    few enough to be learned by heart in `steps` steps.  `learns` says of a parameter of the model that
    `apply` returns, by its name, whether it is meant to learn.  Writes into `directory`, which is empty.
    """
    _check_spec(method)
    base = base_factory(method)
    limits = Limits((max_positions(base.model.config, base.tokenizer) or 512) - method.positions, "right")
    features = FeatureSet.of([base.task.encode(row, base.tokenizer, limits) for row in rows])
    batch = collate(features, np.arange(len(features)), base.tokenizer.pad_token_id)
    new = {name: len(list(base.model.get_submodule(name).parameters())) for name in base.new_modules}
    known = {id(parameter): name for name, parameter in base.model.named_parameters()}
    of_head = {id(parameter) for name in base.head for parameter in base.model.get_submodule(name).parameters()}

    torch.manual_seed(0)
    learner = method.apply(base)
    learning = {name: parameter for name, parameter in learner.named_parameters() if parameter.requires_grad}
    _require(bool(learning), f"{_name(method)}.apply leaves nothing that learns")
    if learns is not None:
        meant = {name for name, _ in learner.named_parameters() if learns(name)}
        _require(
            meant == set(learning), f"{_name(method)}.apply: learns, and should not: {sorted(set(learning) - meant)}; should: {sorted(meant - set(learning))}"
        )
    if method.frozen_base:
        thawed = [known[id(p)] for p in learning.values() if id(p) in known and id(p) not in of_head and not _within(known[id(p)], new)]
        _require(not thawed, f"{_name(method)} says frozen_base, but these weights of the base learn: {thawed}")
    for module, count in new.items():
        found = [name for name in learning if _within(name, [module])]
        _require(len(found) >= count, f"{_name(method)}.apply: {module} starts from random weights, so all of its {count} parameters must learn; {found} do")

    _check_learning(method, learner, base, batch, learning, steps, learning_rate)
    _check_saving(method, learner, base, features, directory)


def check_objective(objective: Objective, scores: Scores | None = None) -> None:
    """Whether `objective` keeps the contract of `ftkit.objectives.Objective`.

    `scores`: 8 items or more with different positive weights; random logits of 7 classes if none are given.
    """
    _check_spec(objective)
    _require(
        isinstance(getattr(objective, "in_chunks", None), bool), f"{_name(objective)} does not say whether it is computed in_chunks: a field, true or false"
    )
    _require(
        isinstance(getattr(objective, "label_smoothing", ""), float | None),
        f"{_name(objective)} does not say whether it is a cross-entropy with the targets: label_smoothing, a number; None for another loss",
    )
    scores = scores or _random_scores()
    whole = objective.loss(scores)
    _require(whole.shape == (), f"{_name(objective)}.loss gives a tensor of shape {tuple(whole.shape)}: it must be one number, the sum")
    _require(whole.dtype == torch.float32, f"{_name(objective)}.loss is {whole.dtype}: sums need float32, whatever the logits are")
    _require(bool(torch.isfinite(whole)), f"{_name(objective)}.loss is {whole.item()}")

    half = len(scores.weights) // 2
    halves = objective.loss(_part(scores, slice(None, half))) + objective.loss(_part(scores, slice(half, None)))
    _require(
        _same(halves, whole),
        f"{_name(objective)}.loss of a batch is {whole.item():.6g}, of its halves together {halves.item():.6g}: return the sum, not the mean",
    )
    doubled = objective.loss(_weighted(scores, 2 * scores.weights))
    _require(
        _same(doubled, 2 * whole),
        f"{_name(objective)}.loss with twice the weights is {doubled.item():.6g}, not {2 * whole.item():.6g}: multiply each item by its weight",
    )

    logits = scores.logits.detach().clone().requires_grad_(True)
    weights = scores.weights.clone()
    weights[::2] = 0
    objective.loss(replace(scores, logits=logits, weights=weights)).backward()
    gradient = logits.grad
    assert gradient is not None
    _require(not gradient[::2].any(), f"{_name(objective)}.loss: items of weight 0 have a gradient")
    _require(bool(gradient[1::2].flatten(1).any(1).all()), f"{_name(objective)}.loss: items of positive weight have none")

    empty = _part(scores, slice(0, 0))
    empty.logits = empty.logits.detach().clone().requires_grad_(True)
    nothing = objective.loss(empty)
    _require(nothing.item() == 0, f"{_name(objective)}.loss of no item is {nothing.item()}, not 0")
    _require(nothing.requires_grad, f"{_name(objective)}.loss of no item has no gradient: a process without rows could not take part in the step")
    half_precision = objective.loss(replace(scores, logits=scores.logits.detach().bfloat16()))
    _require(half_precision.dtype == torch.float32, f"{_name(objective)}.loss of bfloat16 logits is {half_precision.dtype}: compute it in float32")


# --- all plugins -----------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _name(plugin: Any) -> str:
    return type(plugin).__name__


def _check_spec(plugin: Any) -> None:
    """A plugin is a frozen value that a recipe can hold: it goes through YAML unchanged."""
    name = _name(plugin)
    _require(isinstance(plugin, Spec), f"{name} is no subclass of ftkit.recipe.spec.Spec")
    _require(bool(type(plugin).__doc__), f"{name} has no docstring: `ftkit list` shows its first line")
    fields = type(plugin).model_fields
    _require(plugin.kind == fields["kind"].default, f"{name}.kind must be a Literal with its only value as default")
    undocumented = [field for field in fields if field != "kind" and not fields[field].description]
    _require(not undocumented, f"{name}: give these fields a description, which editors show: {', '.join(undocumented)}")
    problems: list[Any] = []
    again = type(plugin).model_validate(document.parse(document.dump(plugin.model_dump()), name, problems).plain())
    _require(not problems and again == plugin, f"{name} is not the same after YAML: {plugin!r} became {again!r}")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of float32 sums."""
    return a.shape == b.shape and bool((a - b).abs().max() <= SAME * max(1.0, b.abs().max().item())) if a.numel() else a.shape == b.shape


def _json(value: Any, what: str) -> Any:
    """The value after a trip through JSON."""
    try:
        again = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{what} cannot be written as JSON ({error}): {value!r}") from error
    _require(again == value, f"{what} changes when it goes through JSON: {value!r} becomes {again!r}")
    return again


# --- tasks -----------------------------------------------------------------------------------------------


def _check_declaration(task: Task) -> None:
    name = _name(task)
    _require(len(task.shapes) > 0, f"{name}.shapes is empty: which columns does a row have?")
    _require(task.txt_row in ("line", "file"), f"{name}.txt_row is {task.txt_row!r}, neither 'line' nor 'file'")
    _require(hasattr(transformers, task.auto_class), f"{name}.auto_class: transformers has no {task.auto_class}")
    _require("loss" in task.metric_names, f"{name}.metric_names lacks loss")
    _require(task.main_metric in task.metric_names, f"{name}.main_metric {task.main_metric!r} is not among metric_names")
    for key, default in task.defaults.items():
        section, _, field = key.partition(".")
        spec = Recipe.model_fields.get(section)
        known = getattr(spec.annotation, "model_fields", {}) if spec else {}
        _require(field in known, f"{name}.defaults: recipes have no key {key!r}")
        _require(bool(default.source), f"{name}.defaults: say where the default of {key} comes from")


def _check_features(row: Row, encoded: list[Features], limits: Limits, vocabulary: int) -> None:
    _require(len(encoded) > 0, f"encode drops {row.where}, which is not too long: raise RowError with the reason, or keep it")
    for features in encoded:
        length, longest = len(features.input_ids), _longest(features)
        where = f"encode({row.where})"
        _require(0 < longest <= limits.max_length, f"{where} gives {longest} tokens, where 1 to {limits.max_length} are allowed")
        _require(features.texts is None or sum(features.texts) == length, f"{where}: the tokens of its texts are not those of the row")
        _require(all(0 <= token < vocabulary for token in features.input_ids), f"{where} gives token ids outside of the tokenizer's {vocabulary}")
        weights = len(features.weights)
        _require(
            weights > 0 and len(features.targets) % weights == 0,
            f"{where}: {len(features.targets)} targets, but {weights} weights: give a weight for each, or for as many numbers as make up one",
        )
        _require(
            features.apart or weights in (1, length),
            f"{where}: {weights} targets for {length} tokens: give one for each token, or one for the row, or say that they are apart",
        )
        types = features.token_type_ids
        _require(types is None or len(types) == length, f"{where}: token_type_ids are not as long as input_ids")
        _require(all(weight >= 0 and math.isfinite(weight) for weight in features.weights), f"{where}: weights must be finite and not negative")
        _require(features.truncated == 0, f"{where} counts {features.truncated} truncated tokens, though the row fits")
    _require(any(any(features.weights) for features in encoded), f"encode({row.where}) supervises nothing")


def _longest(features: Features) -> int:
    """Tokens that are read together."""
    return max(features.texts or [len(features.input_ids)])


def _check_truncation(task: Task, rows: Sequence[Row], encoded: list[list[Features]], tokenizer: Any, limits: Limits) -> None:
    """Every mode keeps to max_length, counts what it cuts, and leaves the tokenizer as it was."""
    lengths = [max(map(_longest, each)) for each in encoded]
    longest = int(np.argmax(lengths))
    short = (min(lengths) + lengths[longest]) // 2
    row = rows[longest]
    for mode in ("right", "left"):
        cut = task.encode(row, tokenizer, Limits(short, mode))
        over = [length for length in map(_longest, cut) if length > short]
        _require(not over, f"encode with truncation {mode}: {over} tokens, more than max_length {short}")
        told = sum(features.truncated for features in cut)
        _require(
            told > 0 or len(cut) > 1, f"encode with truncation {mode} cuts {row.where} to {short} of {lengths[longest]} tokens, but Features.truncated says 0"
        )
    _require(
        task.encode(row, tokenizer, Limits(short, "drop")) == [], f"encode with truncation drop must give no features for a row longer than {short} tokens"
    )
    try:
        task.encode(row, tokenizer, Limits(short, "error"))
    except RowError:
        pass
    else:
        raise AssertionError(f"encode with truncation error must raise RowError for a row longer than {short} tokens")
    _require(
        [task.encode(each, tokenizer, limits) for each in rows] == encoded,
        "encode gives other features the second time: does it leave the tokenizer as it was?",
    )


def _check_corruption(task: Task, features: FeatureSet) -> None:
    """What a feature becomes in an epoch is its generator's doing alone, and the stored one stays."""
    name, stored = f"{_name(task)}.corruption", features.input_ids[:].copy()
    for index in range(len(features)):
        found, again = features.get(index, 1), features.get(index, 1)
        for part, values in found.items():
            _require(np.array_equal(values, again[part]), f"{name}: {part} differ from one time to the next: draw from the generator that is given")
        _require(len(found["input_ids"]) == features.lengths[index], f"{name} changes the length of a feature")
    _require(np.array_equal(stored, features.input_ids[:]), f"{name} writes into the stored features: change a copy")


def _scores(trainee: Trainee, features: FeatureSet, indices: np.ndarray, pad: int) -> list[Scores]:
    """What the model says of features side by side, a part of the loss each."""
    found: list[Scores] = []
    trainee(collate(features, indices, pad), found.extend)
    return [_joined([scores for scores in found if scores.part == part]) for part in sorted({scores.part for scores in found})]


def _joined(scores: list[Scores]) -> Scores:
    """Chunks of a part, one after the other."""

    def all_of(name: str) -> Any:
        values = [getattr(each, name) for each in scores]
        return None if values[0] is None else torch.cat(values)

    names = ("logits", "targets", "weights", "rows", "counted")
    return replace(scores[0], **{name: all_of(name) for name in names}) if len(scores) > 1 else scores[0]


def _check_scores(trainee: Trainee, features: FeatureSet, pad: int) -> list[Scores]:
    """A padded batch says of each row what the row says alone, and supervises what encode said."""
    batch = collate(features, np.arange(len(features)), pad)
    parts = _scores(trainee, features, np.arange(len(features)), pad)
    weights = torch.stack([part.weights.double().sum() for part in parts])
    counts = trainee.counts(batch)
    _require(
        torch.equal(weights, counts.reshape(-1)),
        f"scores: the weights sum up to {weights.tolist()}, those of encode to {counts.tolist()}",
    )
    for place, scores in enumerate(parts):
        _require(scores.part == place, f"scores: part {place} of the loss calls itself {scores.part}")
        count = len(scores.weights)
        _require(len(scores.logits) == len(scores.targets) == len(scores.rows) == count, "scores: logits, targets, weights and rows must be equally long")
    for index in range(len(features)):
        alone_parts = _scores(trainee, features, np.array([index]), pad)
        for scores, alone in zip(parts, alone_parts, strict=True):
            chosen = scores.rows == index
            _require(
                bool((alone.rows == index).all()),
                f"scores: feature {index} alone comes back as {alone.rows.unique().tolist()}: rows are to be those of batch.row_ids",
            )
            _require(torch.equal(scores.targets[chosen], alone.targets), f"scores: feature {index} has other targets in a padded batch than alone")
            said, expected = (each[each != -math.inf] for each in (scores.logits[chosen], alone.logits))  # a shorter row has fewer positions
            difference = (said - expected).abs().max().item() if len(said) == len(expected) > 0 else math.inf
            _require(
                _same(said, expected),
                f"scores: logits of feature {index} differ by {difference:.2g} between a padded batch and the row alone: mask the padding",
            )
    silent = _scores(trainee, features, np.array([], np.int64), pad)
    _require(all(part.weights.sum().item() == 0 for part in silent), "scores: a batch of weight 0 (a process without rows) must have no weight")
    return parts


def _check_metrics(task: Task, trainee: Trainee, rows: Sequence[Row], features: FeatureSet, pad: int) -> None:
    """Sums of halves added are those of the whole: processes and batch sizes do not matter."""
    half = len(features) // 2

    def measured(*groups: np.ndarray) -> Metrics:
        metrics: Metrics = task.metrics(rows, features)
        for part in (part for group in groups for part in _scores(trainee, features, group, pad)):
            metrics.update(part)
        return metrics

    indices = np.arange(len(features))
    whole, first, second = measured(indices), measured(indices[:half]), measured(indices[half:])
    name = _name(whole)
    wrong = [key for key, value in whole.sums.items() if value.dtype != torch.float64]
    _require(not wrong, f"{name}.sums: {', '.join(wrong)} must be float64, or counts of large sets are rounded")
    values = whole.compute()
    joined = task.metrics(rows, features)
    joined.sums = {key: first.sums[key] + second.sums[key] for key in first.sums}
    joined.kept = {key: Kept([first.kept[key].all(), second.kept[key].all()]) for key in first.kept}
    for key, value in joined.compute().items():
        _require(
            math.isclose(value, values[key], rel_tol=1e-5, abs_tol=1e-6),
            f"{name}: {key} is {values[key]} of the whole, {value} of its halves' sums: keep sums, not means",
        )
    _json(values, f"{name}.compute()")
    details = _json(whole.details(), f"{name}.details()")
    for key, (low, high) in details.get("intervals", {}).items():
        _require(key in values and low <= high, f"{name}.details: the interval of {key}, {low} to {high}, is of no metric, or none")
    _require({"loss", "loss_count"} <= values.keys(), f"{name}.compute lacks loss or loss_count")
    _require(task.main_metric in values, f"{name}.compute lacks the main metric {task.main_metric}")
    unknown = values.keys() - {*task.metric_names, "loss_count"}
    _require(not unknown, f"{name}.compute gives {', '.join(sorted(unknown))}, which metric_names does not list")
    total = trainee.counts(collate(features, indices, pad)).sum().item()
    _require(values["loss_count"] == total, f"{name}: loss_count is {values['loss_count']}, the weights sum up to {total}")


def _check_records(task: Task, parts: list[Scores], rows: Sequence[Row], features: FeatureSet) -> None:
    metrics = task.metrics(rows, features)
    for part in parts:
        metrics.update(part)
    records = _json(metrics.records() if hasattr(metrics, "records") else task.records(parts), "records()")
    found = [record.get("feature") for record in records]
    _require(sorted(found) == sorted(parts[0].rows.unique().tolist()), f"records: one object for each feature of the batch is wanted, these came: {found}")


def _check_predictions(task: Task, model: Any, tokenizer: Any, questions: list[Row], limits: Limits) -> None:
    limits, generation = limits._replace(truncation="right"), Generation(max_new_tokens=4)
    together = _json(task.predict(model, tokenizer, questions, limits, generation), "predict()")
    _require(len(together) == len(questions), f"predict: {len(together)} answers to {len(questions)} rows")
    backwards = task.predict(model, tokenizer, questions[::-1], limits, generation)[::-1]
    alone = [task.predict(model, tokenizer, [row], limits, generation)[0] for row in questions]
    for number, row in enumerate(questions):
        _require(
            _alike(together[number], backwards[number]),
            f"predict: the answer to {row.where} depends on the order of the rows: {together[number]}, {backwards[number]}",
        )
        _require(
            _alike(together[number], alone[number]),
            f"predict: the answer to {row.where} is another alone: {together[number]}, {alone[number]}: mask the padding",
        )


def _alike(a: Any, b: Any) -> bool:
    """Equal JSON values, numbers within rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)
    return a == b


# --- methods ---------------------------------------------------------------------------------------------


def _within(name: str, modules: Sequence[str] | dict[str, int]) -> bool:
    """Whether the parameter `name` belongs to one of the modules, however deep it was wrapped."""
    return any(f".{module}." in f".{name}" for module in modules)


def _check_learning(method: Method, learner: nn.Module, base: Base, batch: Batch, learning: dict[str, nn.Parameter], steps: int, learning_rate: float) -> None:
    """Exactly what is meant to learn gets a gradient and moves, and a batch can be learned by heart."""
    name = _name(method)
    plain: Any = Supervised()
    beside = base.task.beside(base.model) if hasattr(base.task, "beside") else None
    trainee = Trainee(learner, base.inner(), base.task, plain, beside=beside)
    before = {key: parameter.detach().clone() for key, parameter in learner.named_parameters()}

    def of_whole(sums: torch.Tensor) -> torch.Tensor:
        return (sums / trainee.counts(batch)).sum()

    def loss() -> float:
        trainee.eval()
        with torch.no_grad():
            return of_whole(trainee(batch)).item()

    start = loss()
    optimizer = torch.optim.AdamW(learning.values(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        trainee.train()
        of_whole(trainee(batch)).backward()
        if step == 0:
            without = [key for key, parameter in learning.items() if parameter.grad is None]
            _require(not without, f"{name}: these learn but get no gradient: {without}")
            frozen = [key for key, parameter in learner.named_parameters() if key not in learning and parameter.grad is not None]
            _require(not frozen, f"{name}: these are frozen but get a gradient: {frozen}")
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, parameter in learner.named_parameters() if not torch.equal(parameter.detach(), before[key])}
    _require(moved <= set(learning), f"{name}: frozen weights changed while training: {sorted(moved - set(learning))}")
    _require(moved == set(learning), f"{name}: these should learn and did not move in {steps} steps: {sorted(set(learning) - moved)}")
    end = loss()
    _require(end < 0.97 * start, f"{name}: {steps} steps on one batch take its loss from {start:.4f} to {end:.4f} only")


def _check_saving(method: Method, learner: Any, base: Base, features: FeatureSet, directory: Path) -> None:
    """What was written gives the same outputs in a fresh process, and merged."""
    model = directory / "model"
    artifact = finish.write_model(method, learner, base, {}, model)
    pickled = [str(path) for path in model.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    _require(not pickled, f"{_name(method)}.save writes pickles: {pickled}; write safetensors")
    expected = verify.capture(learner, base.tokenizer, verify.choose(features), model, artifact, converted=method.converts)
    verification = verify.check(model, artifact, expected)
    if method.mergeable and artifact["loads_with"] != "transformers":
        rundir.write_json(directory / "manifest.json", {"status": "finished", "artifact": artifact, "verification": verification})
        merge(directory, directory / "merged")


# --- objectives ------------------------------------------------------------------------------------------


def _random_scores() -> Scores:
    generator = torch.Generator().manual_seed(0)
    return Scores(
        logits=torch.randn(12, 7, generator=generator),
        targets=torch.randint(7, (12,), generator=generator),
        weights=torch.rand(12, generator=generator) + 0.1,
        rows=torch.arange(12),
        teacher=torch.randn(12, 7, generator=generator),
    )


def _part(scores: Scores, items: slice) -> Scores:
    parts = {name: getattr(scores, name)[items] for name in ("logits", "targets", "weights", "rows")}
    return replace(scores, **parts, teacher=None if scores.teacher is None else scores.teacher[items])


def _weighted(scores: Scores, weights: torch.Tensor) -> Scores:
    weighted = copy.copy(scores)
    weighted.weights = weights
    return weighted
