"""The training loop: short enough to read in one sitting.

Losses are sums, tasks give the weights, and the loop divides by the weights of all micro-batches and
processes: a batch in one piece, in four, or on two processes has the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ftkit import chunks
from ftkit.data.batches import Sampler, collate, split
from ftkit.data.types import Batch, Scores
from ftkit.errors import Diverged

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftkit.attention import Flat
    from ftkit.frozen import Frozen
    from ftkit.objectives import Objective
    from ftkit.session import Session
    from ftkit.tasks import Task


class Trainee(nn.Module):
    """What accelerate prepares: model, head, task and objective behind one `forward`.

    Nothing outside calls a submodule: under DDP that would leave other gradients on every process, and
    under FSDP weights that were not gathered.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, task: Task, objective: Objective, flat: Flat | None = None) -> None:
        super().__init__()
        self.model, self.task, self.objective, self.flat = model, task, objective, flat
        self.frozen: Frozen | None = None
        self.still = {name or "the whole base": module for module in frozen_bottom(inner) for name, other in inner.named_modules() if other is module}

    def forward(self, batch: Batch, judge: Callable[[Iterator[Scores]], None] | None = None) -> torch.Tensor | None:
        """The summed loss of the batch, float32; with `judge`, nothing: that is given the scores of the supervised items, a chunk at a time."""
        with ExitStack() as stack:
            if self.flat:
                stack.enter_context(self.flat.rows(batch.segments))
            if self.frozen:
                stack.enter_context(self.frozen.rows(batch, flat=self.flat is not None))
            items = self.task.items(self.model, batch)
        if judge is None:
            return chunks.loss(items, self.objective, list(self.model.parameters()))
        judge(chunks.scores(items))
        return None

    def train(self, mode: bool = True) -> Trainee:
        """Training mode, except for frozen modules below the first one that learns: dropout there only adds noise."""
        super().train(mode)
        for module in self.still.values() if mode else ():
            module.eval()
        return self


def frozen_bottom(model: nn.Module) -> list[nn.Module]:
    """The largest modules without a learning parameter that come before the first one that learns, in order of definition."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> bool:
        """Collect; True once something that learns was met."""
        if not any(p.requires_grad for p in module.parameters()):
            found.append(module)
            return False
        if hasattr(module, "base_layer") or any(p.requires_grad for p in module.parameters(recurse=False)):
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


class Step(NamedTuple):
    """What one optimizer step did; loss and norm are those of the whole batch on all processes."""

    loss: float
    grad_norm: float
    items: float  # sum of the weights of the supervised items: the denominator of the loss
    tokens: int  # real tokens, padding not counted
    rows: np.ndarray  # feature indices of the batch
    epoch: float  # epochs done, this step counted


def batches(sampler: Sampler, position: Position, num_steps: int) -> Iterator[tuple[np.ndarray, float]]:
    """The batches from `position` on, epoch after epoch, with the epochs done after each; `position` moves along and is that after the batch in hand."""
    while position.step < num_steps:
        here = position.epoch
        epoch = sampler.epoch(here)
        while position.epoch == here and position.step < num_steps:
            batch = epoch[position.batch]
            position.step += 1
            position.batch += 1
            done = here + position.batch / len(epoch)
            if position.batch == len(epoch):
                position.epoch, position.batch = here + 1, 0
            yield batch, done


def train_step(
    accelerator: Accelerator,
    trainee: nn.Module,
    optimizer: Any,
    micro_batches: list[Batch],
    max_grad_norm: float | None,
) -> tuple[float, float, float]:
    """One optimizer step over `micro_batches`; returns the loss, the gradient norm before clipping and the items.

    Raises Diverged before the weights change if loss or norm is not finite.
    """
    device = accelerator.device
    items = accelerator.reduce(torch.stack([batch.weights.double().sum() for batch in micro_batches]).sum().to(device), "sum")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(trainee):  # gradients are added up over processes once
            loss = trainee(batch.to(device)) / items.float()
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes; the sum is wanted
        total += loss.detach().double()
    total = accelerator.reduce(total, "sum")
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    value, norm_value = total.item(), float(norm)
    # fp16 skips steps whose scaled gradients overflow, and halves the scale; at 1 nothing is left to halve
    scaling = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
    if not math.isfinite(value) or not (math.isfinite(norm_value) or scaling):
        raise Diverged(f"loss {value}, gradient norm {norm_value}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value, norm_value, items.item()


def fit(session: Session, position: Position) -> Iterator[Step]:
    """Train from `position` to the end; yields after every optimizer step, when it is safe to evaluate or save."""
    accelerator, trainee, optimizer = session.accelerator, session.wrapped, session.optimizer
    train, features = session.recipe.train, session.prepared.train
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    trainee.train()
    for rows, epoch in batches(session.sampler, position, session.num_steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * session.schedule(position.step - 1)
        parts = split(rows, features.lengths, session.accumulate, accelerator.num_processes, accelerator.process_index)
        micro_batches = [collate(features, part, session.pad_token_id) for part in parts]
        try:
            loss, norm, items = train_step(accelerator, trainee, optimizer, micro_batches, train.max_grad_norm)
        except Diverged as error:
            raise Diverged(str(error), rows.tolist()) from None
        yield Step(loss, norm, items, int(features.lengths[rows].sum()), rows, epoch)
        trainee.train()
