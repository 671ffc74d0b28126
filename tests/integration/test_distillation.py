"""Distillation end to end: a student learns from a teacher that is asked in each step, and the same from what it said once."""

import gc
import json
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from ftkit import loop, teacher_models
from ftkit.objectives.distill import Distill

SMALLER = {  # the lower one of the two layers of the tests' models
    "bert": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "llama": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "bert-masked": {"num_hidden_layers": 1},
}

TOPICS = ["garden", "harbour", "kitchen"]  # labels of the tests' rows, in the order that a task gives them


@pytest.fixture
def distil(ftkit, recipe, checkpoint, verify_here, tmp_path):
    """distil(model, rows) trains a teacher and gives a function, student(name, objective settings), that trains one of it: its run, and what was told."""

    def teach(taught: str, rows: str, train: dict | None = None, **sections):
        teacher = tmp_path / "teacher"
        path = recipe(taught, rows, train or {"steps": 2}, "teacher.yaml", output=str(teacher), **sections)
        outcome = ftkit("train", path, "--overwrite")
        assert outcome.code == 0, outcome.err

        def student(name: str, model: dict | None = None, train: dict | None = None, method: dict | str | None = None, **objective) -> tuple[Path, str]:
            model = {"name": checkpoint(taught), "config": SMALLER[taught]} | (model or {})
            settings = {"kind": "distill", "teacher": str(teacher)} | objective
            own = sections | {"objective": settings} | ({"method": method} if method else {})
            path = recipe(model, rows, train, f"{name}.yaml", output=str(tmp_path / name), **own)
            outcome = ftkit("train", path)
            assert outcome.code == 0, outcome.err
            return tmp_path / name, outcome.err

        return student

    return teach


def losses(run: Path) -> list[float]:
    return [step["loss"] for step in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "split" not in step]


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        ("bert", "single"),
        ("bert", "pairs"),
        ("gpt2", "labelled"),
        ("bert", "tagged"),
        ("bert", "asked"),
        ("gpt2", "prompts"),
        ("llama", "chats"),
        ("t5", "rewritten"),
    ],
)
def test_a_cached_teacher_says_what_a_live_one_says(model, rows, distil, monkeypatch):
    student = distil(model, rows)
    live, _ = student("live", cache=False)
    cached, told = student("cached", top_k=1000)
    assert "not in the cache yet: the scores that the teacher gives" in told
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    monkeypatch.setattr(teacher_models.Run, "open", None)
    again, told = student("again", top_k=1000)
    assert "is in the cache: it is not loaded" in told
    assert losses(again) == losses(cached)


def test_another_teacher_is_asked_anew(distil):
    student = distil("bert", "single")
    student("one")
    _, told = student("two", train={"steps": 1})
    assert "is in the cache" in told
    distil("bert", "single", {"steps": 3})
    _, told = student("three")
    assert "not in the cache yet" in told


@pytest.mark.parametrize(("teacher", "learner"), [("gpt2", "bert"), ("bert", "gpt2")])
def test_a_teacher_with_other_tokens_reads_rows_in_its_own(teacher, learner, distil, checkpoint):
    student = distil(teacher, "single")
    model = {"name": checkpoint(learner), "config": SMALLER[learner]}
    live, told = student("live", model, cache=False)
    assert "layout: flat" not in told  # is impossible with tokens that the model has not
    cached, _ = student("cached", model)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)


def test_a_student_that_is_no_smaller_is_warned_of(distil):
    _, told = distil("bert", "single")("run", {"config": {}})
    assert re.search(r"warning: the student has [\d,]+ parameters, its teacher [\d,]+: it is no smaller", told)


SPECIAL = {"llama": ("chats", {"kind": "qlora"}), "gpt2": ("prompts", {"kind": "prompt", "num_virtual_tokens": 4}), "bert": ("single", {"kind": "lora"})}


@pytest.mark.parametrize("model", SPECIAL)
def test_a_teacher_may_be_what_a_method_made(model, distil):
    """In 4 bits, behind virtual tokens, or with an adapter; the student has none of that."""
    rows, method = SPECIAL[model]
    student = distil(model, rows, method=method)
    live, cached = (losses(student(str(cache), cache=cache, top_k=1000, method="full")[0]) for cache in (False, True))
    assert cached == pytest.approx(live, rel=1e-5)


@pytest.fixture
def from_stored(ftkit, recipe, checkpoint, verify_here, tmp_path):
    """from_stored(model, rows, name, objective settings) trains a student of that model as it is stored."""

    def student(model: str, rows: str, name: str, *flags: str, **objective) -> tuple[Path, str]:
        smaller = {"name": checkpoint(model), "config": SMALLER[model]}
        settings = {"kind": "distill", "teacher": checkpoint(model)} | objective
        outcome = ftkit("train", recipe(smaller, rows, name=f"{name}.yaml", output=str(tmp_path / name), objective=settings), *flags)
        assert outcome.code == 0, outcome.err
        return tmp_path / name, outcome.err

    return student


@pytest.mark.parametrize(("model", "rows"), [("llama", "chats"), ("gpt2", "prompts"), ("t5", "rewritten"), ("bert-masked", "masked")])
def test_a_language_model_teaches_as_it_is_stored(model, rows, from_stored, distil):
    live, _ = from_stored(model, rows, "live", cache=False)
    run, _ = distil(model, rows, {"steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0})("run", cache=False)
    assert losses(live) == pytest.approx(losses(run), rel=1e-5)
    cached, _ = from_stored(model, rows, "cached", top_k=1000)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)


def test_a_stored_teacher_is_told_from_another(from_stored, checkpoint, ftkit, tmp_path):
    """In the cache, and by a run that goes on."""
    teacher = tmp_path / "stored"
    shutil.copytree(checkpoint("gpt2"), teacher)
    from_stored("gpt2", "prompts", "one", teacher=str(teacher))
    weights = load_file(teacher / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    run, told = from_stored("gpt2", "prompts", "two", teacher=str(teacher))
    assert "not in the cache yet" in told
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "preempted"}))
    (teacher / "config.json").write_text((teacher / "config.json").read_text() + "\n")
    done = ftkit("train", tmp_path / "two.yaml", "--resume")
    assert (done.code, "something else has come under the same names: teacher" in done.err) == (2, True)


def test_a_teacher_that_was_asked_is_let_go_of(distil, monkeypatch):
    """Flat, and with its layers watched: its memory is the student's."""
    student, opened = distil("gpt2", "prompts"), []
    whole = teacher_models.Run.open

    def opens(self, *args):
        model = whole(self, *args)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teacher_models.Run, "open", opens)
    learned = loop.fit

    def fits(*args):
        gc.collect()
        assert opened[-1]() is None
        yield from learned(*args)

    monkeypatch.setattr("ftkit.run.fit", fits)
    student("flat", train={"steps": 1, "layout": "flat"}, top_k=4)
    student("watched", train={"steps": 1, "layout": "padded"}, cache_states=True, hidden=1.0)


def test_a_teacher_without_its_head_is_refused(from_stored, checkpoint, ftkit, recipe, tmp_path):
    AutoModel.from_pretrained(checkpoint("bert-masked")).save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(checkpoint("bert-masked")).save_pretrained(tmp_path / "bare")
    objective = {"kind": "distill", "teacher": str(tmp_path / "bare")}
    outcome = ftkit("train", recipe({"name": checkpoint("bert-masked"), "config": SMALLER["bert-masked"]}, "masked", objective=objective))
    assert outcome.code == 2
    assert re.search(r"objective\.teacher: .*bare lacks cls\.predictions\.\S+, .*, which would be random; train it for masked-lm first", outcome.err)


def test_a_teachers_own_code_is_not_run(from_stored, checkpoint, ftkit, recipe, tmp_path, monkeypatch):
    code = tmp_path / "own"
    shutil.copytree(checkpoint("gpt2"), code)
    config = json.loads((code / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (code / "config.json").write_text(json.dumps(config))
    (code / "own.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    smaller = {"name": checkpoint("gpt2"), "config": SMALLER["gpt2"]}
    outcome = ftkit("train", recipe(smaller, "prompts", objective={"kind": "distill", "teacher": str(code)}))
    assert outcome.code == 2, outcome.err
    assert "needs Python code from its repository; a teacher's is not run: fine-tune it first" in outcome.err


def test_a_teacher_on_the_hub_is_held_to_its_commit(monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, revision, **others: SimpleNamespace(_commit_hash=f"{name}@{revision}"))
    objective = Distill(teacher="org/name", teacher_revision="v1").pinned()
    assert objective.teacher_revision == "org/name@v1"
    assert teacher_models.find(objective).source == ("org/name", "org/name@v1", False, None)


@pytest.mark.parametrize(("model", "rows", "method"), [("llama", "chats", "full"), ("gpt2", "prompts", {"kind": "lora", "r": 4}), ("bert", "single", "full")])
def test_a_teacher_may_be_asked_in_4_bits(model, rows, method, distil):
    student = distil(model, rows, method=method)
    whole, few = (losses(student(str(bits), teacher_bits=bits, cache=False, method="full", train={"steps": 1})[0]) for bits in (None, 4))
    cached = losses(student("cached", teacher_bits=4, top_k=1000, method="full", train={"steps": 1})[0])
    assert few != whole
    assert few == pytest.approx(whole, rel=0.1)
    assert cached == pytest.approx(few, rel=1e-5)


def test_a_run_does_not_go_on_with_another_teacher(distil, ftkit, tmp_path):
    student, _ = distil("bert", "single")("student")
    manifest = json.loads((student / "manifest.json").read_text())
    (student / "manifest.json").write_text(json.dumps(manifest | {"status": "preempted"}))
    distil("bert", "single")
    done = ftkit("train", tmp_path / "student.yaml", "--resume")
    assert done.code == 2
    assert "something else has come under the same names: teacher" in done.err


def test_check_finds_what_keeps_a_teacher_from_teaching(distil, ftkit, tmp_path):
    distil("bert", "single")("student", train={"steps": 1})
    assert ftkit("check", tmp_path / "student.yaml").code == 0
    done = ftkit("check", tmp_path / "student.yaml", "objective.hidden=1", "objective.layer_map=[4]", "objective.teacher=gone")
    assert (done.code, "gone does not exist" in done.err) == (2, True)
    done = ftkit("check", tmp_path / "student.yaml", "objective.hidden=1", "objective.layer_map=[4]")
    assert (done.code, "there is no layer 4: the teacher has 2" in done.err) == (2, True)
    weights = tmp_path / "teacher" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = ftkit("check", tmp_path / "student.yaml")
    assert (done.code, "teacher/model/model.safetensors is broken" in done.err) == (7, True)


def test_check_looks_at_the_weights_that_teach(checkpoint, ftkit, recipe, tmp_path):
    stored = tmp_path / "stored"
    shutil.copytree(checkpoint("gpt2"), stored)
    path = recipe({"name": checkpoint("gpt2"), "config": SMALLER["gpt2"]}, "prompts", objective={"kind": "distill", "teacher": str(stored)})
    assert ftkit("check", path).code == 0
    (stored / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    done = ftkit("check", path)
    assert (done.code, "stored/model.safetensors only points to weights" in done.err) == (7, True)


@pytest.mark.parametrize(
    ("model", "rows", "asked", "method"),
    [
        ("bert", "single", {"layers": [1]}, {"kind": "full"}),
        ("bert-masked", "masked", {"layers": [0], "convert": "distilbert"}, {"kind": "full"}),
        ("bert", "single", {"convert": "distilbert"}, {"kind": "lora", "r": 4}),
        ("gpt2", "prompts", {"layers": [1, 0]}, {"kind": "lora", "r": 4}),
    ],
)
def test_a_part_of_a_run_learns_without_a_teacher(model, rows, asked, method, ftkit, recipe, verify_here, tmp_path):
    outcome = ftkit("train", recipe(model, rows, {"steps": 2}, output=str(tmp_path / "whole")))
    assert outcome.code == 0, outcome.err
    part = recipe({"name": str(tmp_path / "whole")} | asked, rows, {"steps": 2}, method=method)
    assert ftkit("check", part).code == 0
    shown = json.loads(ftkit("show", part, "--json").out)
    outcome = ftkit("train", part)
    assert outcome.code == 0, outcome.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["parameters"]["total"] == sum(group["total"] for group in shown["parameters"].values())
    assert manifest["model"]["architecture"].startswith("DistilBert") is ("convert" in asked)
    assert (tmp_path / "run" / "model" / "base").is_dir() is (method["kind"] == "lora")  # they are nowhere else
    outcome = ftkit("eval", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["metrics"]["test"] == pytest.approx(json.loads((tmp_path / "run" / "metrics.json").read_text())["test"], rel=1e-4)


def test_the_same_batch_has_the_same_loss_to_the_bit(distil):
    student = distil("bert", "single")
    once = {"steps": 1, "batch_size": 32, "layout": "padded"}
    live, cached = (losses(student(str(cache), train=once, cache=cache)[0]) for cache in (False, True))
    assert live == cached


def test_the_most_likely_tokens_tell_nearly_all(distil):
    student = distil("gpt2", "prompts", {"steps": 60, "learning_rate": 1e-2})
    every = losses(student("all", cache=False, train={"steps": 1}, temperature=1.0)[0])
    few = losses(student("few", top_k=32, train={"steps": 1}, temperature=1.0)[0])
    assert few != every
    assert few == pytest.approx(every, rel=1e-3)


def test_rows_masked_anew_are_asked_about_in_each_step(distil):
    student = distil("bert-masked", "masked")
    run, told = student("run")
    assert "objective.cache: rows are masked anew in each epoch, so the teacher is asked in each step" in told
    assert len(losses(run)) == 4


def test_rows_that_are_always_masked_alike_are_asked_about_once(distil):
    student = distil("bert-masked", "masked", task={"kind": "masked-lm", "masking": "static"})
    live, _ = student("live", cache=False)
    cached, told = student("cached", top_k=1000)
    assert "not in the cache yet" in told
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    assert "is in the cache: it is not loaded" in student("again", top_k=1000)[1]
    assert "not in the cache yet" in student("other", top_k=1000, train={"seed": 5})[1]  # other masks


def test_the_datas_own_targets_alone_are_supervised(distil, ftkit, recipe, checkpoint, tmp_path):
    run, _ = distil("bert", "single")("run", alpha=1.0)
    smaller = {"name": checkpoint("bert"), "config": SMALLER["bert"]}
    assert ftkit("train", recipe(smaller, "single", output=str(tmp_path / "supervised"))).code == 0
    assert losses(run) == losses(tmp_path / "supervised")


INSIDE = {"hidden": 1.0, "cosine": 1.0, "embeddings": 0.5, "attention": 0.5, "relations": 0.5, "relation_heads": 4}


@pytest.mark.parametrize(
    ("model", "rows", "layout"),
    [("bert", "single", "flat"), ("bert", "tagged", "padded"), ("bert-masked", "masked", "flat"), ("gpt2", "prompts", "flat"), ("llama", "chats", "bucketed")],
)
def test_layers_are_compared(model, rows, layout, distil):
    run, told = distil(model, rows)("run", train={"layout": layout}, **INSIDE)
    assert "objective.cache: layers are compared, so the teacher is asked in each step" in told
    assert all(loss > 0.1 for loss in losses(run))


@pytest.mark.parametrize(("model", "rows", "layout"), [("bert", "single", "flat"), ("bert", "tagged", "padded"), ("gpt2", "prompts", "flat")])
def test_states_of_a_teacher_may_be_kept(model, rows, layout, distil, monkeypatch):
    student = distil(model, rows)
    weights = {"hidden": 1.0, "cosine": 0.5, "embeddings": 0.5, "top_k": 1000}
    live, _ = student("live", train={"layout": layout}, cache=False, **weights)
    kept, told = student("kept", train={"layout": layout}, cache_states=True, **weights)
    assert re.search(r"the scores that the teacher gives .*, and 2 of its states of [\d,]+ tokens, take", told)
    assert losses(kept) == pytest.approx(losses(live), rel=1e-5)
    monkeypatch.setattr(teacher_models.Run, "open", None)
    again, _ = student("again", train={"layout": layout}, cache_states=True, **weights)
    assert losses(again) == losses(kept)


def test_a_narrower_student_has_projections_that_no_one_else_needs(distil, ftkit, tmp_path, assert_same_run):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    student = distil("bert", "single")
    narrow = {"init": "random", "config": sizes}
    weights = {"hidden": 1.0, "embeddings": 1.0, "cache": False}
    run, _ = student("run", model=narrow, train={"steps": 6}, **weights)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["parameters"]["groups"]["projection"] == {"trainable": 2 * 16 * 32, "total": 2 * 16 * 32}
    assert not any("states" in name or "beside" in name for name in load_file(run / "model" / "model.safetensors"))
    cut, _ = student("cut", model=narrow, train={"steps": 6}, **weights)
    shutil.rmtree(cut / "checkpoints" / "step-6")
    (cut / "manifest.json").write_text(json.dumps(manifest | {"status": "preempted"}))
    assert ftkit("train", tmp_path / "cut.yaml", "--resume").code == 0
    assert_same_run(cut, run)


def test_parts_of_a_batch_are_the_batch(distil):
    """Rows without anything supervised are in either."""
    student = distil("bert-masked", "masked")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    whole, parts = (losses(student(str(count), {"config": still}, {"accumulate": count}, **INSIDE)[0]) for count in (1, 3))
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("model", "rows"), [("bert", "single"), ("gpt2", "labelled"), ("bert", "tagged"), ("bert", "asked"), ("gpt2", "prompts")])
def test_a_student_beside_its_teacher(model, rows, distil, ftkit, tmp_path):
    student, _ = distil(model, rows, {"steps": 12})("student", train={"steps": 12})
    done = ftkit("eval", student, "--against", tmp_path / "teacher", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["against"]
    assert json.loads((student / "eval" / "against" / "teacher" / "comparison.json").read_text()) == found
    teacher = tmp_path / "teacher"
    for name, values in found["sets"].items():
        for side, run in (("own", student), ("other", teacher)):
            assert values[side] == pytest.approx(json.loads((run / "metrics.json").read_text())[name][found["metric"]], rel=1e-4)
        if rows == "single":
            said, theirs = ([line["prediction"] for line in map(json.loads, (run / "predictions" / f"{name}.jsonl").open())] for run in (student, teacher))
            assert values["agreement"] == pytest.approx(sum(map(str.__eq__, said, theirs)) / len(said))
            assert values["kept"] == values["own"] / values["other"]
        assert 0 <= values["agreement"] <= 1
    for side, run in (("own", student), ("other", teacher)):
        assert found["parameters"][side] == json.loads((run / "manifest.json").read_text())["parameters"]["total"]
        assert found["bytes"][side] == 4 * found["parameters"][side]
        assert all(found["latency_seconds"][count][side] > 0 for count in ("1", "32"))
    done = ftkit("eval", teacher, "--against", teacher, "--split", "test")
    assert done.code == 0, done.err
    assert re.search(r"test \w+ .* (100\.0%|-) +100\.0%", done.out)  # there is no share of a score of 0
    assert re.search("milliseconds, batch of 32", done.out)


def test_runs_of_other_labels_are_not_compared(distil, ftkit, recipe, tmp_path):
    distil("bert", "single")
    assert ftkit("train", recipe("bert", "pairs", {"steps": 1})).code == 0
    done = ftkit("eval", tmp_path / "run", "--against", tmp_path / "teacher")
    assert done.code == 2
    assert "teacher has other labels: garden, harbour, kitchen; this run has other, same. They must be the same, in the same order" in done.err
    assert ftkit("train", recipe("bert", "single", {"steps": 1}, task={"kind": "text-classification", "labels": TOPICS[::-1]}), "--overwrite").code == 0
    done = ftkit("eval", tmp_path / "run", "--against", tmp_path / "teacher")
    assert (done.code, "teacher has the same labels in another order: garden, harbour, kitchen; this run has kitchen" in done.err) == (2, True)
    done = ftkit("eval", tmp_path / "recipe.yaml", "--against", tmp_path / "teacher")
    assert (done.code, "compares two finished runs, and" in done.err) == (2, True)
