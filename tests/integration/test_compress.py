"""`ftkit compress`: the real command on tiny runs."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import transformers

pytestmark = pytest.mark.usefixtures("verify_here")


@pytest.fixture
def trained(ftkit, recipe, tmp_path):
    """trained("bert", "single"): the directory of a finished run."""

    def run(model, rows, **sections):
        assert ftkit("train", recipe(model, rows, **sections)).code == 0
        return tmp_path / "run"

    return run


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_an_encoder_loses_units_and_computes_in_8_bits(ftkit, trained, tmp_path):
    run, small = trained("bert", "single", train={"steps": 30}), tmp_path / "small"
    done = ftkit("compress", run, "-o", small, "--feed-forward", "0.5", "--int8", "train.steps=6", "--json")
    assert done.code == 0, done.err
    model = transformers.AutoModelForSequenceClassification.from_pretrained(small / "model")
    assert model.config.intermediate_size == 32
    assert model.bert.encoder.layer[1].output.dense.weight.shape == (32, 32)
    summary = json.loads(done.out)
    assert summary == read(small / "compression.json")
    before, pruned, int8 = summary["models"]
    assert pruned["parameters"] == before["parameters"] - 2 * 32 * (32 + 32 + 1)  # two layers, both matrices, a bias
    assert pruned["bytes_on_disk"] < before["bytes_on_disk"]
    assert int8["bytes_loaded"] < pruned["bytes_loaded"] == pruned["parameters"] * 4
    assert (before["metric"], before["score"], before["kept"]) == ("accuracy", read(run / "metrics.json")["validation"]["accuracy"], 1)
    assert pruned["score"] == read(small / "metrics.json")["validation"]["accuracy"]
    assert int8["score"] == read(small / "eval" / "validation" / "metrics.json")["validation"]["accuracy"]
    assert summary["int8"]["agreement"] >= 0.9
    manifest = read(small / "manifest.json")
    assert (manifest["status"], manifest["artifact"]["quantise"], manifest["artifact"]["loads_with"]) == ("finished", "int8", "transformers")
    said = ftkit("predict", small, "roses near the hedge")
    assert (said.code, "label" in said.out) == (0, True)


def test_a_decoder_loses_heads_and_units(ftkit, trained, tmp_path, tokenizers):
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, intermediate_size=64, vocab_size=len(tokenizers["bpe"])
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizers["bpe"].save_pretrained(tmp_path / "llama")
    run, small = trained({"name": str(tmp_path / "llama")}, "prompts"), tmp_path / "small"
    done = ftkit("compress", run, "-o", small, "--heads", "0.5", "--feed-forward", "0.25")
    assert done.code == 0, done.err
    smaller = transformers.AutoModelForCausalLM.from_pretrained(small / "model")
    found = smaller.config
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim, found.intermediate_size) == (4, 2, 4, 48)
    assert smaller.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert read(small / "metrics.json")["base"]["validation"]["loss"] != read(run / "metrics.json")["validation"]["loss"]
    assert "kept" in done.out
    assert str(small) in done.out


@pytest.mark.parametrize(
    ("model", "rows", "metric"), [("bert", "matched", "mrr_10"), ("bert", "asked", "f1"), ("t5", "rewritten", "loss"), ("gpt2", "text", "loss")]
)
def test_other_tasks(ftkit, trained, tmp_path, model, rows, metric):
    run, small = trained(model, rows), tmp_path / "small"
    done = ftkit("compress", run, "-o", small, "--feed-forward", "0.5", "--int8", "train.steps=2")
    assert done.code == 0, done.err
    before, pruned, int8 = read(small / "compression.json")["models"]
    assert before["parameters"] > pruned["parameters"]
    assert pruned["bytes_loaded"] > int8["bytes_loaded"]
    assert all((row["metric"], row["score"] is None) == (metric, False) for row in (before, pruned, int8))
    assert "\u2026" not in done.out  # nothing is cut off


def test_8_bits_alone_change_no_weight(ftkit, trained, tmp_path):
    run, small = trained("bert", "single", train={"steps": 30}), tmp_path / "small"
    done = ftkit("compress", run, "-o", small, "--int8", "--json")
    assert done.code == 0, done.err
    assert [row["model"] for row in json.loads(done.out)["models"]] == ["before", "int8"]
    assert "ftkit.load" in (small / "README.md").read_text(encoding="utf-8")
    for path in (run / "model").iterdir():
        assert (small / "model" / path.name).read_bytes() == path.read_bytes()
    again = ftkit("compress", small, "-o", tmp_path / "smaller", "--int8")
    assert (again.code, "already" in again.err) == (2, True)


def test_one_that_was_stopped_goes_on(ftkit, trained, tmp_path, monkeypatch):
    run, small = trained("bert", "single"), tmp_path / "small"
    asked = ("compress", run, "-o", small, "--feed-forward", "0.5")
    with monkeypatch.context() as patch:
        patch.setattr("ftkit.run.train", lambda *_, **__: 1 / 0)
        assert ftkit(*asked).code == 1
    assert ftkit(*asked).code == 2
    other = ftkit("compress", run, "-o", small, "--feed-forward", "0.25", "--resume")
    assert (other.code, "give the same again" in other.err) == (2, True)
    monkeypatch.setattr("ftkit.compress._chosen", lambda *_: 1 / 0)  # what is pruned already is not pruned again
    assert ftkit(*asked, "--resume").code == 0
    assert read(small / "manifest.json")["status"] == "finished"
    itself = ftkit("compress", run, "-o", run, "--int8", "--overwrite")
    assert (itself.code, "the run itself" in itself.err) == (2, True)
    shutil.copytree(run, tmp_path / "other")
    other = ftkit("compress", run, "-o", tmp_path / "other", "--int8", "--resume")
    assert (other.code, "not begun by" in other.err) == (2, True)
    assert ftkit("compress", run, "-o", small, "--int8", "--overwrite").code == 0
    assert [path.name for path in (small / "start").iterdir()] == ["compress.json"]
    assert (run / "model" / "config.json").is_file()


MISTAKES = [
    ([], "nothing to do"),
    (["--heads", "1"], "--heads: 1 is no share"),
    (["--feed-forward", "-0.5"], "--feed-forward: -0.5 is no share"),
    (["--feed-forward", "nan"], "--feed-forward: nan is no share"),
    (["--feed-forward", "0.001"], "0.001 of 64 leaves 64"),
    (["--feed-forward", "0.999"], "0.999 of 64 leaves 0"),
    (["--heads", "0.5"], "leave --heads out"),
    (["--int8", "train.steps=1"], "nothing is fine-tuned"),
    (["--feed-forward", "0.5", "output=elsewhere"], "output=elsewhere: "),
]


def test_what_cannot_go(ftkit, trained, tmp_path):
    run = trained("bert", "single")
    for options, message in MISTAKES:
        done = ftkit("compress", run, "-o", tmp_path / "small", *options)
        assert (done.code, message in done.err) == (2, True), done.err
        assert not (tmp_path / "small").exists()


def test_what_answers_otherwise_fails(ftkit, trained, tmp_path, monkeypatch):
    run = trained("bert", "single")
    with monkeypatch.context() as patch:
        patch.setattr("ftkit.prune.zeroed", lambda *_: nullcontext())  # the whole model, which the pruned one is not
        done = ftkit("compress", run, "-o", tmp_path / "small", "--feed-forward", "0.5")
        assert (done.code, "at zero" in done.err) == (9, True)
    monkeypatch.setattr("ftkit.compress.AGREEMENT", 1.1)
    done = ftkit("compress", run, "-o", tmp_path / "smaller", "--int8")
    assert (done.code, "leave --int8 out" in done.err) == (9, True)
    assert "quantise" not in read(tmp_path / "smaller" / "manifest.json")["artifact"]


def test_runs_that_cannot_be_compressed(ftkit, trained, tmp_path):
    assert "not a run directory" in ftkit("compress", tmp_path, "-o", tmp_path / "small", "--int8").err
    run = trained("bert", "single", method="lora")
    done = ftkit("compress", run, "-o", tmp_path / "small", "--int8")
    assert (done.code, "merge-adapter" in done.err) == (2, True)
    shutil.rmtree(run)
    run = trained("gpt2", "prompts")
    done = ftkit("compress", run, "-o", tmp_path / "small", "--heads", "0.5")
    assert (done.code, "cannot be told" in done.err) == (2, True)
    shutil.rmtree(run)
    run = trained("bert", "premises")
    done = ftkit("compress", run, "-o", tmp_path / "small", "--feed-forward", "0.5")
    assert (done.code, "would start anew" in done.err) == (2, True)
