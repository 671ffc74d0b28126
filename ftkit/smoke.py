"""`ftkit train --smoke`: a recipe rehearsed in seconds, with tiny random weights and a few rows, without the network."""

from __future__ import annotations

import json
import os
import shutil
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ftkit import device, kernels, model, prepare, rundir, students
from ftkit.data import formats, hub
from ftkit.data.rows import load_rows
from ftkit.data.types import Row, Rows
from ftkit.errors import HubError, MissingDependency, RecipeError
from ftkit.methods.full import Full
from ftkit.miniature import NARROWEST, POSITIONS, architecture, miniature
from ftkit.objectives.supervised import Supervised
from ftkit.recipe import Resolved, dump, read
from ftkit.recipe.spec import Model, TrainedTokenizer
from ftkit.report import Reporter
from ftkit.sources import locate
from ftkit.tokenizer import VocabularySize, train_tokenizer

if TYPE_CHECKING:
    from ftkit.data.types import RowList
    from ftkit.recipe.spec import Data, Recipe, Train
    from ftkit.tasks import Task

WORKSHOP = "smoke"  # in the output directory: the small recipe, its rows, its base
STEPS, BATCH, LAYERS, TRAIN_ROWS, OTHER_ROWS = 2, 8, 2, 16, 8
VOCABULARY, LEAST_VOCABULARY = 320, 64  # tokens; recipes take no fewer


def rehearse(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train, measure, save, verify and merge what `shrink` makes of a recipe; returns the summary of `train`.

    The summary says `smoke: true`, and how an adapter and its merged model differ as `merge`.
    """
    from ftkit.merge import merge
    from ftkit.run import train

    if "RANK" in os.environ:
        raise RecipeError("--smoke takes no launcher: it starts the processes itself, as many as train.processes says")
    model.quiet_libraries()
    with _offline(), Reporter(None) as report:
        resolved = shrink(read(path, overrides), report)
        output = Path(resolved.recipe.output)
        if hasattr(resolved.recipe.objective, "teacher"):
            train(str(output / WORKSHOP / "teacher.yaml"))
        summary = train(str(output / WORKSHOP / "recipe.yaml"), overwrite=True) | {"smoke": True}
        adapter = summary["verification"]["loads_with"] != "transformers"
        if adapter and resolved.recipe.method.mergeable:
            with report.stage("merging"):
                summary["merge"] = merge(output, output / WORKSHOP / "merged", note=report.note)
            shutil.rmtree(output / WORKSHOP / "merged")
        report.note("this was a rehearsal on a tiny random model: what it measured means nothing")
    manifest = rundir.read_json(output / "manifest.json")
    rundir.write_json(output / "manifest.json", manifest | {"smoke": True, "summary": summary, "notes": [*report.notes, *manifest["notes"]]})
    return summary


def shrink(resolved: Resolved, report: Reporter) -> Resolved:
    """The same recipe for a tiny random model of the same architecture, a few rows and two steps.

    Config, tokenizer and rows are those on this disk or in the hub's cache; what is in neither is replaced,
    and `report` says by what.  The result and all that it names lie in <output>-smoke/smoke, in the place of
    an earlier one.
    """
    recipe = resolved.recipe
    output = Path(f"{recipe.output}-smoke")
    workshop = output / WORKSHOP
    _claim(output)
    rows = _rows(recipe, report)
    task = recipe.task.resolve(rows.pool)
    if getattr(task, "max_target_length", 0) > POSITIONS:
        task = task.model_copy(update={"max_target_length": POSITIONS})
    if getattr(task, "generator", None):
        report.note(f"substituted: a small random generator stands for {task.generator}")
        task = task.model_copy(update={"generator": None})
    train: RowList = _few(rows.train, TRAIN_ROWS)
    few: dict[str, RowList] = {name: _few(split, OTHER_ROWS) for name, split in rows.validation.items()}
    rows = Rows(train, few, _few(rows.test, OTHER_ROWS), {}, {}, [], train)
    spec, config, tokenizer, task = _model(recipe, task, rows, report)
    _write_base(spec, config, tokenizer, task, recipe.train.seed, workshop / "base")
    method = recipe.method.miniature(NARROWEST)
    positions = (model.max_positions(config, tokenizer) or POSITIONS) - method.positions
    small = recipe.model_copy(
        update={
            "model": spec.model_copy(update={"name": str(workshop / "base")}),
            "task": task,
            "method": method,
            "data": _data(recipe.data, rows, workshop, min(recipe.data.max_length or POSITIONS, positions)),
            "train": _train(recipe.train, report),
            "eval": recipe.eval.model_copy(update={"batch_size": min(recipe.eval.batch_size, BATCH)}),
            "output": str(output),
        }
    )
    if teacher := getattr(recipe.objective, "teacher", None):
        report.note(f"substituted: a tiny model, trained first, stands for the teacher {teacher}")
        whole = small.model.model_copy(update={"layers": None, "convert": None})
        taught = {"model": whole, "output": str(workshop / "teacher"), "objective": Supervised(), "method": Full()}
        rundir.write_text(workshop / "teacher.yaml", dump(small.model_copy(update=taught)))
        small = small.model_copy(update={"objective": recipe.objective.model_copy(update={"teacher": taught["output"], "teacher_revision": None})})
    rundir.write_text(workshop / "recipe.yaml", dump(small))
    return read(workshop / "recipe.yaml")


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's libraries answer from their caches, as under HF_HUB_OFFLINE=1, which they read when they are imported."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that are started
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, variable = before
        os.environ.pop("HF_HUB_OFFLINE")
        if variable is not None:
            os.environ["HF_HUB_OFFLINE"] = variable


def _claim(output: Path) -> None:
    """Make the directory new; refuses one that no rehearsal made."""
    if output.is_dir() and any(output.iterdir()) and not (output / WORKSHOP).is_dir():
        raise RecipeError(f"output: {output} is where the rehearsal writes, but it holds something else; choose another output")
    rundir.claim(output, anew=True)
    shutil.rmtree(output / WORKSHOP, ignore_errors=True)
    (output / WORKSHOP).mkdir()
    rundir.write_json(output / "manifest.json", {"status": "rehearsing", "smoke": True})


# --- rows ---------------------------------------------------------------------------------------


def _rows(recipe: Recipe, report: Reporter) -> Rows:
    """The recipe's rows, or the task's examples where not all of the files are here."""
    data = recipe.data
    splits = data.validation.values() if isinstance(data.validation, dict) else [data.validation]
    named = [*([data.train] if isinstance(data.train, str) else data.train), *splits, data.test]
    absent = [name for name in named if isinstance(name, str) and not hub.is_hub_id(name) and not Path(name).exists()]
    if not absent:
        try:
            return load_rows(data, recipe.task, recipe.train.seed, report.note)
        except HubError:
            absent = [data.train if isinstance(data.train, str) else data.train[0]]
    report.note(f"substituted: {absent[0]} is not on this machine; example rows of {recipe.task.kind} stand for the data")
    examples = _examples(recipe.task, data.columns)
    others = _few(examples, len(examples) // 3)
    return Rows(
        train=[row for row in examples if row not in others],
        validation={name: others for name in (data.validation if isinstance(data.validation, dict) else ["validation"])} if data.validation else {},
        test=others if data.test else [],
        sha256={},
        columns={},
        bad=[],
        pool=examples,
    )


def _examples(task: Task, columns: Iterable[str]) -> list[Row]:
    """The task's example rows with the columns of the recipe; the plainest that it knows, if the recipe names none."""
    shapes = [[column.name for column in (*shape.required, *shape.optional)] for shape in task.shapes]
    wanted = next((shape for shape in reversed(shapes) if set(columns) <= set(shape)), shapes[-1])
    return [
        Row({name: formats.checked(name, example[name]) for name in wanted if name in example}, "example", number)
        for number, example in enumerate(task.examples(), 1)
    ]


def _few(rows: Sequence[Row], count: int) -> list[Row]:
    """Short rows, with as many different answers as there are."""
    shortest: dict[str, list[tuple[int, int, Row]]] = {}  # of each answer: length, place, row

    def first() -> list[list[tuple[int, int, Row]]]:
        return sorted(shortest.values(), key=lambda own: own[0][:2])[:count]

    for place, row in enumerate(rows):
        answer = str([row.values.get(name) for name in sorted(formats.OUTPUTS)])
        own = shortest.setdefault(answer, [])
        insort(own, (len(str(row.values)), place, row))
        del own[count:]
        if len(shortest) > 100 * count:  # where every row has its own, few of them matter
            kept = {id(own) for own in first()}
            shortest = {answer: own for answer, own in shortest.items() if id(own) in kept}
    return [each[2] for each in chain.from_iterable(zip_longest(*first())) if each is not None][:count]


def _data(data: Data, rows: Rows, directory: Path, max_length: int) -> Data:
    """The recipe's data as files of these rows.  Rows too long for the tiny model may be left out."""

    def written(name: str, split: Sequence[Row]) -> str:
        path = directory / f"{name}.jsonl"
        rundir.write_text(path, "".join(json.dumps(row.values, ensure_ascii=False) + "\n" for row in split))
        return str(path)

    columns = {name: name for row in rows.train for name in row.values}
    return data.model_copy(
        update={
            "train": written("train", rows.train),
            "validation": {name: written(name, split) for name, split in rows.validation.items()} or None,
            "test": written("test", rows.test) if rows.test else None,
            "format": None,
            "columns": columns,
            "max_length": max_length,
            "limit": None,
            "on_bad_rows": "skip",
        }
    )


# --- model --------------------------------------------------------------------------------------


def _model(recipe: Recipe, task: Task, rows: Rows, report: Reporter) -> tuple[Model, Any, Any, Task]:
    """What the recipe says of the model, without its name; the tiny config; the tokenizer; the task with its labels in that model's order."""
    spec, method = recipe.model, recipe.method.miniature(NARROWEST)
    stored = spec.model_copy(update={"layers": None, "convert": None})
    source = locate(spec)
    try:
        config = model.load_config(stored, source)
    except HubError as error:
        kind = architecture(spec.name or "")
        if kind is None:
            raise HubError(f"{spec.name} is not in the hub's cache, and its name does not tell its architecture: load it once with the network") from error
        report.note(f"substituted: the config of {spec.name} is not in the hub's cache; that of {kind} by default stands for it")
        config = model.load_config(Model(init="random", config={"model_type": kind, **spec.config}), None)
    task = prepare.labels_as_stored(task, recipe.task, source, config, report.note)
    texts = list(prepare.tokenizer_texts(TrainedTokenizer(train="data"), rows))
    small_tokenizer = None
    if isinstance(spec.tokenizer, TrainedTokenizer):
        small_tokenizer, tokenizer = _small_tokenizer(spec.tokenizer.kind, texts, config)
    else:
        try:
            tokenizer = model.load_tokenizer(spec.model_copy(update={"add_tokens": None}), source, None, ())  # which the run adds
        except HubError:
            headless = task.auto_class in ("AutoModelForMaskedLM", "AutoModel")
            masks = type(config) in transformers.AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
            trained, tokenizer = _small_tokenizer("wordpiece" if masks and (task.new_head or headless) else "bpe", texts, config)
            name = spec.tokenizer or spec.name
            report.note(f"substituted: the tokenizer of {name} is not in the hub's cache; a {trained.kind} one of {len(tokenizer)} tokens stands for it")
            model.adopt_tokens(config, tokenizer)
    spec = spec.model_copy(update={"name": None, "revision": None, "config": {}, "trust_remote_code": False, "tokenizer": small_tokenizer})
    if spec.attention == "flash_attention_2" and device.pick().type == "cpu":
        report.note("model.attention: left to the model, since flash_attention_2 needs a GPU")
        spec = spec.model_copy(update={"attention": None})
    depth = config.get_text_config().num_hidden_layers
    for layers in (max(LAYERS, 1 + max(spec.layers or [0])), depth):
        small = miniature(config, layers, tokenizer)
        try:
            named = recipe.model.model_copy(update={"attention": spec.attention})
            method.apply(model.plan(named, source, students.config_of(small, spec), tokenizer, task, method))
        except RecipeError:  # the method may name a layer that is not there
            if layers == depth:
                raise
        else:
            break
    return spec, small, tokenizer, task


def _small_tokenizer(kind: Any, texts: list[str], config: Any) -> tuple[TrainedTokenizer, Any]:
    """A tokenizer of 320 tokens: fewer where the texts do not fill it, more where they have more characters."""
    size = VOCABULARY
    while True:
        spec = TrainedTokenizer(train="data", kind=kind, vocab_size=size)
        try:
            return spec, train_tokenizer(spec, texts, ending=config.is_encoder_decoder)
        except VocabularySize as error:
            if error.found < LEAST_VOCABULARY:
                raise
            size = error.found


def _write_base(spec: Model, config: Any, tokenizer: Any, task: Task, seed: int, directory: Path) -> None:
    """What `from_pretrained` reads: the config, and, if the recipe starts from them, weights without a new head; the tokenizer."""
    if spec.init == "pretrained":
        auto = transformers.AutoModel if task.new_head else getattr(transformers, task.auto_class)
        torch.manual_seed(seed)
        auto.from_config(config, dtype=torch.float32).save_pretrained(directory)
    else:
        config.save_pretrained(directory)
    if spec.tokenizer is None:
        tokenizer.save_pretrained(directory)


# --- training -----------------------------------------------------------------------------------


def _train(train: Train, report: Reporter) -> Train:
    """Two small steps with an evaluation and a checkpoint each, on one process unless the recipe asks for more."""
    update: dict[str, Any] = {
        "epochs": None,
        "steps": STEPS,
        "batch_size": min(train.batch_size or BATCH, BATCH),
        "batch_tokens": None,
        "accumulate": min(train.accumulate, 2),
        "warmup": min(train.warmup, 1),
        "eval_every": 1,
        "save_every": 1,
        "log_every": 1,
        "trackers": [],
    }
    if train.processes == "auto":
        update |= {"processes": 1, "parallel": "ddp"}
    try:
        device.precision(train.precision, device.pick())
    except MissingDependency:
        report.note(f"train.precision: auto in place of {train.precision}, which this machine has not")
        update["precision"] = "auto"
    try:
        kernels.check(train.liger, device.pick())
    except MissingDependency:
        report.note("train.liger: auto in place of true, which this machine has not")
        update["liger"] = "auto"
    return train.model_copy(update=update)
