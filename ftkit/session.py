"""A model ready to learn: base, method, objective and optimizer, prepared by accelerate for this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from ftkit import compiled, device, dropout, embeddings, frozen, kernels, launch, layout, model, on_policy, optim, prefixes, prompts, recompute, updates
from ftkit.data.batches import Sampler, collate, largest_micro_batch
from ftkit.errors import MissingDependency, RecipeError
from ftkit.few_bits import num_values, share_in_few_bits, steady_quantised
from ftkit.loop import Trainee
from ftkit.methods.modules import embedding_of
from ftkit.neftune import Noise

if TYPE_CHECKING:
    from ftkit.attention import Flat
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Limits, RowList
    from ftkit.embeddings import Used
    from ftkit.frozen import Frozen
    from ftkit.kernels import Liger
    from ftkit.methods import Method
    from ftkit.model import Base
    from ftkit.prepare import Prepared
    from ftkit.recipe.spec import Recipe, Train
    from ftkit.report import Reporter

LEARNER = "model"  # beside which something learns


@dataclass
class Session:
    """What the stages of a run share."""

    recipe: Recipe
    prepared: Prepared
    accelerator: Accelerator
    base: Base
    learner: nn.Module  # the base with the method applied
    beside: nn.Module | None  # what learns with it and is no part of it
    trainee: Trainee  # the learner with task and objective
    wrapped: nn.Module  # the trainee as accelerate prepared it: what everything calls
    optimizer: Any
    parameters: dict[str, dict[str, int]]  # trainable and total, by group
    precision: str
    num_steps: int  # of the whole run
    schedule: Callable[[int], float]  # step -> factor of the learning rate
    accumulate: int  # micro-batches of one process in a step
    sampler: Sampler
    flat: Flat | None  # the base's layers, where they run on real tokens only
    liger: Liger | None  # the kernels that compute some of the base's modules
    used: Used | None = None  # the token embeddings that occur in the training rows, where only these learn
    frozen: Frozen | None = None  # layers that are computed once

    @property
    def whole(self) -> nn.Module:
        """All that learns: the learner, with what is beside it, if there is anything."""
        return together_with(self.learner, self.beside)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.learner.named_parameters() if parameter.requires_grad}

    def waiting(self, epoch: int) -> list[nn.Parameter]:
        """What the method does not let learn yet in this epoch, counted from 0."""
        waits = self.recipe.method.waits(self.base)
        return [parameter for name, parameter in self.trainable.items() if waits(name, epoch)]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Herein, before the first step, the model answers as its base does: without prompts and prefixes, whose first values would have an effect."""
        with prompts.absent(self.base.model), prefixes.absent(self.base.model):
            yield

    @property
    def splits(self) -> dict[str, tuple[RowList, FeatureSet]]:
        return self.prepared.splits

    @property
    def tokenizer(self) -> Any:
        return self.prepared.tokenizer

    @property
    def limits(self) -> Limits:
        return self.prepared.limits

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    def compute_frozen(self, directory: Path, report: Reporter, poll: Callable[[], None]) -> None:
        """Compute what the lowest, frozen layers give for all rows of the run, where that saves anything: rows are seen more than once.

        `poll` may raise to stop.  On one process only: others would see other rows in each epoch.  Rows must be the same each time.
        """
        if not self.recipe.method.reuse or self.accelerator.num_processes > 1 or self.num_steps <= self.sampler.steps(1):
            return
        if self.trainee.watch is not None:  # layers that are not run cannot be watched
            return
        if on_policy.wanted(self.recipe):  # rows end otherwise each time
            return
        if (corruption := self.prepared.train.corruption) and (corruption.anew or self.beside):  # a generator learns, and writes other tokens
            return
        sets = [self.prepared.train, *(features for _, features in self.splits.values())]
        self.frozen = frozen.choose(self.trainee, self.base.model, sets, directory, self.pad_token_id, report.note, layout.DTYPES[self.precision])
        if self.frozen is None:
            return
        self.trainee.eval()
        with report.stage("computing the frozen layers", sum(map(len, sets))) as stage, torch.no_grad():
            for done in self.frozen.record(sets, frozen.passing(self.trainee), self.recipe.eval.batch_size, self.pad_token_id):
                stage.advance(done)
                poll()

    def release(self) -> None:
        """Leave the model as its own code has it, for saving and comparing."""
        for part in (self.trainee.watch, self.flat, self.trainee.flat_beside, self.frozen, self.liger, self.trainee.noise):
            if part is not None:
                part.remove()
        if self.recipe.train.compile:
            compiled.undo(self.base.model)
        if self.used is not None:
            self.used.restore()
        device.use_kernels_for(None)
        if not hasattr(self.recipe.task, "beside"):  # an objective's is of no use without its teacher
            self.beside = self.trainee.beside = None
        self.flat = self.frozen = self.liger = self.used = None
        self.trainee.flat = self.trainee.flat_beside = self.trainee.frozen = self.trainee.noise = None
        self.trainee.watch = self.trainee.difference = self.trainee.teacher = None


def together_with(learner: nn.Module, beside: nn.Module | None) -> nn.Module:
    """The two as one module; what they share has its name in the learner."""
    return learner if beside is None else nn.ModuleDict({LEARNER: learner, "beside": beside})


def open_session(prepared: Prepared, report: Reporter, before: Mapping[str, Any] = MappingProxyType({})) -> Session:
    """Load the base, apply the method, build the optimizer and hand all to accelerate; says what `auto` became.

    `before` is the manifest of the run that is continued: what its `auto` became, stays.
    """
    recipe, world = prepared.recipe, launch.world()
    train, method = recipe.train, recipe.method
    here = device.pick(world.local_rank)
    threads = device.use_all_cores(world.size if here.type == "cpu" else 1)
    if train.keep_memory and here.type == "cpu":
        device.keep_memory()
    precision = device.precision(train.precision, here)
    _check_parallel(train, here, world.size)
    check_attention(recipe)
    on_policy.check(recipe, prepared.rows.train[0])
    if prepared.source and prepared.source.adapter:
        report.note(f"starting from {prepared.source.name} with the adapter {prepared.source.adapter} merged into it")
    with report.stage("loading the model"):
        base = load_base(prepared, precision, here)
        if base.new and not recipe.task.new_head:
            report.warn(f"not among the stored weights, so from random ones: {', '.join(base.new_modules)}")
        if "quantization_config" in base.load_kwargs:
            report.note(f"{share_in_few_bits(base.model):.0%} of the base's weights are in few bits, those of its linear modules")
        torch.manual_seed(train.seed)
        learner = method.apply(base)
        beside = beside_of(recipe, base)
    model.check_added(base, method)
    whole = together_with(learner, beside)
    for parameter in whole.parameters():
        if parameter.requires_grad:  # fp32 master weights: bf16 cannot hold updates much smaller than the weight
            parameter.data = parameter.data.float()
    liger = kernels.choose(train.liger, base.model, here, report)
    if train.compile:
        compiled.check(base.model, here)
    if train.gradient_checkpointing:
        check_checkpointing(base, train)
    if train.gradient_checkpointing is True:
        recompute.everywhere(base.model)
    device.use_kernels_for("fp32")  # in the trial, which is sharper without TF32
    accelerator = _accelerator(train, precision, here, base)
    asked, otherwise = train.layout, "bucketed"
    if asked == "auto" and "layout" in before:
        asked, otherwise = ("auto", "padded") if before["layout"] == "flat" else (before["layout"], "")  # padded batches are those of flat
    noise = Noise(embedding_of(base.model), train.neftune) if train.neftune else None
    trainee = Trainee(learner, base.inner(), recipe.task, recipe.objective, layout.flat(asked, otherwise, recipe, base.model, report), noise, beside)
    trainee.flat_beside = layout.flat_beside(trainee, recipe, report)
    if train.parallel == "ddp":  # FSDP takes weights from main memory
        trainee.to(here)
    with updates.sharing(learner):
        laid_out = layout.tried(asked, otherwise, trainee, prepared.train, prepared.tokenizer.pad_token_id, precision, report)
    lengths = on_policy.lengths(recipe, prepared.train, prepared.limits.max_length)
    sampler = Sampler(lengths, train.batch_size, train.batch_tokens, laid_out, train.seed)
    num_steps = train.steps or sampler.steps(train.epochs or 0)
    accumulate = max(1, -(-train.accumulate // world.size))
    device.use_kernels_for(precision)
    if isinstance(train.gradient_checkpointing, str):
        largest = largest_micro_batch(sampler, accumulate, world.size)
        batch = collate(prepared.train, largest, prepared.tokenizer.pad_token_id).to(here)
        with torch.autocast(here.type, enabled=device.autocast_to(precision) != "no", dtype=layout.DTYPES[precision]):
            report.note(recompute.within(base.model, train.gradient_checkpointing, lambda: trainee.train()(batch, lambda parts: None)))
    if train.compile:
        compiled.compile_layers(base.model)
        report.note("layers are compiled in the first steps, which takes a minute or more")
    schedule = optim.schedule(train, num_steps)
    parameters = model.parameters_by_group(learner, base.head) | parameters_beside(recipe, learner, beside)
    used = _used_embeddings(prepared, base, world.size, precision, report)
    factor = method.lr_factor(base)
    optimizer = optim.build(
        whole, train, here, lambda name: train.learning_rate * (1.0 if name.startswith("beside.") else factor(name.removeprefix(f"{LEARNER}.")))
    )
    if used:
        used.follow(optimizer)
    wrapped, prepared_optimizer = accelerator.prepare(trainee, optimizer)
    _assert_wrapped(wrapped, train, world.size)
    report.note(f"{here}, {threads} threads, {precision}, {laid_out} batches of {_amount(train)}" + _shares(train, accumulate, world.size))
    if trainee.coupled and accumulate * world.size > 1:
        report.note(f"rows learn from those of the whole batch: each of its {accumulate * world.size} parts is computed twice")
    if train.optimizer.startswith("paged") and here.type == "cpu":
        report.note(f"train.optimizer: {train.optimizer} works as {train.optimizer.removeprefix('paged_')} here, since a CPU has nothing to page to")
    if trainee.still:
        report.note(f"without dropout, because frozen below the first part that learns: {', '.join(trainee.still)}")
    torch.manual_seed(train.seed + world.rank)  # dropout differs between processes
    session = Session(
        recipe=recipe,
        prepared=prepared,
        accelerator=accelerator,
        base=base,
        learner=learner,
        beside=beside,
        trainee=trainee,
        wrapped=wrapped,
        optimizer=prepared_optimizer,
        parameters=parameters,
        precision=precision,
        num_steps=num_steps,
        schedule=schedule,
        accumulate=accumulate,
        sampler=sampler,
        flat=trainee.flat,
        liger=liger,
        used=used,
    )
    _say_what_waits(session, report)
    return session


def beside_of(recipe: Recipe, base: Base) -> nn.Module | None:
    """What the task, or else the objective, lets learn beside the model, after `Method.apply`."""
    owner = _owner(recipe)
    beside: nn.Module | None = owner.beside(base.model) if owner is not None else None
    if beside is None:
        return None
    if recipe.train.parallel == "fsdp":
        raise RecipeError(f"{owner.kind}: a {owner.companion} learns beside the model, which alone train.parallel: fsdp shares out; use parallel: ddp")
    if recipe.train.fast_dropout:
        dropout.quicken(beside)
    return beside.to(base.model.device)


def _owner(recipe: Recipe) -> Any:
    """Task or objective, whichever has something beside the model."""
    return next((each for each in (recipe.task, recipe.objective) if hasattr(each, "beside")), None)


def parameters_beside(recipe: Recipe, learner: nn.Module, beside: nn.Module | None) -> dict[str, dict[str, int]]:
    """Trainable and total parameters of what is beside the learner, without those that the two share."""
    if beside is None:
        return {}
    shared = {id(parameter) for parameter in learner.parameters()}
    own = [parameter for parameter in beside.parameters() if id(parameter) not in shared]
    return {_owner(recipe).companion: {"trainable": sum(num_values(each) for each in own if each.requires_grad), "total": sum(map(num_values, own))}}


def check_waiting(method: Method, base: Base, num_processes: int) -> None:
    """Refuse on several processes what begins to learn later; after `Method.apply`."""
    waits = method.waits(base)
    if num_processes > 1 and any(waits(name, 0) for name, parameter in base.model.named_parameters() if parameter.requires_grad):
        raise RecipeError(f"method {method.kind}: on several processes all must learn from the first epoch on; leave unfreeze_every out, or set processes: 1")


def _say_what_waits(session: Session, report: Reporter) -> None:
    """Note what does not learn from the first epoch on, and what never will; DDP has to know once and for all what learns."""
    if not (waiting := session.waiting(0)):
        return
    check_waiting(session.recipe.method, session.base, session.accelerator.num_processes)
    report.note(f"{sum(map(num_values, waiting)):,} of {sum(map(num_values, session.trainable.values())):,} learning parameters wait for later epochs")
    epochs = -(-session.num_steps // session.sampler.steps(1))
    if never := session.waiting(epochs - 1):
        report.warn(f"{sum(map(num_values, never)):,} parameters never learn: their turn would come after the {epochs} epochs of this run")


def _used_embeddings(prepared: Prepared, base: Base, size: int, precision: str, report: Reporter) -> Used | None:
    """The token embeddings that training uses, as a parameter of their own, where that spares much and the result is known to be the same."""
    train, method = prepared.recipe.train, prepared.recipe.method
    if not train.skip_unused_embeddings or train.optimizer != "adamw" or precision == "fp16" or (train.parallel == "fsdp" and size > 1):
        return None  # other optimizers mix rows or remember decay; fp16 skips steps
    if on_policy.wanted(prepared.recipe):
        return None  # the student may write any token
    waits = method.waits(base)
    if any(waits(name, 0) for name, parameter in base.model.named_parameters() if parameter.requires_grad):
        return None  # an embedding may wait, and would not decay meanwhile
    tokens = embeddings.choose(base.model, prepared.train, (prepared.tokenizer.pad_token_id,))
    if tokens is None:
        return None
    embedding: Any = base.model.get_input_embeddings()
    report.note(f"of {embedding.num_embeddings:,} token embeddings {len(tokens):,} occur in the training rows: only these have gradients and optimizer state")
    return embeddings.Used(embedding, tokens)


def _amount(train: Train) -> str:
    return f"{train.batch_size} rows" if train.batch_size else f"{train.batch_tokens:,} tokens"


def _shares(train: Train, accumulate: int, size: int) -> str:
    if size == 1:
        return f" in {accumulate} parts" if accumulate > 1 else ""
    changed = f" (train.accumulate: {train.accumulate} on one process)" if accumulate != train.accumulate else ""
    return f", shared by {size} processes in {accumulate} parts each{changed}"


def _check_parallel(train: Train, here: torch.device, size: int) -> None:
    if train.parallel == "fsdp" and here.type == "cpu":
        raise MissingDependency("train.parallel: fsdp needs GPUs; on CPUs accelerate would silently run DDP. Use parallel: ddp")
    if train.parallel == "fsdp" and size == 1:
        raise RecipeError("train.parallel: fsdp shares a model among processes, and this is one alone; set train.processes, or leave parallel out")


def check_attention(recipe: Recipe) -> None:
    """Refuse what prefixes in attention cannot have: an attention function of the recipe's choice, and sharding of the network that makes them."""
    if recipe.train.parallel == "fsdp" and getattr(recipe.method, "prefix_projection", False):
        raise RecipeError(
            "method.prefix_projection: all layers share its network, and train.parallel: fsdp gathers one layer at a time; leave either of them out"
        )
    if recipe.model.attention and "attention interface" in recipe.method.needs(False):
        raise RecipeError(
            f"model.attention: {recipe.model.attention} asks for another attention function than the one that prefixes are put into; leave it out"
        )


def check_checkpointing(base: Base, train: Train) -> None:
    """Refuse gradient checkpointing where the architecture has none, or nothing would be recomputed; after `Method.apply`."""
    if not base.model.supports_gradient_checkpointing:
        raise RecipeError(f"train.gradient_checkpointing: {type(base.model).__name__} does not support it")
    if not any(parameter.requires_grad for parameter in base.below_head()):
        raise RecipeError("train.gradient_checkpointing has no effect here: no gradient goes through the layers below the head; leave it out")
    if train.parallel == "fsdp" and isinstance(train.gradient_checkpointing, str):
        raise RecipeError("train.gradient_checkpointing: what layers keep is measured on one device, not with parallel: fsdp; give true")


def _accelerator(train: Train, precision: str, here: torch.device, base: Base) -> Accelerator:
    """accelerate as it is told: counting and averaging stay with the loop."""
    plugin = None
    if train.parallel == "fsdp":
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(base.model._no_split_modules or ()),
            state_dict_type="FULL_STATE_DICT",
        )
    return Accelerator(
        gradient_accumulation_steps=1,
        mixed_precision=device.autocast_to(precision),
        cpu=here.type == "cpu",
        fsdp_plugin=plugin,
        step_scheduler_with_optimizer=False,
        # Evaluation runs as many batches as a process has: nothing may wait for the others inside a forward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def load_base(prepared: Prepared, precision: str, here: torch.device) -> Base:
    """The model before any method touched it; random weights are the same each time, by train.seed."""
    recipe = prepared.recipe
    spec = recipe.model
    if spec.dtype != "auto":
        dtype = getattr(torch, spec.dtype)
    else:
        dtype = torch.bfloat16 if here.type == "cuda" and precision == "bf16" and recipe.method.frozen_base else torch.float32
    base = model.load(
        spec, prepared.source, prepared.config, prepared.tokenizer, recipe.task, recipe.method, dtype, recipe.train.seed, here, recipe.train.precision
    )
    steady_quantised(base.model)
    model.check_causal(base.model, recipe.task)
    if recipe.train.fast_dropout:
        dropout.quicken(base.model)
    return base


def _assert_wrapped(wrapped: nn.Module, train: Train, size: int) -> None:
    """What was asked is what runs: accelerate falls back to DDP, or to nothing, without a word."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if size == 1:
        return
    kind = DistributedDataParallel if train.parallel == "ddp" else FSDPModule
    if not isinstance(wrapped, kind):
        raise RecipeError(f"train.parallel: {train.parallel} was asked for {size} processes, but accelerate made a {type(wrapped).__name__}")
