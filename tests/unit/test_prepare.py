"""What stands between a recipe and its features: tokenizer, lengths, labels, metrics."""

import json
import shutil
import sys

import pytest
from transformers import AutoTokenizer

from ftkit.errors import DataError, RecipeError
from ftkit.prepare import prepare, tokenizer_texts
from ftkit.recipe import read
from ftkit.recipe.spec import TrainedTokenizer
from ftkit.report import Reporter


@pytest.fixture
def prepared(recipe):
    """prepared("bert", "single", data={...}): what becomes of a recipe."""

    def run(*arguments, overrides=(), **sections):
        return prepare(read(recipe(*arguments, **sections), overrides), Reporter(None, quiet=True))

    return run


def test_pairs_have_types_for_models_that_embed_them_whatever_was_prepared_before(prepared, checkpoint, tmp_path):
    """BERT's own tokenizer, which names its inputs in its class and not in its files."""

    def pairs(architecture):
        directory = shutil.copytree(checkpoint(architecture), tmp_path / architecture, dirs_exist_ok=True)
        path = directory / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"tokenizer_class": "BertTokenizer"}
        path.write_text(json.dumps({name: value for name, value in settings.items() if name != "model_input_names"}))
        return prepared({"name": str(directory)}, "pairs")

    without, with_types = pairs("distilbert"), pairs("bert")
    assert without.train.token_type_ids is None
    assert with_types.train.token_type_ids.max() == 1
    assert pairs("distilbert").train.token_type_ids is None
    without.tokenizer.save_pretrained(tmp_path / "saved")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "saved")("roses", "bread")


@pytest.fixture
def rare(data, tmp_path):
    """A training file with one label that a sample is not likely to hold."""
    path = tmp_path / "rare.csv"
    path.write_text((data.single / "train.csv").read_text() + "an elk,forest\n")
    return str(path)


@pytest.mark.parametrize("sampled", [{"limit": 2}, {"limit": 8, "validation": 0.9}])
def test_a_sample_of_the_rows_has_the_labels_of_all(prepared, data, rare, sampled):
    validation = str(data.single / "validation.csv")
    done = prepared("bert", "single", data={"train": rare, "validation": validation} | sampled)
    assert len(done.train) < 10
    assert done.recipe.task.labels == ["forest", "garden", "harbour", "kitchen"]
    assert all(len(rows) == len(features) for rows, features in done.splits.values())
    assert done.rows.pool is done.rows.train, "what was left out takes no memory"


def test_labels_are_in_the_order_of_a_stored_head(recipe, checkpoint, tmp_path):
    """Else that head would say one class where it has learned another."""
    stored = ["kitchen", "garden", "harbour"]
    directory = shutil.copytree(checkpoint("bert"), tmp_path / "stored")
    config = json.loads((directory / "config.json").read_text())

    def labels(named, task="text-classification"):
        (directory / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(named))}))
        report = Reporter(None, quiet=True)
        return prepare(read(recipe({"name": str(directory)}, "single", task=task)), report).recipe.task.labels, report.notes

    found, notes = labels(stored)
    assert found == stored
    assert any("labels: kitchen, garden, harbour, in the order of the head" in note for note in notes)
    assert labels(["KITCHEN", "Garden", "harbour"])[0] == stored, "as they are spelled in the rows"
    assert labels(["kitchen", "garden", "sea"])[0] == sorted(stored), "another head's labels"
    assert labels(stored, {"kind": "text-classification", "labels": stored})[0] == stored


def test_metrics_depend_on_the_labels(prepared):
    with pytest.raises(RecipeError, match=r"eval\.metrics: 'f1_binary' is not a metric .* on these rows; there are accuracy, f1, auroc, mcc, ece, loss"):
        prepared("bert", "single", eval={"metrics": ["f1_binary"]})
    prepared("bert", "pairs", eval={"metrics": ["f1_binary"]})


@pytest.fixture
def reserved(checkpoint, tmp_path):
    """A model of 96 positions whose tokenizer is made for 48 tokens, as those of sentence encoders are."""
    directory = shutil.copytree(checkpoint("bert"), tmp_path / "reserved")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 48}))
    return {"name": str(directory)}


def test_the_tokenizer_bounds_only_the_default_length(prepared, reserved):
    assert prepared(reserved, "single").limits.max_length == 48
    assert prepared(reserved, "single", overrides=["data.max_length=96"]).limits.max_length == 96
    with pytest.raises(RecipeError, match=r"data\.max_length: 97, but the model has 96 positions"):
        prepared(reserved, "single", overrides=["data.max_length=97"])


def test_a_length_that_was_lowered_says_by_what(recipe, reserved):
    tokenizers = "48, which the tokenizer is made for; more are possible, up to the 96 positions of the model"
    for model, words in ((reserved, tokenizers), ("bert", "96, the positions of the model")):
        report = Reporter(None, quiet=True)
        prepare(read(recipe(model, "single")), report)
        assert any(note.startswith(f"data.max_length: {words}") for note in report.notes)


def test_texts_for_a_tokenizer_are_files_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.md").write_bytes(b"ros\xe9s")
    (tmp_path / "c.parquet").touch()

    def texts(*names, **arguments):
        return list(tokenizer_texts(TrainedTokenizer(train=[str(tmp_path / name) for name in names]), None, **arguments))

    assert texts("a.txt", "a.txt") == ["one\ntwo\n"] * 2
    with pytest.raises(DataError, match=r"b\.md: not UTF-8: byte 0xe9 at byte offset 3"):
        texts("a.txt", "b.md")
    with pytest.raises(DataError, match=r"c\.parquet is a parquet file, and a tokenizer is trained on plain text"):
        texts("c.parquet")
    with pytest.raises(DataError, match=r"there is no file .*d\.txt"):
        texts("d.txt")

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        texts("a.txt", poll=stop)


@pytest.mark.parametrize("place", ["_lines", "rows", "tokenizer_texts"])
def test_a_signal_is_heard_while_rows_are_read_and_a_tokenizer_is_trained(recipe, monkeypatch, place):
    """Asked for often enough, a stop comes up in each of the functions that may take long."""
    made = recipe({"init": "random", "tokenizer": {"train": "data", "vocab_size": 300}, "config": {"model_type": "llama"}}, "text")

    def poll():
        if sys._getframe(1).f_code.co_name == place:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(read(made), Reporter(None, quiet=True), poll)
