"""Data sets on the hub: a local stand-in for success and each error, the real library for being offline."""

import errno
import os
import subprocess
import sys
import textwrap

import datasets
import pytest
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError, ExpectedMoreSplitsError

from ftkit.data import hub
from ftkit.data.rows import load_rows
from ftkit.errors import DataError, DiskError, HubError
from ftkit.recipe.spec import Data
from ftkit.tasks import Column, Shape

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Classify:
    kind = "classify"
    txt_row = "line"
    shapes = (Shape(Column("text", "a text"), Column("label", "its class")),)


@pytest.mark.parametrize("source", ["org/name", "org/name:config", "org/name@main", "a-b/c.d:20220301.en@refs/convert/parquet"])
def test_hub_ids(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id(source)


@pytest.mark.parametrize(
    "source",
    ["name", "data/train.csv", "data/train.jsonl.gz", "/org/name", "./org/name", "a/b/c", "org/name:", "here/file", "here/nothing", "long/" + "x" * 300],
)
def test_local_names(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    assert not hub.is_hub_id(source)
    monkeypatch.chdir("/")
    assert not hub.is_hub_id(source, base=tmp_path)


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Let `load_dataset` give these splits, and return the list of its calls."""

    def provide(**splits):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
        built = {}
        for name, rows in splits.items():
            datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / name)
            built[name] = datasets.load_from_disk(tmp_path / name)
        calls = []
        monkeypatch.setattr(hub, "_commit", lambda dataset: COMMIT)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or datasets.DatasetDict(built))
        return calls

    return provide


def rows(n, label=0, start=0):
    return [{"text": f"row {i}", "label": label} for i in range(start, start + n)]


def load(source="org/name", notes=None, **data):
    return load_rows(Data(train=source, **data), Classify, 1, (notes if notes is not None else []).append)


def test_splits_names_of_classes_and_the_commit(on_hub):
    notes = []
    calls = on_hub(train=[*rows(3, 1), {"text": "x", "label": 0}], validation=rows(2, 0, 10), test=rows(1, -1))
    loaded = load("org/name:config@v1", notes)
    assert calls == [(("org/name", "config"), {"revision": "v1"})]
    assert [row.values["label"] for row in loaded.train] == ["good", "good", "good", "bad"]
    assert loaded.train[3].where == "org/name:config@v1[train]:4"
    assert {name: len(split) for name, split in loaded.validation.items()} == {"validation": 2}
    assert loaded.test == []  # the labels of hub tests are often withheld: only data.test asks for it
    assert all(value.startswith(COMMIT) for value in loaded.sha256.values())
    assert f"org/name:config@v1: read at commit {COMMIT}" in notes


def test_columns_that_mean_nothing_are_not_converted(on_hub):
    on_hub(train=rows(2))
    data = hub.load("org/name", print)
    table = hub.table("org/name", "train", data, choose=lambda columns: columns[1:])
    assert (table.columns, table.records) == (["text", "label"], [(1, {"label": "bad"}), (2, {"label": "bad"})])


def test_validation_splits_by_other_names(on_hub):
    on_hub(train=rows(3), validation_matched=rows(1), validation_mismatched=rows(2))
    assert {name: len(split) for name, split in load().validation.items()} == {"validation_matched": 1, "validation_mismatched": 2}


def test_a_split_by_another_name_of_validation_is_that(on_hub):
    on_hub(train=rows(3), dev=rows(1))
    assert {name: len(split) for name, split in load().validation.items()} == {"validation": 1}
    on_hub(train=rows(3), dev=rows(1), validation=rows(2))
    assert {name: len(split) for name, split in load().validation.items()} == {"validation": 2}


def test_a_test_split_can_be_asked_for(on_hub):
    on_hub(train=rows(4), test=rows(2))
    loaded = load(validation=0.25, test="org/name")
    assert (len(loaded.train), len(loaded.validation["validation"]), len(loaded.test)) == (3, 1, 2)


def test_unlabelled_rows_are_bad_rows(on_hub):
    on_hub(train=[*rows(1, 1), *rows(1, -1)])
    with pytest.raises(DataError, match=r"org/name\[train\]:2: label is null"):
        load()


def test_another_commit_than_the_one_asked_for_is_refused(on_hub):
    on_hub(train=rows(1))
    with pytest.raises(HubError, match=f"holds revision {COMMIT} instead"):
        load("org/name@" + "f" * 40)


def test_the_commit_is_where_the_library_keeps_its_files():
    class Built:
        cache_files = ({"filename": f"/home/x/.cache/huggingface/datasets/org___name/default/0.0.0/{COMMIT}/name-train.arrow"},)

    assert hub._commit(Built) == COMMIT


def full_disk():
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("raised", "error", "code", "message"),
    [
        (ConnectionError("Couldn't reach 'org/name' on the Hub (LocalEntryNotFoundError)"), HubError, 8, "check the network, HF_HUB_OFFLINE"),
        (DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."), HubError, 8, "check the name; a private data set needs"),
        (
            DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."),
            HubError,
            8,
            "accept its terms on https://huggingface.co/datasets/org/name",
        ),
        (DataFilesNotFoundError("No (supported) data files found"), HubError, 8, "holds no data files"),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"),
            HubError,
            8,
            "Available: ['a', 'b'] What to do: write the data set as org/name:CONFIG",
        ),
        (RuntimeError("Dataset scripts are no longer supported, but found name.py"), HubError, 8, "org/name@refs/convert/parquet"),
        (DatasetGenerationError("An error occurred while generating the dataset"), DataError, 3, "its files cannot be read"),
        (ExpectedMoreSplitsError("{'test'}"), DataError, 3, "{'test'}"),
        (full_disk(), DiskError, 7, "HF_HOME names another place"),
    ],
)
def test_errors_of_the_library(monkeypatch, raised, error, code, message):
    def load_dataset(*args, **kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(error) as caught:
        load()
    assert caught.value.code == code
    assert str(caught.value).startswith("org/name: ")
    assert message in str(caught.value)


def test_defects_are_not_dressed_up(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RuntimeError, match="something else"):
        load()


def offline(code, home):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True).stdout


def test_offline_without_a_copy(tmp_path):
    said = offline(
        """
        from ftkit.data import hub
        from ftkit.errors import HubError
        try:
            hub.load("org/name", print)
        except HubError as error:
            print(error.code, error)
        """,
        tmp_path,
    )
    assert said.startswith("8 org/name: the hub cannot be reached, and the data set is not in its local cache")
    assert "HF_HUB_OFFLINE" in said


def test_offline_from_the_library_s_own_cache(tmp_path):
    """A data set that was once built stands in org___name/<config>/<version>/<commit>/."""
    said = offline(
        f"""
        import json, shutil
        from pathlib import Path
        import datasets
        from ftkit.data import hub
        from ftkit.errors import HubError

        home = Path({str(tmp_path)!r})
        (home / "d.jsonl").write_text('{{"text": "x", "label": 1}}\\n')
        built = datasets.load_dataset("json", data_files={{"train": str(home / "d.jsonl")}}, cache_dir=str(home / "built"))
        source = Path(built["train"].cache_files[0]["filename"]).parent
        target = home / "datasets" / "org___name" / "default" / "0.0.0" / "{COMMIT}"
        shutil.copytree(source, target)
        (target / "json-train.arrow").rename(target / "name-train.arrow")
        info = json.loads((target / "dataset_info.json").read_text())
        (target / "dataset_info.json").write_text(json.dumps(info | {{"config_name": "default", "dataset_name": "name"}}))

        data = hub.load("org/name", lambda note: None)
        print(data.revision, hub.table("org/name", "train", data).records)
        try:
            hub.load("org/name@" + "f" * 40, print)
        except HubError as error:
            print(error)
        """,
        tmp_path,
    )
    first, second = said.strip().splitlines()
    assert first == f"{COMMIT} [(1, {{'text': 'x', 'label': 1}})]"
    assert f"holds revision {COMMIT} instead" in second
