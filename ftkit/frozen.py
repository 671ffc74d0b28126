"""Frozen work is done once: what the layers below the first one that learns give is kept for each row.

Where no gradient reaches a layer and no dropout is at work in or below it, a row's states above it are the same in
every epoch.  They are computed in one pass over each set, in batches that depend on nothing but the set: a run that
resumes gets the same bits.  That states do not depend on other rows or padding, and that the model does with kept
states what it does with computed ones, is tried on two rows first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import nn

from ftkit.attention import Unsupported, layers_of
from ftkit.data.batches import by_length, collate
from ftkit.errors import DiskError
from ftkit.layout import EXPECTED, coarsest, difference, first_line, logits, two_rows, within
from ftkit.quantities import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch
    from ftkit.loop import Trainee

IN_MEMORY = 2 << 30  # bytes that states may take in main memory, and no more than a quarter of what is free


class Kept(NamedTuple):
    """The states of a set."""

    features: FeatureSet
    states: torch.Tensor  # [T, H], in the order of the set's tokens


class _Reached(Exception):
    """The highest frozen layer has given its states: nothing above it is wanted."""


class Frozen:
    """The lowest layers of a model, which do not learn, and what they gave for the rows that were recorded."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.directory: Path | None = None  # of the file that states are mapped from; None: they are kept in main memory
        self._kept: dict[int, Kept] = {}  # by the id of the set
        self._given: torch.Tensor | None = None  # states to hand on instead of computing any
        self._taken: torch.Tensor | None = None  # what the last of the layers gave
        self._recording = False
        self._tuples = False  # whether layers give their states in a tuple
        for layer in layers:
            layer._compiled_call_impl = None  # once is not worth it
            layer.forward = self._passing(layer.forward, last=layer is layers[-1])

    def states_of(self, batch: Batch, compute: Callable[[Batch], Any]) -> torch.Tensor:
        """[N, H]: what the layers give for the real tokens of a batch, by `compute`, a forward pass."""
        self._recording = True
        try:
            compute(batch)
        except _Reached:
            pass
        finally:
            self._recording = False
        states, self._taken = self._taken, None
        if not isinstance(states, torch.Tensor) or states.dim() != 3:
            raise Unsupported("its layers give something else than states")
        real = int(batch.attention_mask.sum())
        if states.shape[:2] == batch.input_ids.shape:
            return states.flatten(0, 1) if batch.segments is None else batch.segments.gather(states).squeeze(0)
        filler = states.shape[1] - real  # `Trainee` may have rounded the number of tokens up
        if states.shape[0] != 1 or not 0 <= filler <= real:
            raise Unsupported("its layers see other positions than those of the rows")
        return states[0, filler:]

    def record(self, sets: list[FeatureSet], compute: Callable[[Batch], Any], batch_size: int, pad_token_id: int) -> Iterator[int]:
        """Keep the states of all rows of the sets; yields the number of rows done each time.

        A file that they are mapped from has no name: it goes with the process.
        """
        for features in sets:
            kept = None
            for indices in by_length(features.lengths, batch_size):
                states = self.states_of(collate(features, indices, pad_token_id), compute).cpu()
                if kept is None:
                    shape = (int(features.offsets[-1]), states.shape[-1])
                    kept = torch.empty(shape, dtype=states.dtype) if self.directory is None else _mapped(self.directory, shape, states.dtype)
                kept[tokens(features, indices)] = states
                yield len(indices)
            if kept is not None:
                self.keep(features, kept)

    def keep(self, features: FeatureSet, states: torch.Tensor) -> None:
        self._kept[id(features)] = Kept(features, states)

    @contextmanager
    def rows(self, batch: Batch, flat: bool) -> Iterator[None]:
        """What is called herein computes the layers only for sets that are not kept; `flat`: they take real tokens only."""
        features, indices = batch.source
        if (kept := self._kept.get(id(features))) is not None:
            given = kept.states[tokens(features, indices)].to(batch.input_ids.device, non_blocking=True).unsqueeze(0)
            if batch.segments is None:
                given = given.view(*batch.input_ids.shape, -1)
            else:
                given = batch.segments.with_filler(given)
                given = given if flat else batch.segments.scatter(given)
            self._given = given
        try:
            yield
        finally:
            self._given = None

    def remove(self) -> None:
        """Leave the layers as they were, and let go of them and of all states."""
        for layer in self.layers:
            del layer.forward
        self.layers = []
        self._kept.clear()

    def _passing(self, compute: Callable[..., Any], last: bool) -> Callable[..., Any]:
        """A layer's forward pass that hands on what is given, where something is."""

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._given is not None:
                handed = self._given if last else hidden_states
                return (handed,) if self._tuples else handed
            output = compute(hidden_states, *args, **kwargs)
            if last and self._recording:
                self._tuples = isinstance(output, tuple)
                if self._tuples and len(output) > 1:
                    raise Unsupported("its layers give more than states")
                self._taken = output[0] if self._tuples else output
                raise _Reached
            return output

        return forward


def choose(
    trainee: Trainee,
    model: PreTrainedModel,
    sets: list[FeatureSet],
    directory: Path,
    pad_token_id: int,
    note: Callable[[str], None],
    arithmetic: torch.dtype = torch.float32,
) -> Frozen | None:
    """The lowest layers that change for no row, ever; None where there are none, where keeping states would change results, or has no room.

    Says which.  `trainee` computes as the run does, in this `arithmetic`; `sets` are those whose states are wanted, `directory` is for a file.
    """
    rows = two_rows(sets[0])
    compute = passing(trainee)
    layers = _unchanging(model, trainee, collate(rows, np.arange(2), pad_token_id), compute)
    if not layers:
        return None
    if getattr(getattr(model.config, "quantization_config", None), "load_in_8bit", False):
        note(f"the lowest {len(layers)} layers are frozen, but computed anew each time: in 8 bits they round their inputs by what else is in a batch")
        return None
    frozen = trainee.frozen = Frozen(layers)
    trainee.eval()
    try:
        with torch.no_grad():
            together = frozen.states_of(collate(rows, np.arange(2), pad_token_id), compute)

            def apart() -> list[torch.Tensor]:
                return [frozen.states_of(collate(rows, np.array([index]), pad_token_id), compute) for index in range(2)]

            alone = torch.cat(apart())
            off = difference(together, alone)
            limit = within(off, coarsest(trainee, arithmetic), model, apart)
            expected = torch.cat(logits(trainee, rows, [0, 1], pad_token_id))
            frozen.keep(rows, alone.cpu())
            found = torch.cat(logits(trainee, rows, [0, 1], pad_token_id))
        if not off <= limit:
            raise Unsupported("what they give for a row depends on the rows beside it")
        if not difference(found, expected) <= limit:
            raise Unsupported("the layers above take more from them than their states")
        needed = sum(int(features.offsets[-1]) for features in sets) * alone[0].nbytes
        frozen.directory = _room(needed, directory)
    except torch.OutOfMemoryError:
        raise
    except (*EXPECTED, KeyError) as error:
        frozen.remove()
        trainee.frozen = None
        note(f"the lowest {len(layers)} layers are frozen, but computed anew each time: {first_line(error)}")
        return None
    kept = "memory" if frozen.directory is None else "a file"
    note(f"the lowest {len(layers)} layers are frozen: they are computed once for each row, and what they give is kept in {kept} ({size(needed)})")
    return frozen


def passing(trainee: Trainee) -> Callable[[Batch], None]:
    """A forward pass of which nothing is wanted but what happens in it."""
    device = next(trainee.parameters()).device

    def compute(batch: Batch) -> None:
        trainee(batch.to(device), lambda parts: None)

    return compute


def _unchanging(model: PreTrainedModel, trainee: Trainee, batch: Batch, compute: Callable[[Batch], None]) -> list[nn.Module]:
    """The lowest layers that, in training, no gradient reaches and no dropout changes: seen in two passes, not told by the order of modules."""
    layers = [layer for layer in layers_of(model) if "forward" not in vars(layer)]
    config = model.config.get_text_config()
    skips_layers = any(getattr(config, name, 0) for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"))
    if not layers or len(layers) != len(layers_of(model)) or skips_layers:
        return []
    if any(parameter.requires_grad for parameter in layers[0].parameters()):
        return []
    seen: list[list[torch.Tensor]] = [[], []]
    trainee.train()
    for number, outputs in enumerate(seen):
        hooks = [
            layer.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output[0] if isinstance(output, tuple) else output))
            for layer in layers
        ]
        with torch.enable_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # the run draws as if this had not been
            torch.manual_seed(number)
            compute(batch)
        for hook in hooks:
            hook.remove()
    if len(seen[0]) != len(layers) or len(seen[1]) != len(layers):
        return []
    found = []
    for layer, first, second in zip(layers, *seen, strict=True):
        if not isinstance(first, torch.Tensor) or first.requires_grad or not torch.equal(first, second):
            break
        found.append(layer)
    return found


def _room(needed: int, directory: Path) -> Path | None:
    """The directory, if it is to hold a file of `needed` bytes, or None, where they fit into main memory; Unsupported if they fit nowhere."""
    if needed <= min(IN_MEMORY, psutil.virtual_memory().available // 4):
        return None
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if needed > disk_budget(existing):
        raise Unsupported(f"what they give takes {size(needed)}, more than half of the free disk")
    return directory


def disk_budget(existing: Path) -> int:
    """Bytes of disk that states may take: half of what is free."""
    return shutil.disk_usage(existing).free // 2


def tokens(features: FeatureSet, indices: np.ndarray) -> torch.Tensor:
    """int64 [N]: where the tokens of these features are among all tokens of the set."""
    return torch.from_numpy(np.concatenate([np.arange(features.offsets[i], features.offsets[i + 1]) for i in indices]))


def _mapped(directory: Path, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a file without a name; its space is taken now, where the system can, so that a full disk is found out here."""
    path = directory / ".frozen"
    count = max(1, shape[0] * shape[1])
    needed = count * dtype.itemsize
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
            else:  # macOS
                file.truncate(needed)
        states = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise DiskError(f"{directory}: no room for the states above the frozen layers ({size(needed)}): {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)
    return states[: shape[0] * shape[1]].view(shape)
