"""`ftkit eval`: a finished run measured once more, on its own sets or on other rows; or the untrained base of a recipe."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit import rundir
from ftkit.errors import MissingDependency, RecipeError
from ftkit.opened import open_here
from ftkit.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Limits, RowList
    from ftkit.evaluate import Measured
    from ftkit.loop import Trainee
    from ftkit.opened import Opened
    from ftkit.prepare import Prepared
    from ftkit.recipe.spec import Recipe
    from ftkit.report import Reporter

Splits = dict[str, tuple["RowList", "FeatureSet"]]


class _Run(NamedTuple):
    """A finished run as `evaluate.measure` takes it."""

    recipe: Recipe
    accelerator: Accelerator
    trainee: Trainee
    wrapped: nn.Module
    tokenizer: Any
    limits: Limits
    splits: Splits


class Lead(NamedTuple):
    """What the untuned model is shown before each row: instructions, and some training rows with their answers."""

    text: str
    shots: int


def evaluate(
    target: str, data: str | None = None, split: str | None = None, prompt: str | None = None, shots: int = 0, against: str | None = None
) -> dict[str, Any]:
    """Measure a run on its validation and test sets, on one of them, or on the rows of another file.

    With the text in the file `prompt`, or with `shots`, the untuned model is measured too, reading these before each row.
    What comes out is also written to RUN/eval/NAME, NAME being that of the set, or other/NAME after another
    file.  A recipe's untrained base is measured likewise, on one process, and nothing is written.  Returns
    the summary: {"output": ..., "metrics": {split: {metric: value}}, "details": {split: ...}}, and `against`, what
    `ftkit.against.compare` says of it and that other run, which is also written to RUN/eval/against/NAME.
    """
    from ftkit.report import Reporter

    if data and split and Path(data).is_file():
        raise RecipeError(f"--split: {data} is one file: it has no splits; leave --split out")
    if against and not rundir.is_run(target):
        raise RecipeError(f"--against compares two finished runs, and {target} is none")
    lead = Lead(_text(prompt) if prompt else "", shots) if prompt or shots else None
    with Reporter(None) as report:
        if not rundir.is_run(target):
            return _measure_base(target, data, split, report, lead)
        base = _measure_base(str(Path(target) / "recipe.yaml"), data, split, report, lead)["metrics"] if lead else {}
        tuned = _measure_run(target, data, split, report, against)
        return tuned | {"metrics": base | tuned["metrics"]}


def _measure_run(target: str, data: str | None, split: str | None, report: Reporter, other: str | None) -> dict[str, Any]:
    from ftkit import against
    from ftkit.evaluate import details_of

    run = open_here(target, report)
    theirs = open_here(other, report) if other else None
    if theirs:
        against.check(run.recipe, theirs.recipe, str(other))
    rows = _rows(run.recipe, data, split, report, run.manifest["data"]["sha256"])
    subject, measured = _measured(run, rows, report)
    details = details_of(measured, report)
    files = [file for name, result in measured.items() for file in _write(run.path / "eval" / name, name, result, details[name], subject.splits[name])]
    summary = {"output": str(run.path), "metrics": _values(measured), "details": details, "files": files}
    if theirs:
        found = against.compare(against.Side(subject, measured), against.Side(*_measured(theirs, rows, report)), str(theirs.path))
        path = run.path / "eval" / "against" / theirs.path.resolve().name / "comparison.json"  # no set of a run can be called so
        rundir.write_json(path, found)
        summary |= {"against": found, "files": [*files, [str(path), path.stat().st_size]]}
    return summary


def _measured(run: Opened, rows: dict[str, RowList], report: Reporter) -> tuple[_Run, dict[str, Measured]]:
    """A run on these rows."""
    from accelerate import Accelerator

    from ftkit import device
    from ftkit.evaluate import measure
    from ftkit.loop import Trainee
    from ftkit.prepare import check_packages

    here = run.model.device
    recipe, precision = run.recipe, _precision(run, here, report)
    check_packages(recipe)
    device.use_kernels_for(precision)
    accelerator = Accelerator(mixed_precision=device.autocast_to(precision), cpu=here.type == "cpu")
    base = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
    beside = recipe.task.read_beside(base, run.path / "model") if hasattr(recipe.task, "read_beside") else None
    trainee = Trainee(run.model, base.base_model, recipe.task, recipe.objective, beside=beside and beside.to(here))
    wrapped = accelerator.prepare_model(trainee, evaluation_mode=True)
    subject = _Run(recipe, accelerator, trainee, wrapped, run.tokenizer, run.limits, _encoded(rows, recipe, run.tokenizer, run.limits, report))
    return subject, measure(subject, subject.splits, report, StopRequest(), keep_records=True)


def _text(file: str) -> str:
    """What is in a file, UTF-8."""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--prompt: {file} cannot be read as text: {error}") from None


def _measure_base(target: str, data: str | None, split: str | None, report: Reporter, lead: Lead | None) -> dict[str, Any]:
    from ftkit.evaluate import measure
    from ftkit.model import quiet_libraries
    from ftkit.prepare import prepare
    from ftkit.recipe import read
    from ftkit.session import open_session

    resolved = read(target)
    quiet_libraries()
    prepared = prepare(resolved._replace(recipe=_on_one_process(resolved.recipe, report)), report)
    if data:
        other = _rows(prepared.recipe, data, split, report)
        prepared.splits = _encoded(other, prepared.recipe, prepared.tokenizer, prepared.limits, report)
    else:
        prepared.splits = _chosen(prepared.splits, split)
    if lead:
        prepared = _led(prepared, lead, report)
    session = open_session(prepared, report)
    with session.untouched():
        measured = measure(session, prepared.splits, report, StopRequest(), keep_records=True)
    return {"metrics": {"base": _values(measured)}}


def _led(prepared: Prepared, lead: Lead, report: Reporter) -> Prepared:
    """With what leads each row of the splits, and as much room for it as the model has."""
    from ftkit.model import max_positions

    recipe, train = prepared.recipe, prepared.rows.train
    if not hasattr(recipe.task, "after"):
        raise RecipeError(f"--prompt and --shots are for models that continue texts (task: causal-lm), not for {recipe.task.kind}")
    if lead.shots > len(train):
        raise RecipeError(f"--shots: {lead.shots}, but there are {len(train):,} training rows")
    shown = [train[i] for i in random.Random(recipe.train.seed).sample(range(len(train)), lead.shots)]
    positions = max_positions(prepared.config)
    longer = positions - recipe.method.positions if positions else prepared.limits.max_length * (lead.shots + 2)
    limits = prepared.limits._replace(max_length=longer, truncation="left")  # what is too long loses examples, not its answer
    led: dict[str, RowList] = {name: [recipe.task.after(row, lead.text, shown) for row in rows] for name, (rows, _) in prepared.splits.items()}
    return replace(prepared, limits=limits, splits=_encoded(led, recipe, prepared.tokenizer, limits, report))


def _on_one_process(recipe: Recipe, report: Reporter) -> Recipe:
    """The recipe without what is only for training."""
    train = recipe.train
    if train.parallel != "ddp" or train.processes not in ("auto", 1):
        report.note("measured on one process: train.parallel and train.processes are for training")
    return recipe.model_copy(update={"train": train.model_copy(update={"parallel": "ddp", "processes": 1})})


def _precision(run: Opened, here: Any, report: Reporter) -> str:
    """That of the training, where this machine has it."""
    from ftkit import device

    trained = run.manifest["precision"]
    try:
        return device.precision(trained, here)
    except MissingDependency:
        own = device.precision("auto", here)
        report.note(f"measured in {own}: {trained}, in which the run was trained, needs a GPU")
        return own


def _rows(recipe: Recipe, data: str | None, split: str | None, report: Reporter, sha256: dict[str, str] | None = None) -> dict[str, RowList]:
    """The rows to measure on, by the name of their set.  Says which of the files with a known `sha256` have changed."""
    from ftkit.data.rows import load_rows, load_split

    with report.stage("reading data"):
        if data:
            name = Path(data).resolve().name
            name = f"other/{name.partition('.')[0] or name}"  # no set of a run can be called so
            return {name: load_split(data, split, recipe.data, recipe.task, report.note)}
        rows = load_rows(recipe.data, recipe.task, recipe.train.seed, report.note)
    for source, digest in (sha256 or {}).items():
        if rows.sha256.get(source, digest) != digest:
            report.warn(f"{source} has changed since the run")
    return _chosen({**rows.validation, **({"test": rows.test} if rows.test else {})}, split)


def _chosen(splits: dict[str, Any], split: str | None) -> dict[str, Any]:
    """All sets, or the one that is asked for."""
    if not splits:
        raise RecipeError("there are no validation or test rows to measure on; give some with --data FILE")
    if split is None:
        return splits
    if split not in splits:
        raise RecipeError(f"--split: there is no set {split!r}; there are {', '.join(splits)}")
    return {split: splits[split]}


def _encoded(rows: dict[str, RowList], recipe: Recipe, tokenizer: Any, limits: Limits, report: Reporter) -> Splits:
    from ftkit.prepare import check_measurable, tokenise

    done = {name: (split, tokenise(name, split, recipe.task, tokenizer, limits, recipe.data.on_bad_rows, report).features) for name, split in rows.items()}
    check_measurable(recipe.task, rows)
    return done


def _write(directory: Path, name: str, result: Measured, details: dict[str, Any], split: tuple[RowList, FeatureSet]) -> list[list[Any]]:
    """metrics.json, details.json and predictions.jsonl of a set; their paths and sizes."""
    from ftkit.evaluate import predictions

    rundir.write_json(directory / "metrics.json", {name: result.values})
    rundir.write_json(directory / "details.json", {name: details})
    rundir.write_lines(directory / "predictions.jsonl", predictions(result.records, *split))
    return [[str(path), path.stat().st_size] for path in sorted(directory.iterdir())]


def _values(measured: dict[str, Measured]) -> dict[str, dict[str, float]]:
    return {name: result.values for name, result in measured.items()}
