"""TensorBoard for real, W&B and MLflow through stand-ins with the calls that the real ones take."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from ftkit.errors import MissingDependency
from ftkit.trackers import open_trackers, without_secrets

CONFIG = {"model": {"name": "bert", "config": {"api_key": "abc123"}}, "train": {"learning_rate": 1e-4, "trackers": ["wandb"]}}


@pytest.fixture
def wandb(monkeypatch):
    """A module that records how it was called."""
    calls: list[tuple] = []
    run = SimpleNamespace(log=lambda values, step: calls.append(("log", values, step)), finish=lambda: calls.append(("finish",)))

    def init(**kwargs):
        calls.append(("init", kwargs))
        return run

    module = ModuleType("wandb")
    module.init, module.Settings, module.calls = init, lambda **kwargs: kwargs, calls
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    calls: list[tuple] = []
    module = ModuleType("mlflow")
    module.calls = calls
    module.set_tracking_uri = lambda uri: calls.append(("uri", uri))
    module.start_run = lambda run_name: calls.append(("start", run_name))
    module.log_params = lambda params: calls.append(("params", params))
    module.log_metrics = lambda values, step: calls.append(("metrics", values, step))
    module.end_run = lambda: calls.append(("end",))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # so that what is set below is undone
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return module


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(["tensorboard"], tmp_path, CONFIG)
    tracker.log(1, {"train/loss": 0.5})
    tracker.log(2, {"train/loss": 0.25, "validation/f1": 1.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("validation/f1")] == [(2, 1.0)]
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.0001" in text
    assert "abc123" not in text


def test_wandb_gets_the_recipe_and_the_numbers(tmp_path, wandb):
    (tracker,) = open_trackers(["wandb"], tmp_path / "cola", CONFIG)
    tracker.log(1, {"train/loss": 0.5})
    tracker.close()
    (_, init), *rest = wandb.calls
    assert (init["project"], init["name"], init["dir"]) == ("ftkit", "cola", str(tmp_path / "cola"))
    assert init["config"]["train"]["learning_rate"] == 1e-4
    assert "mode" not in init  # WANDB_MODE decides
    assert rest == [("log", {"train/loss": 0.5}, 1), ("finish",)]


def test_wandb_takes_its_project_from_the_environment(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "thesis")
    open_trackers(["wandb"], tmp_path, CONFIG)
    assert wandb.calls[0][1]["project"] == "thesis"


def test_mlflow_stays_in_the_run_directory(tmp_path, mlflow):
    (tracker,) = open_trackers(["mlflow"], tmp_path / "cola", CONFIG)
    tracker.log(1, {"train/loss": 0.5})
    tracker.close()
    assert mlflow.calls == [
        ("uri", (tmp_path / "cola" / "mlruns").as_uri()),
        ("start", "cola"),
        ("params", {"model.name": "bert", "model.config.api_key": "[redacted]", "train.learning_rate": 1e-4, "train.trackers": ["wandb"]}),
        ("metrics", {"train/loss": 0.5}, 1),
        ("end",),
    ]


def test_mlflow_goes_where_its_environment_says(tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    open_trackers(["mlflow"], tmp_path, CONFIG)
    assert [name for name, *_ in mlflow.calls] == ["start", "params"]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"train.trackers: {name} is not installed .*pip install 'ftkit\[{name}\]'") as caught:
        open_trackers([name], tmp_path, CONFIG)
    assert caught.value.code == 4


def test_a_tracker_that_cannot_start_is_refused_and_the_others_closed(tmp_path, wandb, mlflow):
    def refuse(**kwargs):
        raise RuntimeError("No API key configured")

    wandb.init = refuse
    with pytest.raises(MissingDependency, match="wandb cannot start: RuntimeError: No API key configured"):
        open_trackers(["mlflow", "wandb"], tmp_path, CONFIG)
    assert mlflow.calls[-1] == ("end",)


def test_secrets_are_told_from_what_only_sounds_like_them():
    config = {
        "hf_token": "a",
        "Password": "b",
        "nested": [{"secret_key": "c", "tokenizer": "bert", "eos_token": "</s>", "key": "d"}],
        "data": "https://me:pass@example.org/rows.csv",
        "shape": (1, 2),
    }
    assert without_secrets(config) == {
        "hf_token": "[redacted]",
        "Password": "[redacted]",
        "nested": [{"secret_key": "[redacted]", "tokenizer": "bert", "eos_token": "</s>", "key": "[redacted]"}],
        "data": "https://[redacted]@example.org/rows.csv",
        "shape": [1, 2],
    }
