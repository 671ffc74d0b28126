"""Rows -> tokens: the feature set of a split, cached, with an account of what tokenising did."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

import ftkit
from ftkit.data import cache, ondisk
from ftkit.data.ondisk import BUFFER, Growing, Spool, Stored
from ftkit.data.parallel import outcomes
from ftkit.data.rows import report_bad
from ftkit.data.types import Features, Limits, Row
from ftkit.errors import DiskError
from ftkit.recipe.spec import Spec

if TYPE_CHECKING:
    from ftkit.tasks import Task

# What tokenizers write about how they were last called or loaded, not about what they do
CALL_STATE = {
    "tokenizer.json": ("truncation", "padding"),
    "tokenizer_config.json": ("max_length", "stride", "truncation_strategy", "is_local", "local_files_only"),
}
NOT_TEXT = frozenset({"label", "score", "tags", "answers", "answer_start"})
PROGRESS_ROWS = 64  # between two reports of progress
Numbers: TypeAlias = "np.ndarray | Stored"
Example: TypeAlias = dict[str, Any]  # the parts of a feature: input_ids, targets, weights, token_type_ids, spans and texts; and its row, for what changes it


@dataclass(frozen=True)
class Corruption:
    """What is done to a feature each time it is used, by random numbers of its own.

    They come from the seed, the epoch and the feature's place in its set, and from nothing else: what a feature becomes
    does not depend on batches, processes, layouts or resumptions.
    """

    change: Callable[[Example, np.random.Generator], Example]  # what it gives is as long
    seed: int
    anew: bool  # in each epoch; else alike in all
    told: str  # what becomes of the supervised items, for the log

    def of(self, example: Example, epoch: int, index: int) -> Example:
        return self.change(example, np.random.default_rng((self.seed, epoch if self.anew else 0, index)))


@dataclass(frozen=True)
class FeatureSet:
    """The tokenised rows of a split, one after the other in flat arrays: n features of T tokens in all.

    Targets and weights have an entry a token, or an entry a feature (`per_row`), or are sequences of their own: U of them in all.
    Of targets that are W numbers each, W stand for each weight.  Rows of P texts have those of each one after the other.
    """

    input_ids: Numbers  # int32 [T]
    offsets: Numbers  # int64 [n + 1]: feature i has the tokens from offsets[i] to offsets[i + 1]
    targets: Numbers  # int32 or float32, [T * W], [n * W] or [U * W]
    weights: Numbers  # float32, [T], [n] or [U]
    row: Numbers  # int64 [n], ascending: index of the row that a feature came from
    token_type_ids: Numbers | None = None  # int8 [T]
    target_offsets: Numbers | None = None  # int64 [n + 1]: as offsets, of sequences of their own
    spans: Numbers | None = None  # int32 [T * 2]: from and to which character of the row each token is
    texts: Numbers | None = None  # int32 [n * P]: tokens of each text, where a feature has several
    corruption: Corruption | None = None  # of what `get` gives; never stored

    @classmethod
    def of(cls, rows: Iterable[list[Features]]) -> FeatureSet:
        """From the features of each row."""
        builder = _Builder()
        for index, features in enumerate(rows):
            builder.add(index, features)
        return builder.build()

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [n]: tokens of each feature, those that a decoder writes counted."""
        own = self._text_lengths if self.texts is None else _lengths(self.offsets)
        return own if self.target_offsets is None else own + _lengths(self.target_offsets)

    @cached_property
    def _text_lengths(self) -> Any:
        """int32 [n * P], in memory or on disk: tokens of each text."""
        return _lengths(self.offsets) if self.texts is None else self.texts

    def rows(self) -> Iterator[int]:
        """The rows that have features, in order."""
        last = -1
        for block in self.row.blocks() if isinstance(self.row, Stored) else [self.row]:
            for row in block.tolist():
                if row != last:
                    yield row
                last = row

    @cached_property
    def per_row(self) -> bool:
        """Whether a feature, rather than each of its tokens, has a target.

        Where every feature is one token long the two look alike; only a row can be classified then.
        """
        return not self.apart and len(self.weights) == len(self)

    @cached_property
    def width(self) -> int:
        """Numbers that make up a target."""
        return len(self.targets) // max(1, len(self.weights))

    @property
    def apart(self) -> bool:
        """Whether targets are sequences of their own, which a decoder writes."""
        return self.target_offsets is not None

    def get(self, index: int, epoch: int = 0) -> Example:
        """The parts of one feature, as they are in an epoch."""
        example = self.stored(index)
        return self.corruption.of(example | {"row": int(self.row[index])}, epoch, index) if self.corruption else example

    def stored(self, index: int) -> Example:
        """Views of one feature's parts, and how many tokens each of its texts has."""
        tokens = slice(*self.offsets[index : index + 2].tolist())
        count = len(self._text_lengths) // len(self)
        if self.target_offsets is not None:
            supervised = slice(*self.target_offsets[index : index + 2].tolist())
        else:
            supervised = slice(index, index + 1) if self.per_row else tokens
        numbers = slice(supervised.start * self.width, supervised.stop * self.width)
        return {
            "input_ids": self.input_ids[tokens],
            "targets": self.targets[numbers],
            "weights": self.weights[supervised],
            "token_type_ids": None if self.token_type_ids is None else self.token_type_ids[tokens],
            "spans": None if self.spans is None else self.spans[2 * tokens.start : 2 * tokens.stop],
            "texts": self._text_lengths[index * count : (index + 1) * count],
        }

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """One safetensors file with a JSON header.  Raises DiskError if it cannot be written."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__ and value is not None}
        try:
            if isinstance(self.row, Stored):
                ondisk.save(arrays, path, {"ftkit": json.dumps(metadata)})
            else:
                save_file(arrays, path, metadata={"ftkit": json.dumps(metadata)})
        except SafetensorError as error:
            raise DiskError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path, on_disk: bool = False) -> tuple[FeatureSet, dict[str, Any]]:
        """A set and its metadata; the arrays are mapped, so that pages are read when they are needed, or left `on_disk`."""
        from safetensors import safe_open

        if on_disk:
            arrays, metadata = ondisk.load(path)
            return cls(**dict[str, Any](arrays)), json.loads(metadata["ftkit"])
        with safe_open(path, framework="pt") as file:  # the numpy framework would copy the file into memory
            return cls(**{name: file.get_tensor(name).numpy() for name in file.keys()}), json.loads(file.metadata()["ftkit"])  # noqa: SIM118 - not a dict


def _lengths(offsets: Numbers) -> np.ndarray:
    """int32 [n]: of what lies between n + 1 offsets."""
    if not isinstance(offsets, Stored):
        return np.diff(offsets).astype(np.int32)
    found, place = np.empty(len(offsets) - 1, np.int32), 0
    for start in range(0, len(found), BUFFER):
        bounds = offsets[start : start + BUFFER + 1]
        found[place : place + len(bounds) - 1] = np.diff(bounds)
        place += len(bounds) - 1
    return found


class _Builder:
    """Feature sets grow in compact arrays, in memory or on disk: a list of Python numbers takes ten times the memory."""

    def __init__(self, on_disk: bool = False) -> None:
        new: Callable[[str], Any] = Growing if on_disk else array
        self.input_ids, self.offsets, self.row = new("i"), new("q"), new("q")
        self.targets, self.weights, self.token_type_ids, self.spans = new("d"), new("f"), new("b"), new("i")
        self.target_offsets, self.texts = new("q"), new("i")
        self.offsets.append(0)
        self.real_targets = self.apart = False
        self.on_disk = on_disk

    def add(self, row: int, features: list[Features]) -> None:
        for each in features:
            width = len(each.targets) // max(1, len(each.weights))
            assert width * len(each.weights) == len(each.targets), "targets and weights go in pairs"
            assert not len(self.weights) or width * len(self.weights) == len(self.targets), "targets are alike in all features"
            assert each.token_type_ids is None or len(each.token_type_ids) == len(each.input_ids)
            assert each.texts is None or sum(each.texts) == len(each.input_ids), "each token is of one text"
            assert not len(self.row) or len(each.texts or ()) * len(self.row) == len(self.texts), "as many texts in all features"
            if each.apart and not len(self.row):
                self.apart = True
                self.target_offsets.append(0)
            assert each.apart == self.apart, "targets are sequences of their own in all features, or in none"
            self.row.append(row)
            self.input_ids.extend(each.input_ids)
            self.offsets.append(len(self.input_ids))
            self.targets.extend(each.targets)
            self.weights.extend(each.weights)
            if self.apart:
                self.target_offsets.append(len(self.targets))
            self.token_type_ids.extend(each.token_type_ids or ())
            self.spans.extend(each.spans or ())
            self.texts.extend(each.texts or ())
            self.real_targets = self.real_targets or any(isinstance(target, float) for target in each.targets)

    def build(self) -> FeatureSet:
        num_tokens, n = len(self.input_ids), len(self.row)
        assert self.apart or len(self.weights) in (num_tokens, n), "a target for each token, or one for each feature"
        assert len(self.token_type_ids) in (0, num_tokens), "token types for all features, or for none"
        assert len(self.spans) in (0, 2 * num_tokens), "spans for all features, or for none"

        def done(grown: Any, dtype: Any) -> Any:
            return grown.stored(dtype) if self.on_disk else np.array(grown, dtype)

        return FeatureSet(
            input_ids=done(self.input_ids, np.int32),
            offsets=done(self.offsets, np.int64),
            targets=done(self.targets, np.float32 if self.real_targets else np.int32),
            weights=done(self.weights, np.float32),
            row=done(self.row, np.int64),
            token_type_ids=done(self.token_type_ids, np.int8) if len(self.token_type_ids) else None,
            target_offsets=done(self.target_offsets, np.int64) if self.apart else None,
            spans=done(self.spans, np.int32) if len(self.spans) else None,
            texts=done(self.texts, np.int32) if len(self.texts) else None,
        )


@dataclass
class Audit:
    """What tokenising did to the rows of a split.  Rows are indices into the split."""

    rows: int = 0
    features: int = 0
    tokens: int = 0
    supervised: int = 0  # tokens, or rows, that have a weight
    lengths: dict[str, int] = field(default_factory=dict)  # tokens of a feature: p50, p95, p99, max
    truncated_rows: int = 0
    truncated_tokens: int = 0  # lost by truncation
    dropped_rows: int = 0  # left out for their length
    unsupervised_rows: list[int] = field(default_factory=list)  # nothing in them is learned or measured
    untrained_answers: int = 0  # of chats: answers that the template shows differently once the chat goes on
    silent_words: int = 0  # that the tokenizer makes nothing of
    bad: list[tuple[int, str]] = field(default_factory=list)  # row and reason
    unknown_tokens: int | None = None  # none: the tokenizer has no token for the unknown
    text_tokens: int = 0  # tokens that are not special
    tokens_per_word: float | None = None  # text tokens a whitespace-separated word, of the rows not truncated
    characters_per_token: float | None = None

    @property
    def unknown_rate(self) -> float | None:
        return None if self.unknown_tokens is None or not self.text_tokens else self.unknown_tokens / self.text_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON values; lists of rows as their numbers."""
        counts = {"unsupervised_rows": len(self.unsupervised_rows), "bad": len(self.bad)}
        return asdict(self) | counts | {"unknown_rate": self.unknown_rate}


class Encoded(NamedTuple):
    """A split's features, and the account of them."""

    features: FeatureSet
    audit: Audit


def encode(
    rows: Sequence[Row],
    task: Task,
    tokenizer: Any,
    limits: Limits,
    *,
    split: str,
    on_bad_rows: str,
    note: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
    poll: Callable[[], None] = lambda: None,
) -> Encoded:
    """Tokenise rows, or take them from the cache.

    In the split `train`, a row in which nothing is supervised is a bad row.  `progress(done, total)`
    is told of rows; `poll` is called between rows and may raise to stop.  Raises DataError for bad rows
    where `on_bad_rows` is `error`.
    """
    training = split == "train"

    def load(path: Path) -> Encoded:
        features, audit = FeatureSet.load(path, isinstance(rows, Spool))
        return Encoded(features, Audit(**audit | {"bad": [(row, reason) for row, reason in audit["bad"]]}))

    def save(encoded: Encoded, path: Path) -> None:
        encoded.features.save(path, asdict(encoded.audit))

    encoded = cache.cached(
        _key(rows, task, tokenizer, limits, training),
        lambda: _tokenise(rows, task, tokenizer, limits, training, progress, poll),
        load,
        save,
        note,
        poll,
    )
    progress(len(rows), len(rows))
    report_bad([f"{rows[row].where}: {reason}" for row, reason in encoded.audit.bad], on_bad_rows, note)
    return encoded


def describe(split: str, audit: Audit, apart: bool = False) -> list[str]:
    """The account in lines for the log; those that ask for attention begin with WARNING.  `apart`: targets have a limit of their own."""
    lengths = ", ".join(f"{name} {value}" for name, value in audit.lengths.items())
    lines = [f"{split}: {audit.rows:,} rows, {audit.features:,} features, {audit.tokens:,} tokens, {audit.supervised:,} supervised; length {lengths}"]
    if audit.tokens_per_word is not None:
        lines.append(f"{split}: {audit.tokens_per_word:.2f} tokens a word, {audit.characters_per_token:.2f} characters a token")
    if audit.unknown_rate:
        warning = "WARNING " if audit.unknown_rate > 0.01 else ""
        lines.append(f"{warning}{split}: {audit.unknown_rate:.2%} of the tokens are unknown to the tokenizer")
    if cut := audit.truncated_rows + audit.dropped_rows:
        warning = "WARNING " if cut > 0.05 * audit.rows else ""
        lost = f"{audit.truncated_rows:,} truncated (losing {audit.truncated_tokens:,} tokens), {audit.dropped_rows:,} dropped"
        lines.append(
            f"{warning}{split}: {cut / audit.rows:.1%} of the rows are longer than data.max_length{' or task.max_target_length' if apart else ''}: {lost}"
        )
    if audit.unsupervised_rows:
        lines.append(f"WARNING {split}: in {len(audit.unsupervised_rows):,} rows nothing is supervised: they count for nothing")
    if audit.untrained_answers:
        lines.append(f"WARNING {split}: {audit.untrained_answers:,} answers are not learned, since the chat template shows them differently later on")
    if audit.silent_words:
        lines.append(f"WARNING {split}: {audit.silent_words:,} words are nothing to the tokenizer: what they are is neither learned nor measured")
    return lines


def _tokenise(
    rows: Sequence[Row], task: Task, tokenizer: Any, limits: Limits, training: bool, progress: Callable[[int, int], None], poll: Callable[[], None]
) -> Encoded:
    builder, audit = _Builder(isinstance(rows, Spool)), Audit(rows=len(rows))
    counts = _Counts(tokenizer)

    def usable() -> Iterator[tuple[int, list[Features]]]:
        """The features of each row that can be used, by its index."""
        for index, (row, features) in enumerate(zip(rows, outcomes(rows, task, tokenizer, limits, poll), strict=True)):
            if index % PROGRESS_ROWS == 0:
                progress(index, len(rows))
            if isinstance(features, str):
                audit.bad.append((index, features))
                continue
            lost = sum(each.truncated for each in features)
            audit.dropped_rows += not features
            audit.truncated_rows += lost > 0
            audit.truncated_tokens += lost
            if features and not any(weight for each in features for weight in each.weights):
                audit.unsupervised_rows.append(index)
                if training:  # measuring such a row does no harm; training on it is a mistake to be told
                    cut = f" ({lost} tokens of it are cut off: data.max_length is {limits.max_length})" if lost else ""
                    audit.bad.append((index, f"nothing in this row is learned{cut}"))
                    continue
            audit.untrained_answers += sum(each.untrained_answers for each in features)
            audit.silent_words += sum(each.silent_words for each in features)
            counts.add_row(row, features, whole=not lost)
            yield index, features

    for index, features in task.packed(usable(), tokenizer, limits) if hasattr(task, "packed") else usable():
        counts.add_features(features)
        builder.add(index, features)
    counts.tell(audit)
    return Encoded(builder.build(), audit)


class _Counts:
    """What is counted while features are made."""

    def __init__(self, tokenizer: Any) -> None:
        self.unknown = tokenizer.unk_token_id
        if self.unknown in {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id}:
            self.unknown = None  # byte-level vocabularies name some token as unknown and never need it
        self.special = set(tokenizer.all_special_ids) - {self.unknown}
        self.lengths: Counter[int] = Counter()
        self.supervised = self.text = self.unknowns = 0
        self.whole = self.words = self.characters = 0  # of rows that lost no token: text tokens, words, characters

    def add_features(self, features: list[Features]) -> None:
        for each in features:
            self.lengths[len(each.tokens)] += 1
            self.supervised += len(each.weights) - each.weights.count(0)

    def add_row(self, row: Row, features: list[Features], whole: bool) -> None:
        text = 0
        for each in features:
            tokens = each.tokens
            self.unknowns += tokens.count(self.unknown)
            text += sum(token not in self.special for token in tokens)
        self.text += text
        if features and whole:
            texts = [text for name, value in row.values.items() if name not in NOT_TEXT for text in _texts(value)]
            self.whole += text
            self.words += sum(len(text.split()) for text in texts)
            self.characters += sum(map(len, texts))

    def tell(self, audit: Audit) -> None:
        audit.features, audit.supervised = self.lengths.total(), self.supervised
        audit.tokens = sum(length * count for length, count in self.lengths.items())
        if not audit.features:
            return
        audit.lengths = {f"p{q}": _percentile(self.lengths, q) for q in (50, 95, 99)} | {"max": max(self.lengths)}
        audit.text_tokens = self.text
        if self.unknown is not None:
            audit.unknown_tokens = self.unknowns
        if self.words and self.whole:
            audit.tokens_per_word, audit.characters_per_token = self.whole / self.words, self.characters / self.whole


def _percentile(counts: Counter[int], q: int) -> int:
    """The number nearest to the place of the percentile, as numpy's `nearest`."""
    place = round((counts.total() - 1) * q / 100)
    ends = accumulate(count for _, count in sorted(counts.items()))
    return next(number for number, end in zip(sorted(counts), ends, strict=True) if place < end)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item.get("content") if isinstance(item, dict) else item)


# --- what the cached features depend on ---------------------------------------------------------


def _key(rows: Sequence[Row], task: Task, tokenizer: Any, limits: Limits, training: bool) -> str:
    assert isinstance(task, Spec), "a plugin class is its own spec"
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return cache.key_of(
        rows=content.hexdigest(),
        tokenizer=_tokenizer_digests(tokenizer),
        task=task.model_dump(mode="json"),
        limits=limits._asdict(),
        training=training,
        code=_code_digest(type(task)),
    )


def _tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    """The files that the tokenizer writes of itself, special tokens and chat template included, and what it does not write."""
    digests = {"class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}", "gives": " ".join(tokenizer.model_input_names)}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for path in sorted(Path(directory).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                if path.name in CALL_STATE:
                    settings = {name: value for name, value in json.loads(content).items() if name not in CALL_STATE[path.name]}
                    content = json.dumps(settings).encode()
                digests[path.name] = hashlib.sha256(content).hexdigest()
    return digests


def _code_digest(task: type) -> str:
    """The code that turns rows into features: ours, the task's own, and the libraries' versions."""
    import tokenizers
    import transformers

    package = Path(ftkit.__file__).parent
    task_file = inspect.getsourcefile(task)
    sources = {*(package / "data").glob("*.py"), *(package / "tasks").glob("*.py"), *([Path(task_file)] if task_file else [])}
    code = hashlib.sha256(f"{ftkit.__version__} {transformers.__version__} {tokenizers.__version__} {task.__qualname__}".encode())
    for source in sorted(sources):
        code.update(source.read_bytes())
    return code.hexdigest()
