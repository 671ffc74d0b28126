"""The one batcher: which rows an optimizer step sees, and how they are laid out in tensors.

Every choice is a function of (seed, epoch): a run that resumes at step n needs nothing but n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ftkit.data.types import Batch, Padding, Segments

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet

S = TypeVar("S")
T = TypeVar("T")
# Batches sorted by length together, at most and as a share of all: as transformers' LengthGroupedSampler.  Larger pools pad less and mix less.
POOL, POOL_SHARE = 50, 4
WIDTH = 16  # groups of rows that attend together are padded to a multiple of it, where kernels are made for each length
CALL = 2000  # what a call of attention costs, in pairs of positions: seen for encoders and decoders of 6 to 12 heads, on a CPU


@dataclass(frozen=True)
class Sampler:
    """Which features an optimizer step sees: every one of them once an epoch, in an order of its own in each.

    `lengths`: int32 [n], tokens of each feature.  A batch has `batch_size` features, or as many as `batch_tokens`
    tokens hold and one at least; the last of an epoch may be smaller.  Layouts `padded` and `flat` draw features at
    random; `bucketed` sorts pools of 50 random batches by length (of a quarter, where all are fewer than 200), so
    that a batch has features of about one length, and shuffles the batches.
    """

    lengths: np.ndarray
    batch_size: int | None
    batch_tokens: int | None
    layout: str
    seed: int

    def epoch(self, number: int) -> Sequence[np.ndarray]:
        """The batches of an epoch, from 0, in order: arrays of feature indices."""
        rng = np.random.default_rng((self.seed, number))
        order = np.arange(len(self.lengths), dtype=np.int32)  # four bytes a feature are what an epoch takes
        rng.shuffle(order)
        if self.layout != "bucketed":
            return self._cut(order)
        size = self.batch_size or max(1, round((self.batch_tokens or 1) / self.lengths.mean()))
        pool = size * max(1, min(POOL, len(order) // (size * POOL_SHARE)))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            batches += self._cut(part[np.argsort(self.lengths[part], kind="stable")])
        return [batches[i] for i in rng.permutation(len(batches))]

    def steps(self, epochs: float) -> int:
        """Batches in so many epochs, begun ones counted."""
        if self.batch_size:
            return math.ceil(epochs * math.ceil(len(self.lengths) / self.batch_size))
        whole = int(epochs)
        rest = math.ceil((epochs - whole) * len(self.epoch(whole))) if epochs > whole else 0
        return sum(len(self.epoch(number)) for number in range(whole)) + rest

    def _cut(self, order: np.ndarray) -> Sequence[np.ndarray]:
        if self.batch_size:
            return _Cut(order, self.batch_size)
        assert self.batch_tokens is not None
        ends, batches, start = np.cumsum(self.lengths[order]), [], 0
        while start < len(order):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + self.batch_tokens, side="right")))
            batches.append(order[start:stop])
            start = stop
        return batches


class _Cut(Sequence[np.ndarray]):
    """An array in parts of `size`, the last one perhaps smaller."""

    def __init__(self, whole: np.ndarray, size: int) -> None:
        self.whole, self.size = whole, size

    def __len__(self) -> int:
        return -(-len(self.whole) // self.size)

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self.whole[place * self.size : (place + 1) * self.size]


def split(batch: np.ndarray, lengths: np.ndarray, accumulate: int, world: int, rank: int) -> list[np.ndarray]:
    """This process's micro-batches of a batch: rows of like length together, as many on every process.

    A process that has no row left gets an empty array, so that all processes run as many forward passes.
    """
    ordered = batch[np.argsort(lengths[batch], kind="stable")]
    parts = np.array_split(ordered, min(accumulate, len(ordered)))
    return [part[rank::world] for part in parts]


def largest_micro_batch(sampler: Sampler, accumulate: int, world: int) -> np.ndarray:
    """The features of the micro-batch with the most positions, padding counted where there is any, of all processes in the first epoch."""

    def positions(part: np.ndarray) -> int:
        lengths = sampler.lengths[part]
        return 0 if not len(part) else int(lengths.sum()) if sampler.layout == "flat" else len(part) * int(lengths.max())

    parts = (part for batch in sampler.epoch(0) for rank in range(world) for part in split(batch, sampler.lengths, accumulate, world, rank))
    return max(parts, key=positions)


def by_length(lengths: np.ndarray, batch_size: int, world: int = 1, rank: int = 0) -> Iterator[np.ndarray]:
    """Batches for evaluation, longest first (so that a lack of memory shows at once), this process's share.

    Every process gets as many; where rows run out, the last are empty.
    """
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), world * batch_size):
        yield order[start + rank * batch_size : start + (rank + 1) * batch_size]


def ahead(make: Callable[[T], S], items: Iterable[T]) -> Iterator[S]:
    """`make` of each item; while one is in use, that of the next is made in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[S] | None = None
        for item in items:
            following = pool.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def collate(features: FeatureSet, indices: np.ndarray, pad_token_id: int, epoch: int = 0) -> Batch:
    """The features, as they are in an epoch, as one right-padded batch; no index at all gives one row of weight 0."""
    silent = len(indices) == 0
    indices = np.zeros(1, np.int64) if silent else indices
    rows = [features.get(int(i), epoch) for i in indices]
    lengths = np.concatenate([row["texts"] for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]

    def laid_out(name: str, padding: int) -> np.ndarray:
        values = np.full(real.shape, padding, np.int64)
        values[real] = np.concatenate([row[name] for row in rows])
        return values

    shape_of_weights = (len(rows),) if features.per_row else (len(rows), max(len(row["weights"]) for row in rows))
    of_each = (features.width,) if features.width > 1 else ()
    targets = np.full(shape_of_weights + of_each, pad_token_id if features.apart else 0, rows[0]["targets"].dtype)
    weights = np.zeros(shape_of_weights, np.float32)
    for number, row in enumerate(rows):
        place = number if features.per_row else (number, slice(len(row["weights"])))
        given = row["targets"].reshape(-1, *of_each)
        targets[place] = given[0] if features.per_row else given
        if not silent:
            weights[place] = row["weights"][0] if features.per_row else row["weights"]
    if targets.dtype != np.float32:
        targets = targets.astype(np.int64)
    return Batch(
        input_ids=torch.from_numpy(laid_out("input_ids", pad_token_id)),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        supervised=torch.from_numpy(np.flatnonzero(weights)),
        row_ids=torch.from_numpy(np.asarray(indices, np.int64)),
        source=(features, np.asarray(indices)),
        token_type_ids=None if rows[0]["token_type_ids"] is None else torch.from_numpy(laid_out("token_type_ids", 0)),
        segments=None if real.all() else segments(real),
    )


def segments(attention_mask: np.ndarray) -> Segments:
    """Where the real tokens are; each row of the mask, int [B, L], begins with its own."""
    lengths = attention_mask.sum(1)
    groups = grouped(lengths.tolist())
    return Segments(
        shape=(attention_mask.shape[0], attention_mask.shape[1]),
        lengths=lengths.tolist(),
        index=torch.from_numpy(np.flatnonzero(attention_mask)),
        bounds=torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32)),
        groups=groups,
        padding=_padding(lengths, _widths(groups)),
    )


def rounded(batch: Batch, positions: bool, widths: bool) -> Batch:
    """The same batch with a round number of tokens in its segments, by ones that have no effect.

    `positions`: and of supervised positions, by ones of weight 0; `widths`: and of positions in the groups that attend together.
    For kernels that are made anew for each number: so there are few.
    """
    supervised = batch.supervised
    if positions and batch.weights.dim() == 2 and len(silent := torch.nonzero(batch.weights.flatten() == 0)):
        supervised = torch.cat((supervised, silent[0].expand(_missing(len(supervised)))))
    found = batch.segments and _filled_up(batch.segments)
    return replace(batch, supervised=supervised, segments=_widened(found) if found and widths else found)


def filled(batch: Batch) -> Batch:
    """The batch with `filled` beside its segments; one without padding has real tokens, too."""
    own = batch.segments or segments(batch.attention_mask.numpy())
    found = _filled_up(own)
    return batch if found is own else replace(batch, filled=found)


def _missing(count: int) -> int:
    """How many more make a multiple of 32, or of a power of 2 that is at most a thirty-second of them."""
    return -count % max(32, 1 << max(0, count.bit_length() - 6))


def _filled_up(segments: Segments) -> Segments:
    """With a round number of tokens: copies of the first ones in front, as a row of their own."""
    filler = _missing(len(segments.index))
    if not 0 < filler <= len(segments.index):
        return segments
    lengths = [filler, *segments.lengths]
    groups = grouped(lengths)
    padding = _padding(np.array(lengths), _widths(groups))
    return replace(
        segments,
        lengths=lengths,
        index=torch.cat((segments.index[:filler], segments.index)),
        bounds=torch.cat((segments.bounds[:1], segments.bounds + filler)),
        groups=groups,
        padding=padding,
        filler=filler,
    )


def _widened(segments: Segments) -> Segments:
    """With groups whose lengths are multiples of WIDTH."""
    groups = [(count, -(-length // WIDTH) * WIDTH) for count, length in segments.groups]
    return replace(segments, groups=groups, padding=_padding(np.array(segments.lengths), _widths(groups)))


def _widths(groups: list[tuple[int, int]]) -> np.ndarray:
    """How wide each row is padded."""
    return np.concatenate([np.full(count, length) for count, length in groups])


def _padding(lengths: np.ndarray, widths: np.ndarray) -> Padding | None:
    """That of rows of these lengths, each as wide as its group."""
    real = (np.arange(widths.max()) < lengths[:, None])[np.arange(widths.max()) < widths[:, None]]  # [S]
    if real.all():
        return None
    return Padding(*map(torch.from_numpy, (np.flatnonzero(real), (real.cumsum() - 1).clip(0), np.flatnonzero(~real))))


def grouped(lengths: list[int]) -> list[tuple[int, int]]:
    """Neighbours for which attention is cheaper in one call, padded, than in two: (count, length) of each group.

    Rows should come sorted by length.
    """
    groups = [(1, lengths[0])]
    for length in lengths[1:]:
        count, longest = groups[-1]
        widest = max(length, longest)
        if (count + 1) * widest**2 - count * longest**2 - length**2 <= CALL:
            groups[-1] = (count + 1, widest)
        else:
            groups.append((1, length))
    return groups
