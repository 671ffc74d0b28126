"""`ftkit eval`, `predict`, `check` and `show` after a real, tiny run."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, checkpoint, data):
    """make_run(name): the directory of a finished run, trained once for all tests."""
    from accelerate.state import AcceleratorState

    from ftkit.run import train

    kinds = {
        "single": {"model": checkpoint("bert"), "task": "text-classification", "data": files(data.single, "csv"), "method": "full"},
        "pairs": {"model": checkpoint("bert"), "task": "text-classification", "data": files(data.pairs, "csv"), "method": "lora"},
        "chats": {"model": checkpoint("llama"), "task": "causal-lm", "data": files(data.chats, "jsonl"), "method": "lora"},
        "prompts": {"model": checkpoint("gpt2"), "task": "causal-lm", "data": files(data.prompts, "jsonl"), "method": "full"},
        "rewritten": {"model": checkpoint("bart"), "task": "seq2seq", "data": files(data.rewritten, "jsonl"), "method": "lora"},
        "labelled": {
            "model": checkpoint("bert"),
            "task": {"kind": "text-classification", "problem": "multi-label"},
            "data": files(data.labelled, "jsonl"),
            "method": "full",
        },
        "scored": {
            "model": checkpoint("bert"),
            "task": {"kind": "text-classification", "problem": "regression"},
            "data": files(data.scored, "csv"),
            "method": "full",
        },
        "tagged": {"model": checkpoint("bert"), "task": "token-classification", "data": files(data.tagged, "jsonl"), "method": "full"},
        "asked": {"model": checkpoint("bert"), "task": "question-answering", "data": files(data.asked, "jsonl"), "method": "full"},
        "masked": {"model": checkpoint("bert-masked"), "task": "masked-lm", "data": files(data.masked, "jsonl"), "method": "full"},
        "documents": {"model": checkpoint("bert-pretrained"), "task": "next-sentence", "data": files(data.documents, "jsonl"), "method": "full"},
        "texts": {"model": checkpoint("electra-pretrained"), "task": "replaced-token-detection", "data": files(data.texts, "jsonl"), "method": "full"},
        "matched": {"model": checkpoint("bert"), "task": "sentence-embedding", "data": files(data.matched, "csv"), "method": "lora"},
        "alike": {
            "model": checkpoint("gpt2"),
            "task": {"kind": "sentence-embedding", "loss": "cosent", "pooling": "last"},
            "data": files(data.alike, "jsonl"),
            "method": "full",
        },
        "ranked": {"model": checkpoint("bert"), "task": "reranking", "data": files(data.ranked, "jsonl"), "method": "full"},
        "written": {"model": checkpoint("t5"), "task": "seq2seq", "data": files(data.rewritten, "jsonl"), "eval": {"metrics": ["rouge_l", "bleu", "chrf"]}},
        "answered": {
            "model": checkpoint("llama"),
            "task": "causal-lm",
            "data": files(data.chats, "jsonl"),
            "eval": {"metrics": ["rouge_l", "stop_rate", "exact_match"], "generation": {"samples": 3}},
        },
    }
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            recipe = kinds[name] | {"train": {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"}, "output": str(directory / "run")}
            evaluation = recipe.get("eval", {})
            recipe["eval"] = evaluation | {"generation": evaluation.get("generation", {}) | {"max_new_tokens": 8}}
            (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            AcceleratorState._reset_state(True)
            train(str(directory / "recipe.yaml"))
            made[name] = directory / "run"
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        verify_in_this_process(patch)
        yield make


def files(directory: Path, ending: str) -> dict[str, str]:
    return {name: str(directory / f"{name}.{ending}") for name in ("train", "validation", "test")}


def verify_in_this_process(patch: pytest.MonkeyPatch) -> None:
    from ftkit import verify

    patch.setattr(verify, "check", lambda directory, artifact, expected: {"max_difference": 0.0, "tolerance": expected.tolerance, "base_sha256": None})


# --- eval ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["single", "pairs", "labelled", "scored", "tagged", "asked", "masked", "documents", "texts", "matched", "alike", "ranked", "chats", "prompts", "rewritten"],
)
def test_eval_gives_the_numbers_of_the_run(make_run, ftkit, name):
    run = make_run(name)
    metrics = json.loads((run / "metrics.json").read_text())
    done = ftkit("eval", run, "--json")
    assert done.code == 0, done.err
    measured = json.loads(done.out)
    assert measured["output"] == str(run)
    assert list(measured["metrics"]) == ["validation", "test"]
    for split, values in measured["metrics"].items():
        # an untrained model's numbers hardly vary: their correlation takes the rounding of other batches as a larger part
        assert values == pytest.approx(metrics[split], rel=1e-5 if name == "scored" else 1e-6)
        assert json.loads((run / "eval" / split / "metrics.json").read_text()) == {split: values}
        details = [json.loads(path.read_text())[split] for path in (run / "details.json", run / "eval" / split / "details.json")]
        assert details[0].keys() == details[1].keys()
        intervals = [each.get("intervals", {}) for each in details]
        assert intervals[0].keys() == intervals[1].keys()
        assert all(intervals[1][metric] == pytest.approx(ends, rel=1e-3) for metric, ends in intervals[0].items())
        said, again = (run / where / what for where, what in (("predictions", f"{split}.jsonl"), (f"eval/{split}", "predictions.jsonl")))
        for before, now in zip(map(json.loads, said.open()), map(json.loads, again.open()), strict=True):
            assert {key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for key, value in before.items()} == now


@pytest.mark.parametrize("name", ["pairs", "tagged", "texts"])
def test_answers_as_csv_are_those_of_json(name, make_run, ftkit, data):
    run, file = make_run(name), next(getattr(data, name).glob("test.*"))
    expected = answers(ftkit("predict", run, "--file", file))
    done = ftkit("predict", run, "--file", file, "--csv")
    assert done.code == 0, done.err
    found = list(csv.DictReader(io.StringIO(done.out)))
    assert len(found) == len(expected) == 8
    for cells, answer in zip(found, expected, strict=True):
        assert cells.keys() >= answer.keys()
        for key, cell in cells.items():
            value = answer.get(key, "")
            assert cell == value if isinstance(value, str) else json.loads(cell) == value, key
    assert ftkit("predict", run, "--file", file, "--csv", "--json").code == 2


def test_metrics_of_written_text_are_those_of_what_predict_says(make_run, ftkit, data):
    """At the end of the run and in `ftkit eval`, on each set, beside sacrebleu's own."""
    from ftkit.tasks.text_metrics import rouge_l

    sacrebleu = pytest.importorskip("sacrebleu")
    run = make_run("written")
    found = json.loads((run / "metrics.json").read_text())
    again = json.loads(ftkit("eval", run, "--json").out)["metrics"]
    assert found["base"]["test"].keys() == {"loss", "loss_count"}
    for split in ("validation", "test"):
        rows = [json.loads(line) for line in (data.rewritten / f"{split}.jsonl").open()]
        said = answers(ftkit("predict", run, "--file", data.rewritten / f"{split}.jsonl"))
        texts, targets = [answer["text"] for answer in said], [row["target"] for row in rows]
        assert found[split].keys() == {"rouge_l", "bleu", "chrf", "loss", "loss_count"}
        assert found[split]["rouge_l"] == pytest.approx(sum(map(rouge_l, texts, targets)) / len(rows))
        assert found[split]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [targets]).score / 100)
        assert again[split] == pytest.approx(found[split])
        kept = [json.loads(line) for line in (run / "predictions" / f"{split}.jsonl").open()]
        assert [(line["row"], line["text"], line["finished"]) for line in kept] == [(each["row"], each["text"], each["finished"]) for each in said]


def test_answers_to_chats_are_measured_and_shown_before_and_after(make_run, ftkit, data):
    from ftkit.tasks.text_metrics import rouge_l

    run = make_run("answered")
    found, details = (json.loads((run / file).read_text()) for file in ("metrics.json", "details.json"))
    for split in ("validation", "test"):
        chats = [json.loads(line)["messages"] for line in (data.chats / f"{split}.jsonl").open()]
        said = answers(ftkit("predict", run, "--file", data.chats / f"{split}.jsonl"))
        assert found[split]["stop_rate"] == sum(answer["finished"] for answer in said) / len(said)
        alike = [rouge_l(answer["text"], chat[-1]["content"]) for answer, chat in zip(said, chats, strict=True)]
        assert found[split]["rouge_l"] == pytest.approx(sum(alike) / len(said))
    samples = details["validation"]["samples"]
    chats = [json.loads(line)["messages"] for line in (data.chats / "validation.jsonl").open()][:3]
    said = answers(ftkit("predict", run, "--file", data.chats / "validation.jsonl"))[:3]
    assert [(each["asked"], each["reference"], each["after"]) for each in samples] == [
        (chat[-2]["content"], chat[-1]["content"], answer["text"]) for chat, answer in zip(chats, said, strict=True)
    ]
    untrained = [each["before"] for each in samples]
    assert untrained == json.loads((run / "manifest.json").read_text())["base_samples"]
    assert f"| {chats[0][-2]['content']} | {chats[0][-1]['content']} |" in (run / "README.md").read_text()
    assert "samples" not in details["test"]


@pytest.mark.parametrize("name", ["chats", "prompts"])
def test_the_untuned_model_is_measured_with_a_prompt_and_examples(make_run, ftkit, data, tmp_path, name):
    """As rows that hold them already, of which the last answer counts."""
    from transformers import AutoConfig

    run, prompt = make_run(name), tmp_path / "prompt.txt"
    prompt.write_text("You know where things are.\n")
    done = ftkit("eval", run, "--prompt", prompt, "--shots", "2", "--split", "test", "--json")
    assert done.code == 0, done.err
    found, kept = json.loads(done.out)["metrics"], json.loads((run / "metrics.json").read_text())
    assert found["test"] == pytest.approx(kept["test"], rel=1e-5)
    assert found["base"].keys() == {"test"}
    assert found["base"]["test"]["loss_count"] == kept["base"]["test"]["loss_count"]
    assert found["base"]["test"]["loss"] != pytest.approx(kept["base"]["test"]["loss"], rel=1e-4)
    train, test = ([json.loads(line) for line in (getattr(data, name) / f"{split}.jsonl").open()] for split in ("train", "test"))
    shown = [train[i] for i in random.Random(42).sample(range(len(train)), 2)]
    path = tmp_path / "test.jsonl"
    for row in test:
        if name == "prompts":
            row["prompt"] = "\n\n".join(["You know where things are.", *(each["prompt"] + each["completion"] for each in shown), row["prompt"]])
        else:
            examples = [message | {"weight": int(message["role"] != "assistant")} for each in shown for message in each["messages"]]
            row["messages"] = [{"role": "system", "content": "You know where things are."}, *examples, *row["messages"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in test))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    positions = AutoConfig.from_pretrained(recipe["model"]["name"]).max_position_embeddings
    recipe["data"] |= {"max_length": positions, "truncation": "left"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    again = ftkit("eval", tmp_path / "recipe.yaml", "--data", path, "--json")
    assert json.loads(again.out)["metrics"]["base"]["other/test"] == pytest.approx(found["base"]["test"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("single", ("--shots", "2"), "--prompt and --shots are for models that continue texts (task: causal-lm), not for text-classification"),
        ("chats", ("--shots", "900"), "--shots: 900, but there are 32 training rows"),
        ("chats", ("--prompt", "nowhere.txt"), "--prompt: nowhere.txt cannot be read as text"),
    ],
)
def test_prompts_that_cannot_be_measured_are_refused(make_run, ftkit, name, options, told):
    done = ftkit("eval", make_run(name), *options)
    assert done.code == 2
    assert told in done.err


def test_eval_measures_one_set_and_prints_a_table(make_run, ftkit):
    run = make_run("single")
    done = ftkit("eval", run, "--split", "test")
    assert done.code == 0
    assert "accuracy" in done.out
    assert "test" in done.out
    assert "validation" not in done.out.replace(str(run), "")
    done = ftkit("eval", run, "--split", "dev")
    assert (done.code, done.err.count("there are validation, test")) == (2, 1)


def test_eval_measures_other_rows_in_the_columns_of_the_run(make_run, ftkit, data, tmp_path):
    run = make_run("single")
    own = run / "eval" / "validation"
    shutil.rmtree(own, ignore_errors=True)
    done = ftkit("eval", run, "--data", data.single / "validation.csv", "--json")
    measured = json.loads((run / "metrics.json").read_text())["validation"]
    assert json.loads(done.out)["metrics"] == {"other/validation": pytest.approx(measured, rel=1e-6)}
    assert not own.exists(), "what is called so belongs to the run's own set"
    renamed = tmp_path / "fresh.csv"
    renamed.write_text("sentence,category\nroses and bees,garden\nbutter and bread,kitchen\n")
    done = ftkit("eval", run, "--data", renamed, "--json")
    assert json.loads(done.out)["metrics"]["other/fresh"]["loss_count"] == 2
    assert "text from sentence" in done.err
    assert [json.loads(line)["label"] for line in (run / "eval" / "other" / "fresh" / "predictions.jsonl").open()] == ["garden", "kitchen"]


def test_eval_refuses_labels_that_the_run_does_not_know(make_run, ftkit, tmp_path):
    (tmp_path / "sky.csv").write_text("text,label\nroses,garden\nstars,sky\n")
    done = ftkit("eval", make_run("single"), "--data", tmp_path / "sky.csv")
    assert done.code == 3
    assert "sky.csv:2: label 'sky' does not occur" in done.err
    assert not (make_run("single") / "eval" / "other" / "sky").exists()


def test_eval_refuses_a_split_of_a_file(make_run, ftkit, data):
    done = ftkit("eval", make_run("single"), "--data", data.single / "test.csv", "--split", "test")
    assert (done.code, "test.csv is one file: it has no splits; leave --split out" in done.err) == (2, True), done.err
    assert ftkit("eval", make_run("single"), "--data", data.single, "--split", "train").code == 0


def test_eval_of_a_recipe_for_many_processes_takes_one(recipe, ftkit):
    path = recipe(train={"parallel": "fsdp", "processes": 4})
    done = ftkit("eval", path, "--split", "test", "--json")
    assert done.code == 0, done.err
    assert "on one process" in done.err
    assert list(json.loads(done.out)["metrics"]["base"]) == ["test"]


def test_eval_refuses_other_columns(make_run, ftkit, tmp_path):
    (tmp_path / "odd.csv").write_text("words,topic\nroses,garden\n")
    done = ftkit("eval", make_run("single"), "--data", tmp_path / "odd.csv")
    assert done.code == 3
    assert "there is no column for text" in done.err
    assert "there are: words, topic" in done.err


def test_eval_of_a_recipe_measures_the_base_and_writes_nothing(make_run, ftkit, tmp_path, monkeypatch):
    run = make_run("chats")
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / "recipe.yaml", "recipe.yaml")
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "out")}))
    done = ftkit("eval", "recipe.yaml", "--json")
    assert done.code == 0, done.err
    base = json.loads((run / "metrics.json").read_text())["base"]
    assert json.loads(done.out)["metrics"]["base"] == {split: pytest.approx(values, rel=1e-6) for split, values in base.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_eval_says_what_changed_since_the_run(make_run, ftkit, data, tmp_path):
    for name in ("train.csv", "validation.csv"):
        shutil.copy(data.single / name, tmp_path / name)
    run = tmp_path / "run"
    shutil.copytree(make_run("single"), run)
    for name in ("recipe.yaml", "manifest.json"):
        text = (run / name).read_text()
        for file in ("train.csv", "validation.csv"):
            text = text.replace(str(data.single / file), str(tmp_path / file))
        (run / name).write_text(text)
    with (tmp_path / "validation.csv").open("a") as file:
        file.write("one more rose,garden\n")
    done = ftkit("eval", run)
    assert done.code == 0, done.err
    assert f"{tmp_path / 'validation.csv'} has changed since the run" in done.err


def test_an_unfinished_run_and_none_are_told_apart(ftkit, tmp_path):
    (tmp_path / "manifest.json").write_text('{"status": "preempted"}')
    done = ftkit("eval", tmp_path)
    assert (done.code, "its run is preempted" in done.err) == (2, True)
    done = ftkit("predict", tmp_path / "gone", "text")
    assert (done.code, "does not exist" in done.err) == (2, True)


def test_a_run_whose_model_is_gone(make_run, ftkit, tmp_path):
    shutil.copytree(make_run("single"), tmp_path / "run")
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    done = ftkit("predict", tmp_path / "run", "roses")
    assert done.code == 2
    assert "Traceback" not in done.err


# --- predict ------------------------------------------------------------------------------------


def answers(done) -> list[dict]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_predict_agrees_with_the_predictions_of_the_run(make_run, ftkit, data):
    run = make_run("single")
    said = [json.loads(line) for line in (run / "predictions" / "test.jsonl").open()]
    found = answers(ftkit("predict", run, "--file", data.single / "test.csv"))
    assert [answer["row"] for answer in found] == [record["row"] for record in said]
    assert [answer["label"] for answer in found] == [record["prediction"] for record in said]
    assert [answer["probability"] for answer in found] == pytest.approx([record["probability"] for record in said], rel=1e-4)


def test_predict_texts(make_run, ftkit):
    found = answers(ftkit("predict", make_run("single"), "roses", "a long text about the bread and the butter in the oven"))
    assert [set(answer["scores"]) for answer in found] == [{"garden", "harbour", "kitchen"}] * 2
    document = json.loads(ftkit("predict", make_run("single"), "roses", "--json").out)
    assert document[0]["probability"] == pytest.approx(found[0]["probability"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", "roses\n\na very long line about many bees and roses in the garden\nsoup\n"),
        ("rows.csv", "sentence,idx\nroses,1\na very long line about many bees and roses in the garden,2\nsoup,3\n"),
        ("rows.csv", "whatever\nroses\na very long line about many bees and roses in the garden\nsoup\n"),
        ("rows.jsonl", '{"text": "roses"}\n{"text": "a very long line about many bees and roses in the garden", "label": null}\n{"text": "soup"}\n'),
    ],
)
def test_predict_needs_no_labels_and_answers_in_order(make_run, ftkit, tmp_path, monkeypatch, name, content):
    monkeypatch.setattr("ftkit.predict.WINDOW", 1)
    run = tmp_path / "run"
    shutil.copytree(make_run("single"), run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"eval": recipe["eval"] | {"batch_size": 2}}))
    (tmp_path / name).write_text(content)
    texts = ["roses", "a very long line about many bees and roses in the garden", "soup"]
    single = [answers(ftkit("predict", run, text))[0] for text in texts]
    found = answers(ftkit("predict", run, "--file", tmp_path / name))
    assert [answer["probability"] for answer in found] == pytest.approx([answer["probability"] for answer in single], rel=1e-4)


def test_predict_pairs(make_run, ftkit, data, tmp_path):
    run = make_run("pairs")
    (found,) = answers(ftkit("predict", run, "roses and bees", "soup"))
    assert set(found["scores"]) == {"same", "other"}
    (tmp_path / "pairs.jsonl").write_text('{"sentence1": "roses and bees", "sentence2": "soup"}\n')
    (again,) = answers(ftkit("predict", run, "--file", tmp_path / "pairs.jsonl"))
    assert again["probability"] == pytest.approx(found["probability"], rel=1e-4)
    done = ftkit("predict", run, "one text")
    assert done.code == 2
    assert "text and text_pair: give 2 texts" in done.err
    (tmp_path / "half.jsonl").write_text('{"sentence1": "roses and bees", "other": "soup"}\n')
    done = ftkit("predict", run, "--file", tmp_path / "half.jsonl")
    assert done.code == 3
    assert "there is no column for text_pair ('sentence2' in training)" in done.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", "where are roses?\nwhere is soup?\n"),
        ("rows.jsonl", '{"instruction": "where are roses?"}\n{"instruction": "where is soup?", "input": ""}\n'),
        ("rows.jsonl", '{"prompt": "where are roses?"}\n{"prompt": "where is soup?"}\n'),
        ("rows.jsonl", "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in ("where are roses?", "where is soup?"))),
        ("rows.json", json.dumps([{"conversations": [{"from": "human", "value": text}]} for text in ("where are roses?", "where is soup?")])),
    ],
)
def test_predict_answers_chats_in_every_form(make_run, ftkit, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    found = answers(ftkit("predict", make_run("chats"), "--file", tmp_path / name))
    assert [{"text": answer["text"], "finished": answer["finished"]} for answer in found] == answers(
        ftkit("predict", make_run("chats"), "where are roses?", "where is soup?")
    )


def test_predict_finds_answers(make_run, ftkit, data):
    """Those of the run's own predictions, with the characters of the context."""
    run = make_run("asked")
    said = [json.loads(line) for line in (run / "predictions" / "test.jsonl").open()]
    found = answers(ftkit("predict", run, "--file", data.asked / "test.jsonl"))
    assert [[answer[key] for key in ("row", "text", "start", "end")] for answer in found] == [
        [each[key] for key in ("row", "text", "start", "end")] for each in said
    ]
    assert [answer["score"] for answer in found] == pytest.approx([each["score"] if each["text"] else each["null_score"] for each in said], rel=1e-4)
    context = "many old boats under the fog"
    (alone,) = answers(ftkit("predict", run, "where in the harbour?", context))
    assert {each["text"] for each in alone["n_best"]} == {context[each["start"] : each["end"]] if each["text"] else "" for each in alone["n_best"]}
    assert sum(each["probability"] for each in alone["n_best"]) == pytest.approx(1)
    done = ftkit("predict", run, "where in the harbour?")
    assert done.code == 2
    assert "question and context: give 2 texts" in done.err


def test_predict_rewrites_texts(make_run, ftkit, tmp_path):
    (tmp_path / "rows.csv").write_text("document,summary\nroses and bees,\nsoup,\n")
    found = answers(ftkit("predict", make_run("rewritten"), "--file", tmp_path / "rows.csv"))
    again = answers(ftkit("predict", make_run("rewritten"), "roses and bees", "soup"))
    assert [{"text": answer["text"], "finished": answer["finished"]} for answer in found] == again


def test_predict_fills_masks(make_run, ftkit, tmp_path):
    (tmp_path / "rows.csv").write_text("content\n[MASK] and bees\nsoup in the [MASK] [MASK]\n")
    found = answers(ftkit("predict", make_run("masked"), "--file", tmp_path / "rows.csv"))
    assert [(answer["row"], len(answer["masks"])) for answer in found] == [(1, 1), (2, 2)]
    (again,) = answers(ftkit("predict", make_run("masked"), "soup in the [MASK] [MASK]"))
    assert again["text"] == found[1]["text"] == "soup in the " + " ".join(mask[0]["token"] for mask in again["masks"]).replace(" ##", "")
    done = ftkit("predict", make_run("masked"), "soup")
    assert (done.code, done.out) == (3, "")
    assert "text:1: the text has no [MASK]" in done.err


def test_predict_continues_prompts(make_run, ftkit, tmp_path):
    (tmp_path / "rows.csv").write_text("question,completion\nwhere are roses? ,\n")
    (found,) = answers(ftkit("predict", make_run("prompts"), "--file", tmp_path / "rows.csv"))
    (again,) = answers(ftkit("predict", make_run("prompts"), "where are roses? "))
    assert found == {"row": 1} | again
    assert set(again) == {"text", "finished"}


def test_predict_says_which_row_cannot_be_answered(make_run, ftkit, tmp_path):
    (tmp_path / "rows.csv").write_text('text\nroses\n"  "\n')
    done = ftkit("predict", make_run("single"), "--file", tmp_path / "rows.csv")
    assert done.code == 3
    assert "rows.csv:2: text is empty" in done.err
    assert (done.out, ftkit("predict", make_run("single"), " ").code) == ("", 2)


def test_predict_refuses_a_row_that_is_too_long_where_the_run_did(make_run, ftkit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(make_run("single"), run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for truncation, code in (("error", 3), ("drop", 0)):
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": recipe["data"] | {"truncation": truncation, "max_length": 8}}))
        done = ftkit("predict", run, "roses and bees and tulips and worms and rain and soil")
        assert (done.code, "Traceback" in done.err) == (code, False)


# --- chat ---------------------------------------------------------------------------------------


def test_chat_streams_answers_until_the_input_ends(make_run, ftkit, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("where are roses?\nwhere is soup?\n"))
    done = ftkit("predict", make_run("chats"), "--chat")
    assert done.code == 0, done.err
    (first,) = answers(ftkit("predict", make_run("chats"), "where are roses?"))
    assert done.out.startswith(first["text"].strip())
    assert done.err.count("> ") == 3
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert ftkit("predict", make_run("chats"), "--chat").out == ""


def test_chat_forgets_what_no_longer_fits(make_run, ftkit, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("where are the roses and the bees and the tulips?\n" * 6))
    done = ftkit("predict", make_run("chats"), "--chat")
    assert done.code == 0, done.err


def test_chat_needs_a_run_that_talks(make_run, ftkit, monkeypatch, tmp_path):
    done = ftkit("predict", make_run("single"), "--chat")
    assert done.code == 2
    assert "no conversation" in done.err
    run = tmp_path / "run"
    shutil.copytree(make_run("prompts"), run)
    (run / "model" / "chat_template.jinja").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    done = ftkit("predict", run, "--chat")
    assert done.code == 2
    assert "no chat template" in done.err


# --- check and show -----------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, checkpoint, data):
    """recipe(**changes): the path of a recipe that would train, but for the changes."""

    def write(**changes) -> Path:
        whole = {
            "model": checkpoint("bert"),
            "task": "text-classification",
            "data": files(data.single, "csv"),
            "method": "lora",
            "output": str(tmp_path / "run"),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(whole | changes))
        return path

    return write


def test_check_finds_nothing_wrong_and_writes_nothing(ftkit, recipe, tmp_path):
    path = recipe()
    done = ftkit("check", path)
    assert (done.code, done.out) == (0, f"{path}: nothing wrong\n")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "method",
    [
        "full",
        "head",
        {"kind": "partial", "last": 1},
        {"kind": "lora", "init": "pissa"},
        {"kind": "lora", "dora": True},
        "qlora",
        {"kind": "head", "bits": 4},
        "prompt",
        "prefix",
    ],
)
def test_check_knows_every_method(ftkit, recipe, method):
    done = ftkit("check", recipe(method=method))
    assert done.code == 0, done.err


def test_check_tells_all_mistakes_at_once(ftkit, recipe, data, tmp_path):
    (tmp_path / "file").write_text("")
    path = recipe(
        data=files(data.single, "csv") | {"max_length": 1000, "validation": str(tmp_path / "gone.csv")},
        method={"kind": "lora", "targets": ["nonsense"]},
        train={"precision": "fp16", "parallel": "fsdp"},
        output=str(tmp_path / "file"),
    )
    done = ftkit("check", path)
    assert done.code == 2
    for words in ("is a file", "fp16 needs a GPU", "fsdp needs GPUs", "gone.csv", "1000, but the model has"):
        assert words in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"method": {"kind": "lora", "targets": ["nonsense"]}}, 2, "'nonsense' matches no linear module"),
        ({"method": {"kind": "partial", "last": 9}}, 2, "9 layers asked for"),
        ({"task": "causal-lm"}, 2, "no end-of-text token"),
        ({"method": {"kind": "lora", "trainable_token_indices": ["gardn"]}}, 2, "'gardn' is not in the vocabulary; did you mean 'garden'?"),
        ({"model": "org/nowhere"}, 8, "org/nowhere"),
        ({"model": "./nowhere"}, 2, "there is no directory"),
        ({"eval": {"metrics": ["bleu"]}}, 2, "'bleu' is not a metric"),
        ({"train": {"early_stopping": {"metric": "speed"}}}, 2, "'speed' is not a metric"),
    ],
)
def test_check_sees_without_weights(ftkit, recipe, changes, code, words):
    done = ftkit("check", recipe(**changes))
    assert (done.code, words in done.err) == (code, True), done.err


def test_check_tells_that_texts_are_too_few_for_a_tokenizer(ftkit, recipe):
    tokenizer = {"train": "data", "kind": "wordpiece", "vocab_size": 5000}
    done = ftkit("check", recipe(model={"init": "random", "tokenizer": tokenizer, "config": {"model_type": "bert"}}))
    assert done.code == 3, done.err
    assert "fewer than vocab_size: 5000; give more text, or vocab_size: " in done.err


def test_check_tries_rows_of_each_set(ftkit, recipe, data, tmp_path):
    (tmp_path / "odd.csv").write_text("text,label\nroses,garden\nstars,sky\n")
    done = ftkit("check", recipe(data=files(data.single, "csv") | {"validation": str(tmp_path / "odd.csv")}))
    assert done.code == 3
    assert "odd.csv:2: label 'sky'" in done.err


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("qlora", "which cannot be done twice; leave method.bits out, or use method: lora in place of qlora"),
        ({"kind": "ia3", "bits": 8}, "which cannot be done twice; leave method.bits out"),
        ("full", "and its weights can neither learn nor be decomposed; use method: lora"),
        ({"kind": "partial", "last": 1}, "and its weights can neither learn nor be decomposed; use method: lora"),
        ({"kind": "lora", "init": "pissa"}, "and its weights can neither learn nor be decomposed; use method: lora, with init: default"),
    ],
)
def test_check_sees_a_base_that_is_quantised_already(method, words, ftkit, recipe, checkpoint, tmp_path):
    shutil.copytree(checkpoint("bert"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    done = ftkit("check", recipe(model=str(tmp_path / "base"), method=method))
    assert done.code == 2
    assert f"stored quantised already (bitsandbytes), {words}" in done.err


@pytest.mark.parametrize(
    "method",
    [
        "full",
        "head",
        {"kind": "partial", "last": 1},
        {"kind": "lora", "r": 4, "trainable_token_indices": ["the", 50]},
        "qlora",
        *({"kind": kind, "bits": 4} for kind in ("head", "ia3", "bitfit", "adapter")),
    ],
)
def test_show_counts_the_parameters_of_the_run(ftkit, recipe, verify_here, method):
    path = recipe(method=method, train={"steps": 1})
    shown = json.loads(ftkit("show", path, "--json").out)
    assert ftkit("train", path).code == 0
    manifest = json.loads((path.parent / "run" / "manifest.json").read_text())
    assert shown["parameters"] == manifest["parameters"]["groups"]
    assert shown["layout"] == manifest["layout"] == "flat"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 4}, "GPTJForCausalLM: its attention is its own"),
        ({"model_type": "gemma2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}, "wants softcap"),
    ],
)
def test_a_layout_that_is_impossible_is_refused_with_what_is_possible(ftkit, recipe, checkpoint, data, config, reason):
    model = {"init": "random", "config": config, "tokenizer": checkpoint("llama")}
    path = recipe(model=model, task="causal-lm", data=files(data.prompts, "jsonl"), method="full", train={"layout": "flat"})
    for command in ("check", "train"):
        done = ftkit(command, path)
        assert done.code == 2
        assert "train.layout: flat is impossible here" in done.err
        assert reason in done.err
        assert "use layout: bucketed" in done.err
    shown = ftkit("show", path, "train.layout=auto").out
    assert "bucketed (not flat: " in shown


def test_show_counts_a_model_from_nothing_without_training_its_tokenizer(ftkit, recipe, data, monkeypatch):
    monkeypatch.setattr("ftkit.tokenizer.train_tokenizer", None)
    model = {"init": "random", "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}, "tokenizer": {"train": "data", "vocab_size": 1000}}
    done = ftkit("show", recipe(model=model, task="causal-lm", data={"train": "gone.txt"}, method="full"), "--json")
    groups = json.loads(done.out)["parameters"]
    assert groups["embeddings"]["total"] == (1000 + 1024) * 32
    assert groups["embeddings"]["trainable"] == groups["embeddings"]["total"]


@pytest.mark.parametrize(("changes", "words"), [({"model": "org/nowhere"}, "org/nowhere"), ({"data": {"train": "gone.csv"}}, "gone.csv")])
def test_show_says_why_there_are_no_counts(ftkit, recipe, changes, words):
    done = ftkit("show", recipe(**changes))
    assert done.code == 0
    assert "train.learning_rate" in done.out
    assert not re.search(r"trainable +total", done.out)
    assert words in done.err


def test_the_recipe_of_a_run_on_a_chat_format_repeats_it(ftkit, checkpoint, tmp_path, verify_here):
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("rose", "bee", "soup", "boat")]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    recipe = {"model": checkpoint("llama"), "task": "causal-lm", "data": {"train": str(tmp_path / "alpaca.json")}, "train": {"steps": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "a")}))
    assert ftkit("train", tmp_path / "recipe.yaml").code == 0
    done = ftkit("train", tmp_path / "a" / "recipe.yaml", f"output={tmp_path / 'b'}")
    assert done.code == 0, done.err
    assert (tmp_path / "a" / "model" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model" / "model.safetensors").read_bytes()
