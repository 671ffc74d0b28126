"""Frozen work is done once: what the layers below the first one that learns give is kept for each row.

Frozen layers run without dropout, so a row's states above them are the same in every epoch.  They are computed in one
pass over each set, in batches that depend on nothing but the set: a run that resumes gets the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import nn

from ftkit.attention import layers_of
from ftkit.data.batches import by_length, collate
from ftkit.errors import DiskError
from ftkit.quantities import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch

IN_MEMORY = 2 << 30  # bytes that states may take in main memory, and no more than a quarter of what is free
BYTES = 4  # of a number, float32


class Frozen:
    """The lowest layers of a model, which do not learn, and what they gave for the rows that were recorded."""

    def __init__(self, layers: list[nn.Module], hidden_size: int) -> None:
        self._layers, self._hidden_size = layers, hidden_size
        self._kept: dict[int, tuple[FeatureSet, torch.Tensor]] = {}  # id of a set -> the set, and its states [T, H]
        self._given: torch.Tensor | None = None  # states to hand on instead of computing any
        self._taken: torch.Tensor | None = None  # what the last of the layers gave
        self._others: tuple[None, ...] | None = None  # what it gave besides, if it gives a tuple
        for layer in layers:
            layer.forward = self._passing(layer.forward, last=layer is layers[-1])

    def record(self, sets: list[FeatureSet], directory: Path, compute: Callable[[Batch], Any], batch_size: int, pad_token_id: int) -> Iterator[int]:
        """Compute the states of all rows of the sets by `compute`, a forward pass; yields the number of rows done each time.

        More than fits in memory is mapped from a file in `directory`, which has no name there: it goes with the process.
        """
        on_disk = sum(num_bytes(features, self._hidden_size) for features in sets) > memory_budget()
        for features in sets:
            shape = (int(features.offsets[-1]), self._hidden_size)
            states = _mapped(directory, shape) if on_disk else torch.empty(shape)
            for indices in by_length(features.lengths, batch_size):
                batch = collate(features, indices, pad_token_id)
                compute(batch)
                assert self._taken is not None
                states[tokens(features, indices)] = _unpadded(self._taken, batch).float().cpu()
                yield len(indices)
            self._kept[id(features)] = features, states

    @contextmanager
    def rows(self, batch: Batch, flat: bool) -> Iterator[None]:
        """What is called herein computes the layers only for sets that are not recorded; `flat`: they take real tokens only."""
        features, indices = batch.source
        if (kept := self._kept.get(id(features))) is not None:
            given = kept[1][tokens(features, indices)].to(batch.input_ids.device, non_blocking=True).unsqueeze(0)
            if batch.segments is None:
                given = given.view(*batch.input_ids.shape, -1)
            elif not flat:
                given = batch.segments.scatter(given)
            self._given = given
        try:
            yield
        finally:
            self._given = None

    def remove(self) -> None:
        """Leave the layers as they were, and let go of all states."""
        for layer in self._layers:
            del layer.forward
        self._kept.clear()

    def _passing(self, compute: Callable[..., Any], last: bool) -> Callable[..., Any]:
        """A layer's forward pass that hands on what is given, where something is."""

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._given is None:
                output = compute(hidden_states, *args, **kwargs)
                if last:
                    self._taken, *others = output if isinstance(output, tuple) else (output,)
                    self._others = tuple(others) if isinstance(output, tuple) else None
                return output
            handed = self._given if last else hidden_states
            return handed if self._others is None else (handed, *self._others)

        return forward


def choose(model: PreTrainedModel, still: list[nn.Module], sets: list[FeatureSet], directory: Path, note: Callable[[str], None]) -> Frozen | None:
    """The lowest layers that are among the modules `still`, or within them, if there are any and their states can be kept.

    They never change, and neither does what comes before them.  Says what is kept and where.
    """
    layers = _lowest(model, still)
    if not layers:
        return None
    hidden_size = model.config.get_text_config().hidden_size
    needed, room = sum(num_bytes(features, hidden_size) for features in sets), disk_budget(directory)
    if needed > max(memory_budget(), room):
        note(f"the lowest {len(layers)} layers are frozen, but computed anew each time: what they give takes {size(needed)}, more than half of the free disk")
        return None
    where = "memory" if needed <= memory_budget() else "a file"
    note(f"the lowest {len(layers)} layers are frozen: they are computed once for each row, and what they give is kept in {where} ({size(needed)})")
    return Frozen(layers, hidden_size)


def _lowest(model: PreTrainedModel, still: list[nn.Module]) -> list[nn.Module]:
    within = {id(module) for each in still for module in each.modules()}
    frozen = (id(layer) in within and "forward" not in vars(layer) for layer in layers_of(model))
    return [layer for layer, _ in zip(layers_of(model), takewhile(bool, frozen), strict=False)]


def num_bytes(features: FeatureSet, hidden_size: int) -> int:
    """What the states of a set take."""
    return int(features.offsets[-1]) * hidden_size * BYTES


def memory_budget() -> int:
    """Bytes of main memory that states may take."""
    return min(IN_MEMORY, psutil.virtual_memory().available // 4)


def disk_budget(directory: Path) -> int:
    """Bytes of disk that states may take: half of what is free."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free // 2


def tokens(features: FeatureSet, indices: np.ndarray) -> torch.Tensor:
    """int64 [N]: where the tokens of these features are among all tokens of the set."""
    return torch.from_numpy(np.concatenate([np.arange(features.offsets[i], features.offsets[i + 1]) for i in indices]))


def _unpadded(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B, L, H], or [1, N, H] from flat layers -> [N, H]."""
    if batch.segments is None or states.shape[:2] != batch.segments.shape:
        return states.flatten(0, 1)
    return batch.segments.gather(states).squeeze(0)


def _mapped(directory: Path, shape: tuple[int, int]) -> torch.Tensor:
    """A float32 tensor in a file without a name; its space is taken now, where the system can, so that a full disk is found out here."""
    path = directory / ".frozen"
    count = max(1, shape[0] * shape[1])
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, count * BYTES)
            else:  # macOS
                file.truncate(count * BYTES)
        states = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
    except OSError as error:
        raise DiskError(f"{directory}: no room for the states above the frozen layers ({size(count * BYTES)}): {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)
    return states[: shape[0] * shape[1]].view(shape)
