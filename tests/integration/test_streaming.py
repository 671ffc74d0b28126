"""data.streaming: the same run from disk, to the bit, and resumable as any."""

import json
import signal

import pytest
from stopping import send_at

RUNS = {
    "classification-fraction-limit": ("bert", "single", {"kind": "full"}, {"validation": 0.25, "limit": 20}, {}),
    "pairs-bucketed": ("bert", "pairs", {"kind": "partial", "last": 1}, {}, {"layout": "bucketed"}),
    "rewritten-tokens": ("bart", "rewritten", {"kind": "full"}, {}, {"batch_size": None, "batch_tokens": 200}),
    "chats-lora-tokens": ("llama", "chats", {"kind": "lora", "r": 4, "dropout": 0.2}, {}, {"batch_size": None, "batch_tokens": 300}),
}


@pytest.fixture
def pair(recipe, data, tmp_path):
    """Recipes of the same run in memory and on disk, and where each goes."""

    def write(name):
        model, rows, method, changes, train = RUNS[name]
        directory = getattr(data, rows)
        files = {split: str(next(directory.glob(f"{split}.*"))) for split in ("train", "validation", "test")}
        made = []
        for streaming in (False, True):
            output = tmp_path / ("disk" if streaming else "memory")
            settings = {**files, **changes, "streaming": streaming}
            path = recipe(model, rows, {"steps": 10, **train}, name=f"{output.name}.yaml", method=method, data=settings, output=str(output))
            made.append((path, output))
        return made

    return write


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_disk_is_that_from_memory(name, pair, ftkit, verify_here, assert_same_run, monkeypatch, tmp_path):
    (memory, one), (disk, two) = pair(name)
    for path, cache in ((memory, "a"), (disk, "b")):
        monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / cache))  # each makes its tokens itself
        outcome = ftkit("train", path)
        assert outcome.code == 0, outcome.err
    assert_same_run(one, two)
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (one, two)]
    for key in ("data", "notes", "parameters"):
        assert manifests[0][key] == manifests[1][key], key


@pytest.mark.parametrize("first", ["true", "false"])
def test_it_goes_on_where_it_was_stopped_perhaps_in_memory(first, pair, ftkit, verify_here, assert_same_run, monkeypatch):
    (memory, one), (disk, two) = pair("classification-fraction-limit")
    assert ftkit("train", memory).code == 0
    with monkeypatch.context() as patch:
        send_at("ftkit.loop.train_step", 5, signal.SIGTERM, patch.setattr)
        assert ftkit("train", disk, f"data.streaming={first}").code == 75
    outcome = ftkit("train", disk, "--resume")
    assert outcome.code == 0, outcome.err
    assert_same_run(one, two)


@pytest.mark.parametrize("command", ["check", "show"])
def test_other_commands_read_such_a_recipe_too(command, pair, ftkit):
    _, (disk, _) = pair("classification-fraction-limit")
    outcome = ftkit(command, disk)
    assert outcome.code == 0, outcome.err


def test_a_smoke_run_reads_it_too(pair, ftkit):
    _, (disk, _) = pair("chats-lora-tokens")
    outcome = ftkit("train", disk, "--smoke")
    assert outcome.code == 0, outcome.err
