"""The training loop: short enough to read in one sitting.

Losses are sums, tasks give the weights, and the loop divides by the weights of all micro-batches and
processes: a batch in one piece, in four, or on two processes has the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ftkit import chunks, on_policy, prompts, together
from ftkit.data.batches import Sampler, ahead, collate, filled, rounded, split
from ftkit.data.types import Batch, Items, Scores
from ftkit.errors import Diverged
from ftkit.intermediate import token_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftkit.attention import Flat
    from ftkit.frozen import Frozen
    from ftkit.intermediate import Watch
    from ftkit.neftune import Noise
    from ftkit.objectives import Objective
    from ftkit.session import Session
    from ftkit.tasks import Task
    from ftkit.teachers import Teacher


class Trainee(nn.Module):
    """What accelerate prepares: model, head, task and objective behind one `forward`.

    Nothing outside calls a submodule: under DDP that would leave other gradients on every process, and
    under FSDP weights that were not gathered.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: nn.Module,
        task: Task,
        objective: Objective,
        flat: Flat | None = None,
        noise: Noise | None = None,
        beside: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task, self.objective, self.flat, self.noise, self.beside = model, task, objective, flat, noise, beside
        self.frozen: Frozen | None = None
        self.watch: Watch | None = None  # of the layers, where they are compared with a teacher's
        self.difference: Callable[[Batch], torch.Tensor] | None = None  # how far they are from these, summed over tokens
        self.teacher: Teacher | None = None  # whom the objective compares with; no module of this one, for it does not learn
        self.flat_beside: Flat | None = None  # the layers of what is beside, where they run on real tokens only, too
        self._places: list[tuple[dict[str, nn.Parameter | None], str]] = []
        self.still = {name or "the whole base": module for module in frozen_bottom(inner) for name, other in inner.named_modules() if other is module}

    @property
    def coupled(self) -> bool:
        """Whether the loss of a row depends on the other rows."""
        return getattr(self.task, "coupled", False)

    def forward(
        self, batch: Batch, judge: Callable[[Iterator[Scores]], None] | None = None, among: Callable[[Items], Items] | None = None
    ) -> torch.Tensor | None:
        """The summed loss of the batch, float32 [], or of each of its parts, [K]; with `judge`, nothing: that is given the scores of the supervised
        items, a chunk at a time.

        `among` puts the items of the batch among others, whose loss is summed with theirs.
        """
        earlier: list[Items] = []
        if hasattr(self.task, "prior"):
            with self.flat_beside.rows(self._rounded(batch, positions=False).segments) if self.flat_beside else nullcontext():
                batch, items = self.task.prior(self.beside, batch)
            earlier.append(items)
        with prompts.given(self.model, batch) as extended:  # heads are asked without any
            items = self.items(extended, judged=judge is not None)
            if among is not None:
                assert not isinstance(items, tuple), "rows that learn from each other have one loss"
                items = among(items)
            if self.beside is not None and hasattr(self.task, "judged"):
                items = self.task.judged(self.beside, items)
            parts = [*earlier, *(items if isinstance(items, tuple) else (items,))]
            if judge is not None:
                judge(chain.from_iterable(map(chunks.scores, parts)))
                return None
            if self.teacher is not None:
                parts = [replace(part, teacher=self.teacher.answers(batch, part)) for part in parts]
            parameters = self.held()
            losses = [part.share * chunks.loss(part, self.objective, parameters) for part in parts]
            if self.difference is not None:
                losses.append(self.difference(batch))
            return torch.stack(losses) if len(losses) > 1 else losses[0]

    def items(self, batch: Batch, judged: bool = False) -> Items | tuple[Items, ...]:
        """What the task makes of the model's states: there may be more of weight 0, to a round number, and layers are watched, unless it is `judged`."""
        batch = self._rounded(batch, positions=not judged)
        with ExitStack() as stack:
            if self.flat:
                stack.enter_context(self.flat.rows(batch.segments))
            if self.noise and self.training:
                stack.enter_context(self.noise.rows(batch))
            if self.frozen:
                stack.enter_context(self.frozen.rows(batch, flat=self.flat is not None))
            if self.watch and not judged:
                stack.enter_context(self.watch.rows(batch))
            return self.task.items(self.model, batch)

    def _rounded(self, batch: Batch, positions: bool) -> Batch:
        """The batch with round numbers of tokens, and of supervised `positions`, where kernels are made for each number; as it was filled ahead, if so."""
        if batch.filled is not None:
            return replace(batch, segments=batch.filled)
        if not (self.flat and self.flat.round_batches and made_for_each_shape(self.model)):
            return batch
        return rounded(batch, positions=positions, widths=self.flat.fast_attention)

    def held(self) -> list[nn.Parameter]:
        """All parameters, each once.  To look for them in all modules takes milliseconds of every step, so their places are kept.

        FSDP has others there while a layer is gathered.
        """
        if not self._places:
            places = {id(parameter): (module._parameters, name) for module in self.modules() for name, parameter in module._parameters.items()}
            self._places = [place for place in places.values() if place[0][place[1]] is not None]
        return [found for own, name in self._places if (found := own.get(name)) is not None]

    def counts(self, batch: Batch) -> torch.Tensor:
        """What the sums of `forward` are divided by, of all parts of a batch on all processes together: float64 [], or [K]."""
        if hasattr(self.task, "counts"):
            return self.task.counts(batch)
        items = batch.weights.double().sum()
        return items if self.difference is None else torch.stack((items, token_weights(batch).double().sum()))

    def train(self, mode: bool = True) -> Trainee:
        """Training mode, except for frozen modules below the first one that learns: dropout there only adds noise."""
        super().train(mode)
        for module in self.still.values() if mode else ():
            module.eval()
        return self

    def learns(self) -> bool:
        """Whether its modules are as `train` leaves them; to go through all of them takes longer."""
        still = list(self.still.values())
        whole = self.training and (self.model.training or any(module is self.model for module in still))
        return whole and not any(module.training for module in still)


def made_for_each_shape(model: nn.Module) -> bool:
    """Whether products of matrices run in kernels that are made, and kept, for each number of rows: oneDNN's, of bfloat16 on a CPU.

    On two cores to make one takes as long as to multiply 700 tokens by a layer of 384 x 1536, and it keeps 2 MB.
    """
    weight = next(model.parameters())
    return weight.device.type == "cpu" and (torch.is_autocast_enabled("cpu") or weight.dtype is torch.bfloat16)


def chosen_for_each_shape(device: torch.device) -> bool:
    """Whether kernels for products of matrices are chosen, by rules of thumb, for each number of rows: cuBLAS's.

    An H200's processor chose for 32 ms in each step of a Llama of 8 billion parameters with LoRA.  What is chosen is kept.
    """
    return device.type == "cuda"


def frozen_bottom(model: nn.Module) -> list[nn.Module]:
    """The largest modules without a learning parameter that come before the first one that learns, in order of definition."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> bool:
        """Collect; True once something that learns was met."""
        if not any(p.requires_grad for p in module.parameters()):
            found.append(module)
            return False
        wrapped = hasattr(module, "base_layer") or isinstance(getattr(module, "prefix", None), nn.Module)
        if wrapped or any(p.requires_grad for p in module.parameters(recurse=False)):
            return True  # an adapter's own dropout belongs to what learns
        return any(walk(child) for child in module.children())

    walk(model)
    return found


@dataclass
class Position:
    """Where a run is: `step` optimizer steps are done; the next batch is `batch` of epoch `epoch`, from 0."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    evaluations_since_best: int = 0
    evaluation_due: bool = False  # the evaluation after this step has not been made yet


class Place(NamedTuple):
    """Where a run is after a batch: fields of `Position`, and the epochs done."""

    step: int
    epoch: int
    batch: int
    epochs_done: float

    @property
    def own_epoch(self) -> int:
        """That of the batch itself, after which the next epoch may begin."""
        return self.epoch - (self.batch == 0)


class Outcome(NamedTuple):
    """What one optimizer step came to, over the whole batch on all processes; on the device, where reading would wait for it."""

    loss: torch.Tensor  # float64 []
    grad_norm: torch.Tensor  # float [], before clipping
    items: torch.Tensor  # float64 []: sum of the weights of the supervised items, the denominator of a loss that has one part


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.  Its numbers are only looked at after `settle`."""

    outcome: Outcome
    tokens: int  # real tokens, padding not counted
    rows: np.ndarray  # feature indices of the batch
    epoch: float  # epochs done, this step counted
    settle: Callable[[], None]  # raises Diverged if this step, or one before it that nobody looked at, was not finite; waits for the device

    @property
    def loss(self) -> float:
        return self.outcome.loss.item()

    @property
    def grad_norm(self) -> float:
        return self.outcome.grad_norm.item()

    @property
    def items(self) -> float:
        return self.outcome.items.item()


def batches(sampler: Sampler, position: Position, num_steps: int) -> Iterator[tuple[np.ndarray, Place]]:
    """The batches from `position` to step `num_steps`, epoch after epoch, and the place after each."""
    step, number, begun = position.step, position.epoch, position.batch
    while step < num_steps:
        epoch = sampler.epoch(number)
        for batch in range(begun, min(len(epoch), begun + num_steps - step)):
            step += 1
            over = batch + 1 == len(epoch)
            yield epoch[batch], Place(step, number + over, 0 if over else batch + 1, number + (batch + 1) / len(epoch))
        number, begun = number + 1, 0


def train_step(
    accelerator: Accelerator, trainee: Trainee, wrapped: nn.Module, optimizer: Any, micro_batches: list[Batch], max_grad_norm: float | None
) -> Outcome:
    """One optimizer step over `micro_batches`; `wrapped`: the trainee as accelerate prepared it.  The weights do not change where loss or norm is not finite.

    Where the optimizer can look for itself, nothing waits for the device, and `Step.settle` tells later;
    elsewhere Diverged is raised at once.
    """
    device = accelerator.device
    items = accelerator.reduce(torch.stack([trainee.counts(batch) for batch in micro_batches]).sum(0).to(device, non_blocking=True), "sum")
    total = torch.zeros((), dtype=torch.float64, device=device)
    parts = len(micro_batches) * accelerator.num_processes
    whole = parts > 1 and trainee.coupled
    places = together.places(accelerator, wrapped, micro_batches) if whole else []
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(wrapped):  # gradients are added up over processes once
            loss = (wrapped(batch.to(device), **({"among": places[number]} if whole else {})) / items.float()).sum()
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes; the sum is wanted
        total += loss.detach().double() / (parts if whole else 1)  # each part's is that of the whole
    total = accelerator.reduce(total, "sum")
    parameters = [p for p in trainee.held() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    outcome = Outcome(total, torch.as_tensor(norm), items.sum())
    if looks_itself(optimizer, accelerator):
        optimizer.optimizer.found_inf = 1 - (total.isfinite() & norm.isfinite()).float()  # the fused kernel leaves out its update at 1
    else:
        # fp16 skips steps whose scaled gradients overflow, and halves the scale; at 1 nothing is left to halve
        scaling = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
        check_finite(outcome, scaling)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outcome


def looks_itself(optimizer: Any, accelerator: Accelerator) -> bool:
    """Whether the optimizer leaves out updates by a flag on the device; on a CPU there is nothing to wait for, and FSDP has no such flag."""
    whole = accelerator.device.type == "cuda" and accelerator.distributed_type in ("NO", "MULTI_GPU")
    return whole and accelerator.scaler is None and getattr(optimizer, "defaults", {}).get("fused") is True


def check_finite(outcome: Outcome, scaling: bool = False) -> None:
    """Raise Diverged where the loss is not finite, or the norm, unless that is what `scaling` is for."""
    if not math.isfinite(outcome.loss) or not (math.isfinite(outcome.grad_norm) or scaling):
        raise Diverged(f"loss {outcome.loss.item()}, gradient norm {outcome.grad_norm.item()}")


def fit(session: Session, position: Position) -> Iterator[Step]:
    """Train from `position` to the end; yields after every optimizer step, when it is safe to evaluate or save."""
    accelerator, trainee, wrapped, optimizer = session.accelerator, session.trainee, session.wrapped, session.optimizer
    train, features = session.recipe.train, session.prepared.train
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    unsettled: list[tuple[int, np.ndarray, Outcome]] = []
    writer = on_policy.Author(session) if on_policy.wanted(session.recipe) else None
    epoch, waiting = -1, list[nn.Parameter]()
    fills = trainee.flat is not None and trainee.flat.round_batches and chosen_for_each_shape(accelerator.device)

    def make(chosen: tuple[np.ndarray, Place]) -> tuple[np.ndarray, Place, list[Batch]]:
        parts = split(chosen[0], features.lengths, session.accumulate, accelerator.num_processes, accelerator.process_index)
        made = [collate(features, part, session.pad_token_id, chosen[1].own_epoch) for part in parts]
        made = [filled(batch) for batch in made] if fills else made
        return *chosen, [batch.pin_memory() for batch in made] if accelerator.device.type == "cuda" else made

    def settle() -> None:
        for step, rows, outcome in unsettled:
            with _located(step, rows):
                check_finite(outcome)
        unsettled.clear()

    wrapped.train()
    for rows, place, micro_batches in ahead(make, batches(session.sampler, position, session.num_steps)):
        if position.epoch != epoch:
            epoch, waiting = position.epoch, session.waiting(position.epoch)
        position.step, position.epoch, position.batch = place.step, place.epoch, place.batch
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * session.schedule(position.step - 1)
        tokens = int(features.lengths[rows].sum())
        if writer is not None:
            micro_batches = [writer.rewritten(batch, place.own_epoch) for batch in micro_batches]
            if not trainee.learns():
                wrapped.train()
            tokens = int(accelerator.reduce(torch.stack([batch.attention_mask.sum() for batch in micro_batches]).sum().to(accelerator.device), "sum"))
        with _located(position.step, rows), _frozen(waiting):
            outcome = train_step(accelerator, trainee, wrapped, optimizer, micro_batches, train.max_grad_norm)
        if looks_itself(optimizer, accelerator):
            unsettled.append((position.step, rows, outcome))
        yield Step(outcome, tokens, rows, place.epochs_done, settle)
        if not trainee.learns():  # it was measured, or wrote
            wrapped.train()


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """For this time, these do not learn."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _located(step: int, rows: np.ndarray) -> Iterator[None]:
    """Add to a divergence where it happened."""
    try:
        yield
    except Diverged as error:
        raise Diverged(str(error), rows.tolist(), step) from None
