"""A run that starts from an earlier run's adapter: on what that answered, and without needing it afterwards."""

import json
import shutil

import pytest
import torch
import yaml

import ftkit as package


@pytest.fixture
def first(ftkit, recipe, tmp_path, verify_here):
    """first(model, rows, method): the directory of a finished run."""

    def run(model, rows, method):
        path = recipe(model, rows, {"steps": 4, "learning_rate": 1e-2}, name="first.yaml", method=method, output=str(tmp_path / "first"))
        done = ftkit("train", path)
        assert done.code == 0, done.err
        return tmp_path / "first"

    return run


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("method", "then"),
    [("lora", "lora"), ("bitfit", "full"), ({"kind": "lora", "init": "pissa"}, "adapter"), ("ia3", "partial"), ({"kind": "bitfit", "bits": 4}, "lora")],
)
def test_it_starts_where_the_first_one_ended(method, then, first, ftkit, recipe, tmp_path):
    before = first("gpt2", "prompts", method)
    then = {"kind": "partial", "last": 1} if then == "partial" else then
    done = ftkit("train", recipe({"name": str(before)}, "prompts", {"steps": 2}, method=then))
    assert done.code == 0, done.err
    assert "with the adapter" in done.err
    run = tmp_path / "run"
    assert metrics(run)["base"]["validation"]["loss"] == pytest.approx(metrics(before)["validation"]["loss"], rel=1e-5)
    shutil.rmtree(before)
    model = package.load(run)
    assert torch.isfinite(model(input_ids=torch.arange(5, 20)[None]).logits).all()
    if then == "lora":
        assert (run / "model" / "base" / "config.json").exists()
        assert json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] in ("", None)


def test_a_classifier_goes_on_with_its_head(first, ftkit, recipe, tmp_path):
    before = first("bert", "single", "lora")
    done = ftkit("train", recipe({"name": str(before)}, "single", {"steps": 2}, method="lora"))
    assert done.code == 0, done.err
    assert metrics(tmp_path / "run")["base"]["validation"]["loss"] == pytest.approx(metrics(before)["validation"]["loss"], rel=1e-5)


@pytest.mark.parametrize("then", ["head", "bitfit", "lora"])
def test_a_model_that_was_saved_in_few_bits_is_a_base_too(then, first, ftkit, recipe, tmp_path):
    before = first("bert", "single", {"kind": "head", "bits": 4})
    done = ftkit("train", recipe({"name": str(before)}, "single", {"steps": 2}, method=then))
    assert done.code == 0, done.err
    assert metrics(tmp_path / "run")["base"]["validation"]["loss"] == pytest.approx(metrics(before)["validation"]["loss"], rel=1e-5)
    assert package.load(tmp_path / "run").is_quantized


def test_what_cannot_be_merged_is_refused(first, ftkit, recipe, tmp_path):
    before = first("gpt2", "prompts", "adapter")
    done = ftkit("check", recipe({"name": str(before)}, "prompts"))
    assert (done.code, "holds what cannot become part of its base's weights, so no run can start from it" in done.err) == (2, True)


def test_few_bits_and_its_own_place_are_refused(first, ftkit, recipe, tmp_path):
    before = first("gpt2", "prompts", "lora")
    done = ftkit("check", recipe({"name": str(before)}, "prompts", method="qlora"))
    assert (done.code, "merge it first: ftkit merge-adapter" in done.err) == (2, True)
    path = recipe({"name": str(before)}, "prompts", output=str(before))
    done = ftkit("train", path, "--overwrite")
    assert (done.code, "would write over" in done.err) == (2, True)
    assert yaml.safe_load((before / "recipe.yaml").read_text())["method"]["kind"] == "lora"
