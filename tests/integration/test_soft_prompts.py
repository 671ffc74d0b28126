"""Prompts and prefixes from a recipe to answers, by the real command."""

import json
import shutil

import peft
import pytest
import torch
import transformers

import ftkit as package

METHODS = {
    "prompt": {"kind": "prompt", "num_virtual_tokens": 5},
    "p-tuning": {"kind": "p-tuning", "num_virtual_tokens": 5, "encoder": "lstm"},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 5, "prefix_projection": True},
}
CASES = [(kind, model, rows) for kind in METHODS for model, rows in (("distilbert", "single"), ("bert", "pairs"), ("llama", "chats"))]


@pytest.mark.parametrize(("kind", "model", "rows"), CASES)
def test_a_run_is_trained_measured_again_and_asked(kind, model, rows, ftkit, recipe, tmp_path, data):
    path = recipe(model, rows, {"steps": 6, "learning_rate": 1e-2}, method=METHODS[kind], eval={"generation": {"max_new_tokens": 4}})
    done = ftkit("train", path, "--json")
    assert done.code == 0, done.err
    run = tmp_path / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["artifact"]["loads_with"] == ("ftkit" if kind == "prefix" else "peft")
    assert manifest["verification"]["max_difference"] <= manifest["verification"]["tolerance"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["validation"]["loss"] != metrics["base"]["validation"]["loss"]
    again = json.loads(ftkit("eval", run, "--json").out)["metrics"]
    for split in ("validation", "test"):
        assert again[split]["loss"] == pytest.approx(metrics[split]["loss"], rel=1e-5)
    texts = ["roses", "two boats"] if rows == "pairs" else ["roses near the hedge"]
    said = ftkit("predict", run, *texts, "--json")
    assert said.code == 0, said.err
    merged = ftkit("merge-adapter", run, "-o", tmp_path / "merged")
    assert merged.code == 2
    assert "merge" in merged.err


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("model", "rows"), [("bert", "asked"), ("llama", "chats")])
def test_the_base_is_measured_without_what_has_not_learned(model, rows, kind, ftkit, recipe, tmp_path, verify_here):
    generation = {"metrics": ["rouge_l"], "generation": {"max_new_tokens": 4, "samples": 2}} if rows == "chats" else {}
    plain = json.loads(ftkit("eval", recipe(model, rows, method="full", eval=generation), "--json").out)["metrics"]["base"]
    path = recipe(model, rows, {"steps": 1, "layout": "padded"}, method=METHODS[kind], eval=generation)
    base = json.loads(ftkit("eval", path, "--json").out)["metrics"]["base"]
    done = ftkit("train", path, "--json")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for split in ("validation", "test"):
        assert base[split] == pytest.approx(plain[split], rel=1e-5)
        assert metrics["base"][split]["loss"] == pytest.approx(plain[split]["loss"], rel=1e-5)
        assert metrics[split]["loss"] != pytest.approx(plain[split]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "model", "asked", "measured"),
    [
        ("tagged", "bert", "tags", "predictions"),
        ("labelled", "bert", "labels", "predictions"),
        ("asked", "bert", "text", "text"),
        ("alike", "distilbert", "similarity", "similarity"),
    ],
)
def test_what_is_said_of_tokens_is_not_that_of_virtual_ones(rows, model, asked, measured, ftkit, recipe, data, tmp_path, verify_here):
    assert ftkit("train", recipe(model, rows, {"steps": 2}, method=METHODS["prompt"])).code == 0
    done = ftkit("predict", tmp_path / "run", "--file", getattr(data, rows) / "test.jsonl")
    assert done.code == 0, done.err
    said = [json.loads(line)[asked] for line in done.out.splitlines()]
    kept = [json.loads(line)[measured] for line in (tmp_path / "run" / "predictions" / "test.jsonl").open()]
    assert said == (pytest.approx(kept, abs=1e-5) if rows == "alike" else kept)


@pytest.mark.parametrize("layout", ["flat", "bucketed", "padded"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_layouts_train_alike(kind, layout, ftkit, recipe, tmp_path, checkpoint, verify_here):
    losses, still = {}, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = {"name": checkpoint("bert"), "config": still}
    for each in ("padded", layout):
        done = ftkit("train", recipe(model, "single", {"layout": each, "steps": 4, "batch_size": 32}, method=METHODS[kind]), "--overwrite")
        assert done.code == 0, done.err
        losses[each] = json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]["loss"]
    assert losses[layout] == pytest.approx(losses["padded"], rel=1e-4)


def test_it_says_alone_what_it_says_of_a_file(ftkit, recipe, tmp_path, verify_here):
    """PEFT puts the prompt before padding on the left, and leaves positions to the model: answers would depend on the rows beside."""
    assert ftkit("train", recipe("gpt2", "prompts", method=METHODS["prompt"], eval={"generation": {"max_new_tokens": 5}})).code == 0
    questions = ["where are roses? ", "where are boats and anchors under the old lamps of our harbour? "]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    together = json.loads(ftkit("predict", tmp_path / "run", "--file", tmp_path / "rows.jsonl", "--json").out)
    alone = [json.loads(ftkit("predict", tmp_path / "run", question, "--json").out) for question in questions]
    assert [each["text"] for each in together] == [each["text"] for (each,) in alone]


def test_plain_peft_loads_a_prompt(ftkit, recipe, tmp_path, checkpoint, verify_here):
    assert ftkit("train", recipe("llama", "chats", method=METHODS["prompt"])).code == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    ids = torch.arange(5, 20)[None]
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model")(input_ids=ids).logits
    assert torch.equal(package.load(tmp_path / "run")(input_ids=ids).logits, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", METHODS)
def test_half_precision_gives_back_what_it_saved(kind, dtype, ftkit, recipe, tmp_path, checkpoint, verify_here):
    model = {"name": checkpoint("llama"), "dtype": dtype}
    done = ftkit("train", recipe(model, "chats", {"precision": "bf16"}, method=METHODS[kind]))
    assert done.code == 0, done.err
    copied = shutil.copytree(tmp_path / "run" / "model", tmp_path / "copied")
    ids = torch.arange(5, 20)[None]
    there, here = package.load(copied)(input_ids=ids).logits, package.load(tmp_path / "run")(input_ids=ids).logits
    assert (there.float() - here.float()).abs().max() <= 2e-2 * here.float().abs().max()  # PEFT's format does not say which type it was trained in
    again = ftkit("train", recipe({"name": str(tmp_path / "run")}, "chats", name="again.yaml", output=str(tmp_path / "again")))
    assert (again.code, "holds what cannot become part of its base's weights, so no run can start from it" in again.err) == (2, True)


@pytest.mark.parametrize("kind", ["p-tuning", "prefix"])
def test_a_run_goes_on_where_it_was(kind, ftkit, recipe, tmp_path, verify_here):
    path = recipe("llama", "text", {"steps": 6}, method=METHODS[kind])
    assert ftkit("train", path).code == 0
    whole = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if step.name == "step-6":
            for file in step.iterdir():
                file.unlink()
            step.rmdir()
    done = ftkit("train", path, "--resume")
    assert (done.code, "continuing from" in done.err) == (0, True), done.err
    kept = ("step", "loss", "grad_norm")
    again = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [[json.loads(line).get(key) for key in kept] for line in again] == [[json.loads(line).get(key) for key in kept] for line in whole]
