"""Teachers, which an objective compares its own model with.

What a teacher makes of a row changes in no epoch, unless the row does.  Computed once, it lies in the cache under the hash of
teacher and rows, and the teacher is not loaded again: all logits where there are few classes, else those of the most likely
ones and of the others together.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file

from ftkit import chunks, layout, prepare, prompts, rundir, teacher_models
from ftkit.data import cache
from ftkit.data.batches import by_length, collate
from ftkit.data.ondisk import Stored
from ftkit.device import free_memory
from ftkit.errors import DiskError, OutOfMemory, RecipeError
from ftkit.few_bits import num_values
from ftkit.intermediate import Inside, Watch
from ftkit.loop import Trainee
from ftkit.model import max_positions, model_class
from ftkit.quantities import size
from ftkit.tasks.classes import other_labels
from ftkit.teacher_models import Origin, Run

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet, Numbers
    from ftkit.data.types import Batch, Items, Limits
    from ftkit.objectives.distill import Distill
    from ftkit.recipe.spec import Recipe
    from ftkit.report import Reporter
    from ftkit.session import Session
    from ftkit.tasks import Task

SCORED = ("classes", "labels", "positions")  # targets that logits are softened over


class Teacher(Protocol):
    """What a trainee asks."""

    def answers(self, batch: Batch, student: Items) -> Items:
        """The student's items of a batch as the teacher has them, in the same order."""
        ...

    def inside(self, batch: Batch) -> Inside:
        """What the teacher's layers made of the real tokens of that batch, as far as it is compared."""
        ...


# --- before anything is loaded ----------------------------------------------------------------------------


def check(objective: Distill, task: Task, tokenizer: Any, limits: Limits) -> None:
    """Refuse a teacher that has not learned the task, one of other labels, tokens or lengths, or of broken weights; loads none."""
    if task.targets not in SCORED or getattr(task, "coupled", False) or hasattr(task, "counts"):
        raise RecipeError(f"objective distill: {task.kind} with {task.targets} has no scores of classes that could be softened; use objective: supervised")
    origin, told, inside = teacher_models.find(objective), f"objective.teacher: {objective.teacher}", objective.looks_inside
    if isinstance(origin, Run):
        _check_task(origin, task, told)
    elif task.new_head:
        what = "is no run directory" if origin.source.local else "does not exist"
        raise RecipeError(f"{told} {what}; train the teacher with ftkit first, then name its run")
    else:
        try:
            model_class(origin.config(), task)
        except RecipeError as error:
            raise RecipeError(f"{told}: {error}") from error
    origin.check_weights()
    if objective.teacher_bits:
        teacher_models.check_bits(origin, objective.teacher_bits)
    if inside and isinstance(origin, Run) and (method := origin.recipe.method).positions:
        raise RecipeError(f"{told} was trained with {method.kind}, whose virtual tokens the student has not; compare scores alone, not layers")
    if not _reads(origin, tokenizer):
        if inside or task.auto_class != "AutoModelForSequenceClassification":
            what = "layers are compared" if inside else f"{task.kind} compares scores"
            raise RecipeError(
                f"{told} has another tokenizer, and {what} token by token, which are not the same ones; use a student with the teacher's tokenizer"
            )
    elif (positions := max_positions(origin.config())) is not None and positions < limits.max_length:
        raise RecipeError(f"data.max_length: {limits.max_length}, but {told} has {positions} positions; give {positions} or fewer")


def _check_task(run: Run, task: Task, told: str) -> None:
    """Refuse a run that is not finished, or one of another task or of other labels."""
    rundir.finished(run.path)
    theirs = run.recipe.task
    if theirs.kind != task.kind:
        raise RecipeError(f"{told} was trained for {theirs.kind}, and this run is for {task.kind}")
    if (own := getattr(task, "problem", None)) != (other := getattr(theirs, "problem", None)):
        raise RecipeError(f"{told} was trained for problem: {other}, and this run is for {own}")
    if differing := other_labels(task, theirs):
        raise RecipeError(f"{told} has {differing}. Give them in task.labels as the teacher has them")


def _reads(origin: Origin, tokenizer: Any) -> bool:
    """Whether a tokenizer gives the tokens that a teacher knows."""
    return bool(origin.tokenizer().get_vocab() == tokenizer.get_vocab())


# --- asked in each step -----------------------------------------------------------------------------------


def assign(session: Session, report: Reporter, poll: Callable[[], None]) -> None:
    """Give the trainee of a session the teacher that its objective names, if it names one: what that says is cached, unless rows change in each epoch.

    `poll` may raise to stop.
    """
    objective: Distill = session.recipe.objective
    if not hasattr(objective, "teacher"):
        return
    trainee, features = session.trainee, session.prepared.train
    _say_sizes(teacher_models.find(objective), trainee, report)
    lessons = _lessons(session, report, poll)
    whys = {
        "layers are compared": objective.looks_inside and not objective.cache_states,
        "rows are masked anew in each epoch": features.corruption is not None and features.corruption.anew,
        "the student writes answers anew in each epoch": objective.on_policy,
    }
    why = next((reason for reason, holds in whys.items() if holds), None)
    if objective.looks_inside:
        _check_layers_run(session.recipe)
    if objective.cache and why:
        report.note(f"objective.cache: {why}, so the teacher is asked in each step")
    cached = objective.cache and why is None
    trainee.teacher = teacher = _cached(session, lessons, report, poll) if cached else _live(session, lessons, report)
    if objective.looks_inside:
        trainee.watch = own = Watch(session.base.model, objective.watches_attention)
        trainee.difference = lambda batch: objective.difference(own.seen(), teacher.inside(batch), batch, trainee.beside)


def _check_layers_run(recipe: Recipe) -> None:
    """Refuse what makes the layers of a student other ones than those that could be watched, or gives them other tokens."""
    others = {
        "train.gradient_checkpointing": recipe.train.gradient_checkpointing,
        "train.compile": recipe.train.compile,
        "train.parallel: fsdp": recipe.train.parallel == "fsdp",
        f"method {recipe.method.kind}, whose virtual tokens the teacher has not": recipe.method.positions,
    }
    if reason := next((reason for reason, given in others.items() if given), None):
        raise RecipeError(f"objective distill: layers cannot be compared with {reason}; leave it out, or compare scores alone")


def _plain(model: Any) -> Any:
    """Without the adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _say_sizes(teacher: Origin, student: Trainee, report: Reporter) -> None:
    own, other = sum(map(num_values, student.held())), teacher.parameters(student.task)
    told = f"the student has {own:,} parameters, its teacher {other:,}"
    report.note(told) if own < other else report.warn(f"{told}: it is no smaller")


class Lessons(NamedTuple):
    """The training rows as the teacher reads them."""

    features: FeatureSet
    place: np.ndarray | None  # int64 [n]: which one each of the student's features is; None: they are the student's own
    pad_token_id: int

    def batch(self, indices: np.ndarray) -> Batch:
        return collate(self.features, indices, self.pad_token_id)


def _lessons(session: Session, report: Reporter, poll: Callable[[], None]) -> Lessons:
    """Rows as a whole are read by the teacher's own tokenizer."""
    origin, own = teacher_models.find(session.recipe.objective), session.prepared.train
    if _reads(origin, session.tokenizer):
        return Lessons(own, None, session.pad_token_id)
    assert isinstance(origin, Run), "`check` refuses others of other tokens"
    tokenizer = origin.tokenizer()
    limits = session.limits._replace(max_length=origin.recipe.data.max_length or session.limits.max_length, truncation="right")
    rows = session.prepared.rows.train
    done = prepare.tokenise("train, for the teacher,", rows, session.recipe.task, tokenizer, limits, session.recipe.data.on_bad_rows, report, poll)
    place = np.searchsorted(done.features.row[:], own.row[:])
    assert (done.features.row[:][place] == own.row[:]).all(), "no tokenizer leaves rows out"
    return Lessons(done.features, place, tokenizer.pad_token_id)


def _open(session: Session, lessons: Lessons, report: Reporter) -> Trainee:
    """The teacher, frozen and in eval mode, in the dtype or the bits that it is stored in."""
    recipe, here = session.recipe, session.accelerator.device
    with report.stage("loading the teacher"), torch.random.fork_rng([here] if here.type == "cuda" else []):  # loaded or cached, the student draws the same
        origin = teacher_models.find(recipe.objective)
        model = origin.open(recipe.task, recipe.objective.teacher_bits, session.precision, here).requires_grad_(False)
    base = _plain(model)
    asked = "auto" if recipe.train.layout == "flat" else recipe.train.layout
    teacher = Trainee(model, base.base_model, recipe.task, recipe.objective, layout.flat(asked, "bucketed", recipe, base, report)).eval()
    layout.tried(asked, "bucketed", teacher, lessons.features, lessons.pad_token_id, session.precision, report)
    return teacher


class Live(NamedTuple):
    """A teacher that is asked in each step."""

    trainee: Trainee
    lessons: Lessons

    def answers(self, batch: Batch, student: Items) -> Items:
        if self.lessons.place is not None:
            batch = self.lessons.batch(self.lessons.place[batch.source[1]]).to(student.states.device)
        items = _asked(self.trainee, batch)
        return replace(items, states=_as_many(items.states, len(student)))

    def inside(self, batch: Batch) -> Inside:
        assert self.trainee.watch is not None
        return self.trainee.watch.seen()


def _live(session: Session, lessons: Lessons, report: Reporter) -> Live:
    teacher, objective = _open(session, lessons, report), session.recipe.objective
    if objective.looks_inside:
        teacher.watch = Watch(_plain(teacher.model), objective.watches_attention)
    return Live(teacher, lessons)


@torch.no_grad()
def _asked(teacher: Trainee, batch: Batch) -> Items:
    """The items of a batch, before the head."""
    with prompts.given(teacher.model, batch) as extended:
        items = teacher.items(extended)
    assert not isinstance(items, tuple), "`check` refuses losses of several parts"
    virtual = prompts.of(teacher.model)
    return items if virtual is None or items.head is None else replace(items, head=virtual.given()(items.head))


def _as_many(states: torch.Tensor, count: int) -> torch.Tensor:
    """Filled up to as many as the student has, whose batch may be filled up by items of weight 0; none in a batch that has no weight at all."""
    missing = max(0, count - len(states))
    return torch.cat((states[:count], states.new_zeros(missing, *states.shape[1:]))) if missing else states[:count]


# --- asked once -------------------------------------------------------------------------------------------


class Cached(NamedTuple):
    """What a teacher said of all training rows: N items in the order of its features."""

    lessons: Lessons
    offsets: np.ndarray  # int64 [m + 1]: feature i has the items from offsets[i] to offsets[i + 1]
    scores: torch.Tensor  # float32 [N, C]: logits; or of the k most likely classes and, in the last place, of each other one, [N, k + 1]
    classes: torch.Tensor | None  # int32 [N, k]: which these are
    num_classes: int  # C
    states: Sequence[torch.Tensor] = ()  # as those of `Inside`, of all T tokens, [T, H] each; empty where nothing is compared with them

    def inside(self, batch: Batch) -> Inside:
        places = _tokens(self.lessons.features, batch.source[1])
        return Inside([states[places].to(batch.input_ids.device) if len(states) else states for states in self.states])

    def answers(self, batch: Batch, student: Items) -> Items:
        features = batch.source[1] if self.lessons.place is None else self.lessons.place[batch.source[1]]
        places = torch.from_numpy(np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in features]))
        parts = [self.scores[places]] if self.classes is None else [self.scores[places], self.classes[places].float()]  # which is exact up to 2^24
        states = _as_many(torch.cat(parts, 1), len(student)).to(student.states.device)
        if self.classes is None:
            return replace(student, states=states[:, : student.num_classes] if student.kind == "positions" else states, head=None, layer=None)
        return replace(student, states=states, head=self._whole, layer=None)

    def _whole(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [m, C] of scores and classes side by side, [m, 2 k + 1]."""
        k = states.shape[1] // 2
        return states[:, k : k + 1].repeat(1, self.num_classes).scatter(1, states[:, k + 1 :].long(), states[:, :k])


def _cached(session: Session, lessons: Lessons, report: Reporter, poll: Callable[[], None]) -> Cached:
    """As it lies in the cache, or as the teacher says now."""
    objective: Distill = session.recipe.objective
    key = cache.key_of(
        teacher=teacher_models.find(objective).key(),
        bits=objective.teacher_bits,
        rows=_content(lessons.features),
        top_k=objective.top_k,
        temperature=objective.temperature,
        precision=session.precision,
        states=_compared(session),
    )
    computed = []

    def compute() -> dict[str, torch.Tensor]:
        computed.append(key)
        return _said(session, lessons, report, poll)

    tensors = cache.cached(key, compute, load_file, lambda value, path: save_file(value, path), report.note, poll)
    if not computed:
        report.note(f"what the teacher says of {len(tensors['scores']):,} items is in the cache: it is not loaded")
    states = [tensors.get(f"states.{place}", torch.empty(0)) for place in range(int(tensors["num_states"]))]
    return Cached(lessons, tensors["offsets"].numpy(), tensors["scores"], tensors.get("classes"), int(tensors["num_classes"]), states)


def _compared(session: Session) -> list[int]:
    """Which of the teacher's states are kept."""
    objective: Distill = session.recipe.objective
    if not objective.cache_states:
        return []
    own, theirs = (config.get_text_config() for config in (session.base.model.config, teacher_models.find(objective).config()))
    return objective.compared(own.num_hidden_layers, theirs.num_hidden_layers)


def _said(session: Session, lessons: Lessons, report: Reporter, poll: Callable[[], None]) -> dict[str, torch.Tensor]:
    """What `Cached` holds, by its names.  Says what disk that takes; raises DiskError where it is not there."""
    teacher, kept = _open(session, lessons, report), _compared(session)
    if kept:
        teacher.watch = Watch(_plain(teacher.model), False)
    found = _answered(teacher, kept, session, lessons, report, poll)
    for part in (teacher.flat, teacher.watch):  # their hooks hold the model
        if part is not None:
            part.remove()
    del teacher, part
    free_memory()
    return found


def _answered(teacher: Trainee, kept: list[int], session: Session, lessons: Lessons, report: Reporter, poll: Callable[[], None]) -> dict[str, torch.Tensor]:
    """What `_said` returns, by a teacher whose states in these places are `kept`."""
    objective, features, device, watch = session.recipe.objective, lessons.features, session.accelerator.device, teacher.watch
    with torch.no_grad(), session.accelerator.autocast():
        longest = _asked(teacher, lessons.batch(np.argmax(features.lengths, keepdims=True)).to(device))
        width, supervised = longest.num_classes, _supervised(features)
        counts = supervised * (2 if longest.kind == "positions" else 1)  # where an answer begins, and where it ends
        offsets = np.concatenate(([0], counts.cumsum()))
        k = objective.top_k if longest.kind == "classes" and width > 2 * objective.top_k else 0
        told = f"those of the {k} most likely of {width:,} classes each" if k else f"{width:,} each"
        found, num_states = dict[str, torch.Tensor](), 0
        what, needed = f"the scores that the teacher gives {offsets[-1]:,} items, {told}", int(offsets[-1]) * 4 * (2 * k + 1 if k else width)
        if watch is not None:
            states, tokens = watch.seen().states, int(features.offsets[-1])
            num_states = len(states)
            what += f", and {len(kept)} of its states of {tokens:,} tokens"
            needed += sum(tokens * states[place][0].nbytes for place in kept)
        _check_room(needed, what, report)
        if watch is not None:
            found = {f"states.{place}": states[place].new_empty(tokens, states[place].shape[1], device="cpu") for place in kept}
        found["scores"] = torch.full((int(offsets[-1]), k + 1 if k else width), -torch.inf)
        if k:
            found["classes"] = torch.zeros(int(offsets[-1]), k, dtype=torch.int32)
        with report.stage("asking the teacher", len(features)) as stage:
            for indices in by_length(features.lengths, session.recipe.eval.batch_size):
                places = torch.from_numpy(np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices]))
                items = _asked(teacher, lessons.batch(indices).to(device))
                if watch is not None:
                    states, real = watch.seen().states, _tokens(features, indices)
                    for place in kept:
                        found[f"states.{place}"][real] = states[place].cpu()
                for part in items.parts(chunks.chunk_size(items)):
                    own = places[part]  # behind them are items of weight 0
                    logits = items.scores(part).logits[: len(own)].float()
                    if k:
                        logits, which = _most_likely(logits, k, objective.temperature)
                        found["classes"][own] = which.int().cpu()
                    found["scores"][own, : logits.shape[1]] = logits.cpu()
                stage.advance(len(indices))
                poll()
    return found | {"offsets": torch.from_numpy(offsets), "num_classes": torch.tensor(width), "num_states": torch.tensor(num_states)}


def _tokens(features: FeatureSet, indices: np.ndarray) -> torch.Tensor:
    """int64 [N]: where the tokens of these features are among all."""
    return torch.from_numpy(np.concatenate([np.arange(features.offsets[i], features.offsets[i + 1]) for i in indices]))


def _most_likely(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [m, C] other ones of the k most likely classes, and of each of the rest alike, [m, k + 1], and which they are, int64 [m, k].

    At the temperature these have the probabilities that the teacher gives them, and the rest has what is left.
    """
    likely, which = (logits / temperature).log_softmax(-1).topk(k)
    rest = torch.log1p(-likely.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7)) - np.log(logits.shape[1] - k)
    return temperature * torch.cat((likely, rest), 1), which


def _supervised(features: FeatureSet) -> np.ndarray:
    """int64 [n]: supervised targets of each feature."""
    if features.corruption is not None:
        return np.array([np.count_nonzero(features.get(index)["weights"]) for index in range(len(features))])
    weighed = np.concatenate([block != 0 for block in _blocks(features.weights)])
    if features.per_row:
        return weighed.astype(np.int64)
    bounds = (features.offsets if features.target_offsets is None else features.target_offsets)[:]
    return np.diff(np.concatenate(([0], weighed.cumsum()))[bounds])


def _check_room(needed: int, what: str, report: Reporter) -> None:
    directory, most = cache.directory().absolute(), cache.limit()
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    otherwise = "or let the teacher be asked in each step (objective.cache: false)"
    if needed > most:
        raise DiskError(f"{what}, take {size(needed)}, and the cache may hold {size(most)}; set FTKIT_CACHE_LIMIT higher, {otherwise}")
    if needed > free:
        raise DiskError(f"{what}, take {size(needed)}, and {directory} has {size(free)}; set FTKIT_CACHE to another place, {otherwise}")
    if needed > (available := psutil.virtual_memory().available):
        raise OutOfMemory(f"{what}, take {size(needed)} of main memory until they are stored, and {size(available)} are left; give fewer rows, {otherwise}")
    report.note(f"not in the cache yet: {what}, take {size(needed)} in {directory}")


def _content(features: FeatureSet) -> str:
    """sha256 of what a teacher reads, and of which targets are supervised."""
    digest = hashlib.sha256()
    if features.corruption is not None:
        for example in map(features.get, range(len(features))):
            digest.update(example["input_ids"].tobytes() + (example["weights"] != 0).tobytes())
    for part in (features.input_ids, features.offsets, features.token_type_ids, features.target_offsets, features.targets if features.apart else None):
        for block in _blocks(part) if part is not None else ():
            digest.update(np.ascontiguousarray(block).tobytes())
        digest.update(b"end of a part")
    for block in _blocks(features.weights):
        digest.update((block != 0).tobytes())
    return digest.hexdigest()


def _blocks(numbers: Numbers) -> Iterable[np.ndarray]:
    return numbers.blocks() if isinstance(numbers, Stored) else [numbers]
