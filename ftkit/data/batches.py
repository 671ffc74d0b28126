"""The one batcher: which rows an optimizer step sees, and how they are laid out in tensors.

Every choice is a function of (seed, epoch): a run that resumes at step n needs nothing but n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ftkit.data.types import Batch, Segments

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet

# Batches sorted by length together, at most and as a share of all: as transformers' LengthGroupedSampler.  Larger pools pad less and mix less.
POOL, POOL_SHARE = 50, 4


def epoch_batches(lengths: np.ndarray, batch_size: int, layout: str, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, in order: arrays of feature indices, each index exactly once.

    `padded` and `flat` draw batches at random; `bucketed` sorts pools of 50 random batches by length (of a
    quarter, where all are fewer than 200), so that a batch holds rows of about one length, and shuffles the batches.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if layout != "bucketed":
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = []
    size = batch_size * max(1, min(POOL, len(order) // (batch_size * POOL_SHARE)))
    for start in range(0, len(order), size):
        pool = order[start : start + size]
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
    lengths = [len(row["input_ids"]) for row in rows]
    shape = (len(rows), max(lengths))
    input_ids = np.full(shape, pad_token_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    type_ids = None if rows[0]["token_type_ids"] is None else np.zeros(shape, np.int64)
    target_shape = (len(rows),) if features.per_row else shape
    targets = np.zeros(target_shape, rows[0]["targets"].dtype)
    weights = np.zeros(target_shape, np.float32)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[number, :length] = row["input_ids"]
        attention_mask[number, :length] = 1
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
        attention_mask=torch.from_numpy(attention_mask),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        supervised=torch.from_numpy(np.flatnonzero(weights)),
        row_ids=torch.from_numpy(np.asarray(indices, np.int64)),
        source=features,
        token_type_ids=None if type_ids is None else torch.from_numpy(type_ids),
        segments=segments(attention_mask) if min(lengths) < max(lengths) else None,
    )


def segments(attention_mask: np.ndarray) -> Segments:
    """Where the real tokens are; each row of the mask, int [B, L], begins with its own."""
    lengths = attention_mask.sum(1)
    return Segments(
        shape=(attention_mask.shape[0], attention_mask.shape[1]),
        lengths=lengths.tolist(),
        index=torch.from_numpy(np.flatnonzero(attention_mask)),
        bounds=torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32)),
    )
