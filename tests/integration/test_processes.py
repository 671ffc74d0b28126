"""Two processes under our own launcher make the same run as one; a signal stops both, and both go on."""

import json
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# In one chunk, so that a row does not depend on those beside it, which are others on two processes
REFORMER = {
    "attn_layers": ["local"],
    "num_hidden_layers": 1,
    "local_attn_chunk_length": 96,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
}
STILL = {"bert": BERT, "bert-masked": BERT, "bert-pretrained": BERT, "electra-pretrained": BERT, "reformer-masked": REFORMER, "t5": {"dropout_rate": 0.0}}
# 19 rows in batches of 6: the last batch of an epoch has one row, and the second process none
TRAIN = {"steps": 60, "batch_size": 6, "accumulate": 2, "optimizer": "sgd", "learning_rate": 0.05, "eval_every": 20, "save_every": 20}


@pytest.fixture
def of_processes(recipe, checkpoint, data, tmp_path):
    """of_processes(n, name): a recipe for n processes, and its run directory."""

    def write(count: int, model: str, rows: str, name: str, **sections) -> tuple[Path, Path]:
        directory = getattr(data, rows)
        files = {split: str(next(directory.glob(f"{split}.*"))) for split in ("train", "validation", "test")}
        overrides = {"name": checkpoint(model), "config": STILL.get(model, {})}
        path = recipe(overrides, rows, {**TRAIN, "processes": count}, name=f"{name}.yaml", data={**files, "limit": 19}, output=str(tmp_path / name), **sections)
        return path, tmp_path / name

    return write


def steps(run: Path) -> list[dict]:
    return [record for record in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "split" not in record]


def assert_alike(one: Path, two: Path) -> None:
    """The same rows in the same steps: equal but for the order of sums."""
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        for key in ("step", "epoch", "learning_rate", "loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    files = {path.relative_to(one): load_file(path) for path in (one / "model").rglob("*.safetensors")}
    assert files
    for path, tensors in files.items():
        others = load_file(two / path)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-6, msg=name)
    metrics, others = (json.loads((run / "metrics.json").read_text()) for run in (one, two))
    assert metrics.keys() == others.keys()
    for split in ("validation", "test"):
        assert metrics[split] == pytest.approx(others[split], rel=1e-5)
        lines, other_lines = ((run / "predictions" / f"{split}.jsonl").read_text().splitlines() for run in (one, two))
        assert [json.loads(line)["row"] for line in lines] == [json.loads(line)["row"] for line in other_lines]


def test_two_processes_learn_what_one_learns_and_stop_and_resume_together(ftkit, of_processes, verify_here, assert_same_run):
    alone, one = of_processes(1, "bert", "single", "one")
    assert ftkit("train", alone).code == 0
    path, two = of_processes(2, "bert", "single", "two")
    outcome = ftkit("train", path, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["output"] == str(two)
    assert outcome.err.count("columns: ") == 1  # what was found in the data is told once, not by the parent and the first rank
    assert any(note.startswith("columns: ") for note in json.loads((two / "manifest.json").read_text())["notes"])
    assert json.loads((two / "manifest.json").read_text())["hardware"]["processes"] == 2
    assert_alike(one, two)

    path, cut = of_processes(2, "bert", "single", "cut")
    with once(lambda: len(steps(cut)) >= 8, stop_one_rank):
        stopped = ftkit("train", path)
    assert stopped.code == 75, stopped.err
    manifest = json.loads((cut / "manifest.json").read_text())
    assert (manifest["status"], manifest["exit_code"]) == ("preempted", 75)
    assert len(steps(cut)) < 60
    resumed = ftkit("train", path, "--resume")
    assert resumed.code == 0, resumed.err
    assert_same_run(cut, two)


LORA = {"kind": "lora", "r": 4, "dropout": 0.0}


@pytest.mark.parametrize(
    ("model", "rows", "method"),
    [
        ("llama", "prompts", LORA),
        ("bert-masked", "masked", LORA),
        ("bert-pretrained", "documents", LORA),
        ("electra-pretrained", "texts", LORA),
        ("reformer-masked", "masked", {"kind": "full"}),
    ],
)
def test_the_loss_of_two_processes_is_weighted_by_tokens(model, rows, method, ftkit, of_processes, verify_here):
    """Prompts and completions, or masks, of unequal lengths, so that the processes hold unequal numbers of supervised tokens; the masks are the same."""
    alone, one = of_processes(1, model, rows, "one", method=method)
    assert ftkit("train", alone).code == 0
    path, two = of_processes(2, model, rows, "two", method=method)
    outcome = ftkit("train", path)
    assert outcome.code == 0, outcome.err
    assert_alike(one, two)


@pytest.mark.parametrize("settings", [{"cache": True}, {"cache": False}, {"hidden": 1.0, "relations": 1.0, "relation_heads": 4}])
def test_two_processes_learn_from_a_teacher_what_one_learns(settings, ftkit, of_processes, verify_here, monkeypatch, tmp_path):
    path, teacher = of_processes(1, "bert", "single", "teacher")
    assert ftkit("train", path, "train.steps=4").code == 0
    objective = {"kind": "distill", "teacher": str(teacher)} | settings
    alone, one = of_processes(1, "bert", "single", "one", objective=objective)
    assert ftkit("train", alone, "train.steps=12").code == 0
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))  # where the two have to ask for themselves
    path, two = of_processes(2, "bert", "single", "two", objective=objective)
    outcome = ftkit("train", path, "train.steps=12")
    assert outcome.code == 0, outcome.err
    assert_alike(one, two)


def test_each_process_writes_answers_of_its_own(ftkit, of_processes, verify_here):
    path, teacher = of_processes(1, "llama", "chats", "teacher")
    assert ftkit("train", path, "train.steps=2").code == 0
    objective = {"kind": "distill", "teacher": str(teacher), "on_policy": 0.5, "max_new_tokens": 8}
    path, run = of_processes(2, "llama", "chats", "run", objective=objective)
    outcome = ftkit("train", path, "train.steps=6")
    assert outcome.code == 0, outcome.err
    steps = [step for step in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "split" not in step]
    assert [step["step"] for step in steps][-1] == 6
    assert all(0 < step["loss"] < 20 for step in steps)


def test_rows_learn_from_those_of_the_other_process(ftkit, of_processes, verify_here):
    alone, one = of_processes(1, "bert", "matched", "one")
    assert ftkit("train", alone, "train.accumulate=1", "train.steps=12").code == 0
    path, two = of_processes(2, "bert", "matched", "two")
    outcome = ftkit("train", path, "train.accumulate=4", "train.steps=12")
    assert outcome.code == 0, outcome.err
    assert_alike(one, two)


@pytest.mark.parametrize(
    ("model", "rows", "metric", "evaluation", "settings"),
    [
        ("t5", "rewritten", "rouge_l", {"metrics": ["rouge_l"], "generation": {"max_new_tokens": 6}}, []),
        ("bert", "asked", "f1", {"batch_size": 3}, ["data.max_length=20", "task.stride=6"]),  # windows of a question at both processes
    ],
)
def test_two_processes_write_what_one_writes(model, rows, metric, evaluation, settings, ftkit, of_processes, verify_here):
    alone, one = of_processes(1, model, rows, "one", eval=evaluation)
    assert ftkit("train", alone, "train.steps=8", *settings).code == 0
    path, two = of_processes(2, model, rows, "two", eval=evaluation)
    outcome = ftkit("train", path, "train.steps=8", *settings)
    assert outcome.code == 0, outcome.err
    assert_alike(one, two)
    assert metric in json.loads((two / "metrics.json").read_text())["validation"]
    for split in ("validation", "test"):
        texts = [[json.loads(line)["text"] for line in (run / "predictions" / f"{split}.jsonl").open()] for run in (one, two)]
        assert texts[0] == texts[1]


def stop_one_rank() -> None:
    """As a scheduler may: the second process alone gets the signal."""
    ranks = [child for child in psutil.Process().children() if child.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGTERM)


class once:
    """Do something in another thread as soon as `when` says so, while the body runs."""

    def __init__(self, when, action) -> None:
        self.when, self.action, self.over = when, action, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self.over.is_set():
            with suppress(FileNotFoundError, json.JSONDecodeError):  # not written yet, or half written
                if self.when():
                    self.action()
                    return
            time.sleep(0.01)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()
