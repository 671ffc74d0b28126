"""Experiment trackers: TensorBoard, Weights & Biases, MLflow; each only when the recipe names it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ftkit.errors import MissingDependency


class Tracker(Protocol):
    """Where a run's numbers go besides `log.jsonl`."""

    name: str

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record finite numbers by name (`train/loss`, `validation/f1`); steps never go backwards."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    name = "tensorboard"

    def __init__(self, output: Path, config: dict[str, Any]) -> None:
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"), flush_secs=10)
        self._writer.add_text("recipe", "```yaml\n" + yaml.safe_dump(config, sort_keys=False) + "```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project WANDB_PROJECT (`ftkit` if unset); files in OUTPUT/wandb, WANDB_MODE as wandb reads it."""

    name = "wandb"

    def __init__(self, output: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ftkit"),
            name=os.environ.get("WANDB_NAME", output.name),
            dir=str(output),
            config=config,
            settings=wandb.Settings(console="off"),  # the progress display is not worth keeping
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run in MLFLOW_EXPERIMENT_NAME on MLFLOW_TRACKING_URI; in OUTPUT/mlruns where that is unset."""

    name = "mlflow"

    def __init__(self, output: Path, config: dict[str, Any]) -> None:
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow 3 refuses its file store unless told so, and mlflow-skinny lacks the databases that it prefers
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            mlflow.set_tracking_uri((output / "mlruns").resolve().as_uri())
        self._mlflow = mlflow
        mlflow.start_run(run_name=output.name)
        mlflow.log_params(_flat(config))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[MLflow]] = {tracker.name: tracker for tracker in (TensorBoard, WeightsAndBiases, MLflow)}


def check(names: Sequence[str]) -> None:
    """Raise MissingDependency where the package of a tracker is not installed."""
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise MissingDependency(f"train.trackers: {name} is not installed; pip install 'ftkit[{name}]'")


def open_trackers(names: Sequence[str], output: Path, config: dict[str, Any]) -> list[Tracker]:
    """The trackers that `train.trackers` names, each given the resolved recipe without secrets.

    Raises MissingDependency where a package is not installed or a tracker cannot start: what was asked
    for is refused before training rather than lost.
    """
    opened: list[Tracker] = []
    config = without_secrets(config)
    try:
        for name in names:
            opened.append(_open(name, output, config))
    except MissingDependency:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def _open(name: str, output: Path, config: dict[str, Any]) -> Tracker:
    try:
        return TRACKERS[name](output, config)
    except ImportError as error:
        raise MissingDependency(f"train.trackers: {name} is not installed ({error}); pip install 'ftkit[{name}]'") from error
    except Exception as error:  # a tracker's client raises whatever it likes: no login, no network, a full disk
        raise MissingDependency(f"train.trackers: {name} cannot start: {type(error).__name__}: {error}") from error


# Tokens of known form never get here, as no recipe may hold one; what is left is known by its name or its place in a URL.
SECRET_KEY = re.compile(r"((api|access|auth|hf|secret)_?)?(key|token)|password|passwd|secret|credentials?", re.IGNORECASE)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def without_secrets(value: Any) -> Any:
    """A copy of nested maps and lists in which whatever looks like a credential reads `[redacted]`."""
    if isinstance(value, dict):
        return {key: "[redacted]" if SECRET_KEY.fullmatch(str(key)) else without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return URL_LOGIN.sub("[redacted]", value) if isinstance(value, str) else value


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one map with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
