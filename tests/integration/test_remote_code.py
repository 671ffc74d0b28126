"""Models that bring Python code of their own: never run unasked, and carried through to the end where asked."""

import json
import shutil

import pytest

CODE = """
from transformers import DistilBertConfig, DistilBertForSequenceClassification


class OwnConfig(DistilBertConfig):
    model_type = "own"


class OwnClassifier(DistilBertForSequenceClassification):
    config_class = OwnConfig
    base_model_prefix = "distilbert"
"""


@pytest.fixture
def own(tmp_path, checkpoint, monkeypatch):
    """A directory whose config names classes in a file beside it."""
    directory = tmp_path / "own"
    shutil.copytree(checkpoint("distilbert"), directory)
    (directory / "own.py").write_text(CODE)
    config = json.loads((directory / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnClassifier"}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto_map}))
    return directory


def test_code_of_a_model_does_not_run_unasked(ftkit, recipe, own):
    outcome = ftkit("train", recipe({"name": str(own)}, "single"))
    assert outcome.code == 2
    assert "needs Python code from its repository" in outcome.err


@pytest.mark.parametrize("method", ["full", "lora"])
def test_code_that_is_trusted_is_used_to_the_end(ftkit, recipe, own, tmp_path, method):
    spec = {"name": str(own), "trust_remote_code": True, "revision": "0" * 40}
    path = recipe(spec, "single", {"steps": 1}, method=method)
    assert ftkit("check", path).code == 0
    outcome = ftkit("train", path)
    assert outcome.code == 0, outcome.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["architecture"] == "OwnClassifier"
    assert manifest["artifact"]["load_kwargs"]["trust_remote_code"] is True
    outcome = ftkit("predict", tmp_path / "run", "two old boats")
    assert outcome.code == 0, outcome.err
    if method == "lora":
        outcome = ftkit("merge-adapter", tmp_path / "run", "-o", tmp_path / "merged")
        assert outcome.code == 0, outcome.err
