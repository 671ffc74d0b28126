"""Rows and arrays on disk: what they give back, what they leave behind, and what happens when the disk is full."""

import errno
import gzip
import json
import os
import resource
from datetime import datetime
from decimal import Decimal

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ftkit.data import ondisk
from ftkit.data import rows as rows_of_data
from ftkit.data.features import FeatureSet
from ftkit.data.ondisk import Growing, Records, Spool, Stored
from ftkit.data.rows import load_rows, load_split
from ftkit.errors import DataError, DiskError, RecipeError
from ftkit.recipe.spec import Data
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.question_answering import QuestionAnswering
from ftkit.tasks.seq2seq import Seq2Seq
from ftkit.tasks.text_classification import TextClassification


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_spool_gives_back_what_was_put_in(monkeypatch):
    monkeypatch.setattr(ondisk, "BLOCK", 3)
    monkeypatch.setattr(ondisk, "BUFFER", 4)
    items = [{"text": "ü" * i, "n": [i, None, 0.5]} for i in range(11)]
    spool = Spool(dict, dict)
    assert (len(spool), list(spool), spool[:5]) == (0, [], [])
    for number, item in enumerate(items):
        spool.append(item)
        assert spool[number] == item  # read while it grows
    assert list(spool) == items
    assert (spool[2:9], spool[-1], spool[8:100]) == (items[2:9], items[-1], items[8:])
    with pytest.raises(IndexError):
        spool[11]
    spool.append({"a": b"bytes"})
    assert spool[11] == {"a": {"bytes": None}}


def test_spools_behind_each_other_share_their_files_and_long_items_are_read_apart(monkeypatch):
    monkeypatch.setattr(ondisk, "BLOCK_BYTES", 10)
    opened = psutil.Process().num_fds()
    spools = [Spool(str, str)]
    for number in range(50):
        spools.append(spools[-1].behind())
        for text in ("a" * number, "b", "c" * 30):
            spools[-1].append(text)
    for number, spool in enumerate(spools[1:]):
        assert list(spool) == ["a" * number, "b", "c" * 30]
        assert (len(spool), spool[1], spool[1:]) == (3, "b", ["b", "c" * 30])
    assert psutil.Process().num_fds() == opened + 2
    with pytest.raises(AssertionError):
        spools[1].append("d")


@pytest.mark.parametrize("typecode", ["i", "q", "d", "f", "b"])
def test_an_array_on_disk_is_read_as_one_in_memory(typecode, monkeypatch):
    monkeypatch.setattr(ondisk, "BUFFER", 7)
    growing, values = Growing(typecode), []
    for part in ([1, 2, 3], [], list(range(50)), [-9]):
        growing.extend(part)
        values += part
    assert len(growing) == len(values)
    for dtype in (growing._waiting.typecode, np.float32):
        stored, expected = growing.stored(dtype), np.array(values).astype(dtype)
        assert (stored.dtype, len(stored)) == (expected.dtype, len(expected))
        assert stored[:].tolist() == expected.tolist()
        assert stored[3:10].tolist() == expected[3:10].tolist()
        assert stored[10:10].tolist() == []
        assert (stored[0], stored[-1], stored[np.int64(5)]) == (expected[0], expected[-1], expected[5])
        assert np.concatenate(list(stored.blocks(8))).tolist() == expected.tolist()


def test_stored_arrays_are_a_file_of_safetensors(tmp_path):
    growing = {"ids": Growing("i"), "weights": Growing("f"), "empty": Growing("b"), "offsets": Growing("q")}
    growing["ids"].extend([1, 2, 3])
    growing["weights"].extend([0.5])
    growing["offsets"].extend([0, 2**40])
    dtypes = {"ids": np.int32, "weights": np.float32, "empty": np.int8, "offsets": np.int64}
    path = tmp_path / "set.safetensors"
    ondisk.save({name: each.stored(dtypes[name]) for name, each in growing.items()}, path, {"note": "ä"})
    assert {name: (value.tolist(), value.dtype) for name, value in load_file(path).items()} == {
        "ids": ([1, 2, 3], np.int32),
        "weights": ([0.5], np.float32),
        "empty": ([], np.int8),
        "offsets": ([0, 2**40], np.int64),
    }
    arrays, metadata = ondisk.load(path)
    path.unlink()
    assert {name: each[:].tolist() for name, each in arrays.items()} == {"ids": [1, 2, 3], "weights": [0.5], "empty": [], "offsets": [0, 2**40]}
    assert metadata == {"note": "ä"}


def test_files_have_no_name_and_a_full_disk_is_told(place, monkeypatch):
    spool = Spool(int, int)
    for number in range(10):
        spool.append(number)
    assert spool[9] == 9
    assert [path for path in place.rglob("*") if path.is_file()] == []
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(DiskError, match=r"Input/output error; rows, tokens and predictions lie there, FTKIT_CACHE"):
        spool[0]


def both(data, task):
    """The rows of a recipe in memory, and of the same with streaming, and what was noted of each."""
    found = []
    for streaming in (False, True):
        notes = []
        found.append((load_rows(Data(**data, streaming=streaming), task, 3, notes.append), notes))
    (memory, told), (disk, told_too) = found
    assert isinstance(disk.train, Spool)
    assert told == told_too
    for name in ("sha256", "columns", "bad"):
        assert getattr(memory, name) == getattr(disk, name), name
    assert memory.validation == {name: list(rows) for name, rows in disk.validation.items()}
    assert memory.test == list(disk.test)
    assert memory.train == list(disk.train)
    assert memory.pool == list(disk.pool)
    return disk


def test_rows_are_the_same_in_memory_and_on_disk(data, tmp_path):
    train = data.single / "train.csv"
    both({"train": str(train), "validation": 0.25, "limit": 10, "test": str(data.single / "test.csv")}, TextClassification())
    both({"train": str(data.chats)}, CausalLM())
    lines = train.read_text().splitlines()
    (tmp_path / "bad.csv").write_text("\n".join([*lines, ",garden", "one,two,three"]) + "\n")
    assert len(both({"train": str(tmp_path / "bad.csv"), "on_bad_rows": "skip"}, TextClassification()).bad) == 2
    with gzip.open(tmp_path / "quotes.tsv.gz", "wt") as file:  # read twice, since its quotes mean nothing
        file.write('text\tlabel\n"one\tgarden\ntwo"\tkitchen\n')
    both({"train": str(tmp_path / "quotes.tsv.gz")}, TextClassification())


def test_times_and_decimals_are_text_in_memory_and_on_disk(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    when = datetime(2020, 1, 2, 3, 4, 5)
    chats = [[{"role": "user", "content": "one", "at": when}, {"role": "assistant", "content": "two", "at": when}]]
    parquet.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    assert both({"train": str(tmp_path / "chats.parquet")}, CausalLM()).train[0].values["messages"][0]["at"] == str(when)
    table = pa.table({"text": ["one", "two"], "label": [Decimal("1.50"), Decimal("2.00")]})
    parquet.write_table(table, tmp_path / "labels.parquet")
    assert [row.values["label"] for row in both({"train": str(tmp_path / "labels.parquet")}, TextClassification()).train] == ["1.50", "2.00"]


def test_many_files_are_one_set(data, tmp_path):
    directory = tmp_path / "shards"
    directory.mkdir()
    lines = (data.single / "train.csv").read_text().splitlines()
    for number, line in enumerate(lines[1:]):
        (directory / f"train-{number:05}.csv").write_text(f"{lines[0]}\n{line}\n")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 16, before[1]))
    try:
        rows = both({"train": str(directory)}, TextClassification())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(rows.train) == len(lines) - 1


def test_values_that_no_text_can_be_are_bad_rows_on_disk_too(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": [b"one", b"two"], "label": ["a", "b"]}), tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match="text must be text"):
        load_rows(Data(train=str(tmp_path / "bytes.parquet"), streaming=True), TextClassification(), 3, lambda text: None)


@pytest.mark.parametrize(
    ("name", "content", "advice"), [("rows.json", json.dumps([{"text": "one"}]), "write it as jsonl"), ("book.txt", "one", "data.format: lines")]
)
def test_files_that_are_read_as_a_whole_are_refused(name, content, advice, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=advice):
        load_rows(Data(train=str(tmp_path / name), streaming=True), CausalLM(), 3, lambda text: None)


@pytest.mark.parametrize(
    ("name", "task", "tokenizer"),
    [("single", TextClassification(), "wordpiece"), ("asked", QuestionAnswering(), "wordpiece"), ("rewritten", Seq2Seq(), "bpe")],
)
def test_the_features_that_are_kept_and_the_kept_ones_read_again_are_on_disk(name, task, tokenizer, data, tokenizers, place, monkeypatch):
    from ftkit.data import features
    from ftkit.data.features import encode
    from ftkit.data.types import Limits

    file = next(getattr(data, name).glob("train.*"))
    rows = load_rows(Data(train=str(file), streaming=True), task, 3, lambda text: None).train
    task = task.resolve(rows)

    def encoded(these):
        return encode(these, task, tokenizers[tokenizer], Limits(96, "right"), split="train", on_bad_rows="error", note=lambda text: None)

    first = encoded(rows)
    monkeypatch.setattr(features, "_tokenise", None)  # from now on from the cache
    second, memory = encoded(rows), encoded(list(rows))
    assert first.audit == second.audit == memory.audit
    assert (memory.features.target_offsets is None) == (task.kind != "seq2seq")
    for name in FeatureSet.__dataclass_fields__:
        values = [getattr(each.features, name) for each in (first, second, memory)]
        if values == [None, None, None]:
            continue
        assert [type(value) for value in values] == [Stored, Stored, np.ndarray]
        assert values[0][:].tolist() == values[1][:].tolist() == values[2].tolist()
        assert values[0].dtype == values[1].dtype == values[2].dtype
    assert first.features.lengths.tolist() == memory.features.lengths.tolist()
    assert list(first.features.rows()) == list(memory.features.rows()) == list(range(32))


def test_records_come_in_the_order_of_features_from_memory_and_from_disk(monkeypatch, place):
    monkeypatch.setattr(Records, "FEW", 4)
    given = [{"feature": feature, "said": [f"ü{feature}", 0.1 * feature, None]} for feature in (5, 2, 9, 0, 7, 1)]
    few, many = Records(), Records()
    few.extend(given[:4])
    assert not place.exists()
    many.extend(given[:3])
    many.extend(given[3:])
    assert (len(few), len(many)) == (4, 6)
    assert list(few) == sorted(given[:4], key=lambda record: record["feature"])
    assert list(many) == list(many) == sorted(given, key=lambda record: record["feature"])


@pytest.mark.parametrize("ending", ["csv", "json"])
@pytest.mark.parametrize("large", [False, True])
def test_rows_to_be_measured_are_on_disk_where_their_file_is_large(large, ending, tmp_path, monkeypatch):
    """Of a json file, which is read as a whole, too."""
    path = tmp_path / f"rows.{ending}"
    rows = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(50)]
    whole = json.dumps(rows) if ending == "json" else "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    path.write_text(whole, encoding="utf-8")
    if large:
        monkeypatch.setattr(rows_of_data, "SMALL", 100)
    task = TextClassification(labels=["a", "b"])
    found = load_split(str(path), None, Data(train=str(path), columns={"text": "text", "label": "label"}), task, lambda text: None)
    assert isinstance(found, Spool) == large
    assert [row.values["text"] for row in found] == [f"word {i}" for i in range(50)]
    assert found[49].where == f"{path}:50"


def test_all_sets_of_a_streamed_run_are_on_disk(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{name} {i},{'ab'[i % 2]}\n" for i in range(20)), encoding="utf-8")
    data = Data(train=str(tmp_path / "train.csv"), validation={"dev": str(tmp_path / "dev.csv")}, test=str(tmp_path / "test.csv"), streaming=True)
    rows = load_rows(data, TextClassification(), 0, lambda text: None)
    assert all(isinstance(each, Spool) for each in (rows.train, rows.validation["dev"], rows.test))
    assert [row.values["text"] for row in rows.test] == [f"test {i}" for i in range(20)]
    rows = load_rows(data.model_copy(update={"validation": 0.25, "test": None}), TextClassification(), 0, lambda text: None)
    assert (len(rows.train), len(rows.validation["validation"])) == (15, 5)
    assert isinstance(rows.validation["validation"], Spool)
