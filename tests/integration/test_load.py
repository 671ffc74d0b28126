"""`ftkit.load`: any run in one line, and adapters that only ftkit loads beside the base that they were trained on."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ftkit as package
from ftkit.errors import RecipeError


@pytest.fixture
def train(ftkit, recipe, tmp_path, verify_here):
    """train(model, rows, method): the directory of a finished run on a base of its own."""

    def run(model, rows, method):
        shutil.copytree(json.loads(recipe(model, rows).read_text())["model"], tmp_path / "base")
        done = ftkit("train", recipe({"name": str(tmp_path / "base")}, rows, {"steps": 2}, method=method))
        assert done.code == 0, done.err
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("method", ["full", "lora", {"kind": "adapter", "reduction": 4}, "bitfit"])
def test_any_run_loads_in_one_line(method, train, tmp_path):
    run = train("gpt2", "prompts", method)
    ids = torch.arange(5, 20)[None]
    answers = []
    shutil.copytree(run / "model", tmp_path / "copied")
    own = (run / "model" / "adapter.json").exists()
    assert own == (method not in ("full", "lora"))
    for path in (run, run / "model", *([tmp_path / "copied"] if own else [])):
        model = package.load(path)
        assert isinstance(model.get_base_model() if method == "lora" else model, transformers.GPT2LMHeadModel)
        assert not model.training
        answers.append(model(input_ids=ids).logits)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=ids).logits
    assert all(torch.equal(answers[0], other) for other in answers)
    assert not torch.equal(answers[0], base)
    if own:
        assert (run / "model" / "adapter.safetensors").stat().st_size < (tmp_path / "base" / "model.safetensors").stat().st_size / 2


def test_another_base_is_refused(train, tmp_path, ftkit):
    run = train("bert", "single", {"kind": "adapter"})
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"][0, 0] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"base has changed, or is another model: it is not the base that .* was trained on"):
        package.load(run)
    done = ftkit("predict", run, "roses")
    assert (done.code, "is not the base that" in done.err) == (2, True)


def test_weights_that_were_cut_off_are_refused(train, tmp_path, ftkit):
    run = train("bert", "single", {"kind": "adapter"})
    base, adapter = tmp_path / "base" / "model.safetensors", run / "model" / "adapter.safetensors"
    for weights, message in ((base, r"base: a file of its weights is broken"), (adapter, r"adapter\.safetensors is broken")):
        weights.write_bytes(weights.read_bytes()[:-1])
        done = ftkit("predict", run, "roses")
        assert done.code == 7, done.err
        assert re.search(message, done.err)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="gone does not exist"):
        package.load(tmp_path / "gone")
    with pytest.raises(RecipeError, match="is no run directory, nor the model of one"):
        package.load(tmp_path)


def test_biases_are_merged_and_adapters_are_not(train, ftkit, tmp_path):
    run = train("gpt2", "prompts", "bitfit")
    done = ftkit("merge-adapter", run, "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    ids = torch.arange(5, 20)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(input_ids=ids).logits, package.load(run)(input_ids=ids).logits)


def test_adapters_are_not_merged_and_the_reason_is_said(train, ftkit, tmp_path):
    run = train("bert", "single", "adapter")
    done = ftkit("merge-adapter", run, "-o", tmp_path / "merged")
    assert done.code == 2
    assert "method adapter adds to its base and changes none of its weights" in done.err
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_shape_is_refused_before_merging(train, ftkit, tmp_path):
    run = train("gpt2", "prompts", "bitfit")
    tensors = load_file(run / "model" / "adapter.safetensors")
    name = next(iter(tensors))
    tensors[name] = torch.cat((tensors[name], tensors[name]))
    save_file(tensors, run / "model" / "adapter.safetensors", {"format": "pt"})
    done = ftkit("merge-adapter", run, "-o", tmp_path / "merged")
    assert (done.code, "does not belong to its base" in done.err) == (2, True)
