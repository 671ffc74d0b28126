"""The one batcher: which rows an optimizer step sees, and how they are laid out in tensors.

Every choice is a function of (seed, epoch): a run that resumes at step n needs nothing but n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ftkit.data.types import Batch

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet

POOL = 50  # batches sorted by length together: 4 % padding at batch 8 on instruction rows, against 55 % in random order


def epoch_batches(lengths: np.ndarray, batch_size: int, layout: str, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, in order: arrays of feature indices, each index exactly once.

    `padded` draws batches at random; `bucketed` sorts pools of 50 random batches by length, so that a
    batch holds rows of about one length, and shuffles the batches.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if layout == "padded":
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def split(batch: np.ndarray, lengths: np.ndarray, accumulate: int, world: int, rank: int) -> list[np.ndarray]:
    """This process's micro-batches of a batch: rows of like length together, as many on every process.

    A process that has no row left gets an empty array, so that all processes run as many forward passes.
    """
    ordered = batch[np.argsort(lengths[batch], kind="stable")]
    parts = np.array_split(ordered, min(accumulate, len(ordered)))
    return [part[rank::world] for part in parts]


def by_length(lengths: np.ndarray, batch_size: int, world: int = 1, rank: int = 0) -> Iterator[np.ndarray]:
    """Batches for evaluation, longest first (so that a lack of memory shows at once), this process's share.

    Every process gets as many; where rows run out, the last are empty.
    """
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), world * batch_size):
        yield order[start + rank * batch_size : start + (rank + 1) * batch_size]


def collate(features: FeatureSet, indices: np.ndarray, pad_token_id: int) -> Batch:
    """The features as one right-padded batch; no index at all gives one row of weight 0."""
    silent = len(indices) == 0
    indices = np.zeros(1, np.int64) if silent else indices
    rows = [features.get(int(i)) for i in indices]
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = np.full(shape, pad_token_id, np.int64)
    segments = np.zeros(shape, np.int64)
    position_ids = np.zeros(shape, np.int64)
    type_ids = None if rows[0]["token_type_ids"] is None else np.zeros(shape, np.int64)
    target_shape = (len(rows),) if features.per_row else shape
    targets = np.zeros(target_shape, rows[0]["targets"].dtype)
    weights = np.zeros(target_shape, np.float32)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[number, :length] = row["input_ids"]
        segments[number, :length] = number + 1
        position_ids[number, :length] = np.arange(length)
        if type_ids is not None:
            type_ids[number, :length] = row["token_type_ids"]
        place = number if features.per_row else (number, slice(length))
        targets[place] = row["targets"][0] if features.per_row else row["targets"]
        if not silent:
            weights[place] = row["weights"][0] if features.per_row else row["weights"]
    if targets.dtype != np.float32:
        targets = targets.astype(np.int64)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        segments=torch.from_numpy(segments),
        position_ids=torch.from_numpy(position_ids),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        row_ids=torch.from_numpy(np.asarray(indices, np.int64)),
        token_type_ids=None if type_ids is None else torch.from_numpy(type_ids),
    )
