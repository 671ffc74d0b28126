"""A run that was cut off anywhere ends, once it is resumed, as if it never had been: bit for bit."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from stopping import send_at

KILLED = multiprocessing.get_context("forkserver")
KILLED.set_forkserver_preload(["ftkit.run", "ftkit.finish", "peft", "transformers.models.bert.modeling_bert", "conftest"])
CONFIGURATIONS = {
    "dropout-accumulate": ("bert", "single", {"kind": "full"}, {"accumulate": 3, "layout": "padded"}),
    "lora": ("llama", "prompts", {"kind": "lora", "r": 4, "dropout": 0.2, "trainable_token_indices": ["Ġin"]}, {"layout": "flat", "schedule": "cosine"}),
    "flat-frozen": ("bert", "pairs", {"kind": "partial", "last": 1}, {"layout": "flat"}),
    "biases-in-4-bits": ("gpt2", "prompts", {"kind": "bitfit", "bits": 4}, {"precision": "bf16"}),
    "masks": ("bert-masked", "masked", {"kind": "full"}, {"accumulate": 2}),
    "generator": ("electra-pretrained", "texts", {"kind": "full"}, {"accumulate": 2}),
    "rewritten": ("t5", "rewritten", {"kind": "partial", "last": 3}, {"accumulate": 2}),
    "rotations": ("reformer", "single", {"kind": "full"}, {"accumulate": 2}),
    "blocks": ("big_bird", "single", {"kind": "full"}, {"batch_size": 4}),
    "bucketed": ("distilbert", "single", {"kind": "partial", "last": 1}, {"layout": "bucketed", "optimizer": "sgd"}),
}
STEPS = {"steps": 10, "batch_size": 8, "eval_every": 3, "save_every": 2, "log_every": 1, "keep": 2}


def write(recipe, name: str, output: Path, **train) -> Path:
    model, rows, method, changes = CONFIGURATIONS[name]
    return recipe(model, rows, {**STEPS, **changes, **train}, name=f"{output.name}.yaml", method=method, output=str(output))


@pytest.fixture(scope="module")
def never_cut_off(tmp_path_factory):
    """Where the uninterrupted run of each configuration is, or is to be."""
    directory = tmp_path_factory.mktemp("whole")
    return {name: directory / name for name in CONFIGURATIONS}


@pytest.fixture
def whole(never_cut_off, ftkit, recipe, verify_here):
    """whole(name): the directory of the run of a configuration that nothing cut off."""

    def run(name: str) -> Path:
        directory = never_cut_off[name]
        if not directory.is_dir():
            outcome = ftkit("train", write(recipe, name, directory))
            assert outcome.code == 0, outcome.err
        return directory

    return run


def status(run: Path) -> tuple[str, int]:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return manifest["status"], manifest["exit_code"]


def killed(path: Path, place: str, call: int, *flags: str) -> None:
    """Run `ftkit train` in a process that kill -9 ends when `place` is called for the nth time."""
    process = KILLED.Process(target=_train_until_killed, args=(str(path), place, call, flags))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{place} is called less than {call} times"


def _train_until_killed(path: str, place: str, call: int, flags: tuple[str, ...]) -> None:
    from ftkit.cli import main

    send_at(place, call, signal.SIGKILL)
    os._exit(main(["train", path, *flags]))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_signals_in_every_stage_checkpoint_and_the_run_goes_on(name, ftkit, recipe, whole, tmp_path, monkeypatch, assert_same_run):
    path, run = write(recipe, name, tmp_path / "cut"), tmp_path / "cut"
    encode = {
        "prompts": "ftkit.tasks.causal_lm._plain_ids",
        "rewritten": "ftkit.tasks.seq2seq._ended",
        **dict.fromkeys(("masked", "texts"), "ftkit.tasks.masked_text.cut"),
    }.get(CONFIGURATIONS[name][1], "ftkit.tasks.problems.name_of")
    stops = [
        (encode, 40, signal.SIGTERM, 75),  # while rows are tokenised: nothing is written yet
        ("ftkit.evaluate.collate", 1, signal.SIGINT, 130),  # while the base is measured
        ("ftkit.loop.train_step", 1, signal.SIGUSR1, 75),
        ("ftkit.loop.train_step", 4, signal.SIGTERM, 75),
        ("ftkit.evaluate.collate", 1, signal.SIGINT, 130),  # after step 6
        ("ftkit.loop.train_step", 4, signal.SIGINT, 130),  # the last one
        ("ftkit.evaluate.collate", 1, signal.SIGTERM, 75),  # while the result is measured
    ]
    for number, (place, call, signum, code) in enumerate(stops):
        with monkeypatch.context() as patch:
            patch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
            send_at(place, call, signum, patch.setattr)
            outcome = ftkit("train", path, "--resume")
        assert outcome.code == code, f"{number}: {outcome.err}"
        assert "--resume" in outcome.err.splitlines()[-1]
        if number > 0:
            assert status(run) == ("interrupted" if code == 130 else "preempted", code)
    resumed = ftkit("train", path, "--resume")
    assert resumed.code == 0, resumed.err
    assert_same_run(run, whole(name))


KILLS = [  # one after the other, on one run
    ("ftkit.run.describe", 1),  # the directory is claimed, and nothing else
    ("ftkit.loop.train_step", 2),  # before the first checkpoint
    ("ftkit.checkpoint.save_file", 3),  # the optimizer's file of the first checkpoint
    ("ftkit.checkpoint._sync", 2),
    ("ftkit.checkpoint._rotate", 2),  # the second checkpoint is in place
    ("ftkit.loop.train_step", 3),
    ("ftkit.evaluate.collate", 1),
    ("shutil.rmtree", 2),  # an old checkpoint is being removed
    ("ftkit.finish.write_model", 1),
    ("ftkit.verify.check", 1),
]


@pytest.mark.parametrize(("name", "kills"), [("dropout-accumulate", KILLS), ("lora", KILLS[1::3]), ("bucketed", KILLS[2::3])])
def test_kill_9_anywhere_leaves_a_run_that_goes_on(name, kills, ftkit, recipe, whole, tmp_path, assert_same_run):
    path, run = write(recipe, name, tmp_path / "cut"), tmp_path / "cut"
    for place, call in kills:
        killed(path, place, call, "--resume")
    resumed = ftkit("train", path, "--resume")
    assert resumed.code == 0, resumed.err
    assert_same_run(run, whole(name))


def test_kill_9_while_a_run_is_replaced_leaves_nothing_of_the_old_one(ftkit, recipe, tmp_path, verify_here, assert_same_run):
    assert ftkit("train", write(recipe, "bucketed", tmp_path / "whole", steps=2)).code == 0
    path, run = write(recipe, "bucketed", tmp_path / "cut", steps=2), tmp_path / "cut"
    assert ftkit("train", path, "train.seed=1").code == 0
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    killed(path, "ftkit.trackers.open_trackers", 1, "--overwrite")
    assert [entry.name for entry in run.iterdir()] == ["manifest.json"]
    shutil.move(tmp_path / "checkpoints", run)  # as if it had not come so far
    assert ftkit("train", path, "--resume").code == 0
    assert_same_run(run, tmp_path / "whole")


STOPPED_EARLY = {"early_stopping": {"metric": "accuracy", "patience": 2}, "learning_rate": 1e-9}  # never better than the first time


@pytest.mark.parametrize(("place", "call"), [("ftkit.evaluate.collate", 5), ("ftkit.evaluate.collate", 7), ("ftkit.finish.write_model", 1)])
def test_early_stopping_counts_across_a_resume(place, call, ftkit, recipe, tmp_path, verify_here, monkeypatch, assert_same_run):
    """Stopped while the last evaluation that patience allows is made, while the result is measured, and killed thereafter."""
    whole = ftkit("train", write(recipe, "bucketed", tmp_path / "whole", **STOPPED_EARLY))
    assert "stopped early" in whole.err
    path = write(recipe, "bucketed", tmp_path / "cut", **STOPPED_EARLY)
    if "write_model" in place:
        killed(path, place, call)
    else:
        with monkeypatch.context() as patch:
            send_at(place, call, signal.SIGTERM, patch.setattr)
            assert ftkit("train", path).code == 75
    resumed = ftkit("train", path, "--resume")
    assert resumed.code == 0, resumed.err
    assert "stopped early" in resumed.err
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_corrupted_checkpoint_is_passed_over_for_the_one_before(ftkit, recipe, whole, tmp_path, assert_same_run):
    path, run = write(recipe, "dropout-accumulate", tmp_path / "cut"), tmp_path / "cut"
    killed(path, "ftkit.loop.train_step", 8)
    assert sorted(step.name for step in (run / "checkpoints").iterdir()) == ["step-4", "step-6"]
    weights = run / "checkpoints" / "step-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = ftkit("train", path, "--resume")
    assert resumed.code == 0, resumed.err
    assert "step-6 is not used: model.safetensors is not what was written" in resumed.err
    assert "continuing from" in resumed.err
    assert "step-4" in resumed.err
    assert_same_run(run, whole("dropout-accumulate"))


def test_resume_of_a_finished_run_says_so_and_changes_nothing(ftkit, recipe, tmp_path, verify_here):
    path, run = write(recipe, "bucketed", tmp_path / "run", steps=1), tmp_path / "run"
    assert ftkit("train", path).code == 0
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file()}
    again = ftkit("train", path, "--resume", "--json")
    assert again.code == 0
    assert "is finished" in again.err
    assert json.loads(again.out)["output"] == str(run)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file()} == before


def test_resume_under_another_recipe_is_refused_with_the_difference(ftkit, recipe, tmp_path, verify_here):
    path, run = write(recipe, "bucketed", tmp_path / "run"), tmp_path / "run"
    killed(path, "ftkit.loop.train_step", 4)
    before = (run / "manifest.json").read_bytes()
    refused = ftkit("train", path, "--resume", "train.learning_rate=5e-4", "train.seed=7")
    assert refused.code == 2
    assert "train.learning_rate: 0.001 before, 0.0005 now" in refused.err
    assert "train.seed: 42 before, 7 now" in refused.err
    assert (run / "manifest.json").read_bytes() == before
    allowed = ftkit("train", path, "--resume", "train.log_every=5")
    assert allowed.code == 0, allowed.err


def test_resume_starts_where_there_is_nothing_to_continue(ftkit, recipe, tmp_path, verify_here):
    path, run = write(recipe, "bucketed", tmp_path / "run", steps=1), tmp_path / "run"
    assert ftkit("train", path, "--resume").code == 0
    assert status(run) == ("finished", 0)


def test_resume_on_other_rows_is_refused(ftkit, recipe, data, tmp_path, verify_here):
    rows = tmp_path / "rows.csv"
    shutil.copy(data.single / "train.csv", rows)
    model, _, method, changes = CONFIGURATIONS["bucketed"]
    path = recipe(model, "single", {**STEPS, **changes}, method=method, output=str(tmp_path / "run"), data={"train": str(rows), "validation": 0.25})
    killed(path, "ftkit.loop.train_step", 4)
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    rows.write_text(rows.read_text() + "two old boats,harbour\n")
    refused = ftkit("train", path, "--resume")
    assert refused.code == 2
    assert "something else has come under the same names: data" in refused.err
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


def test_what_only_rounds_otherwise_may_change_and_is_told(ftkit, recipe, tmp_path, verify_here):
    path = write(recipe, "bucketed", tmp_path / "run")
    killed(path, "ftkit.loop.train_step", 4)
    resumed = ftkit("train", path, "--resume", "train.accumulate=2")
    assert resumed.code == 0, resumed.err
    assert "not bit for bit as without the interruption: train.accumulate: 1 before, 2 now" in resumed.err
