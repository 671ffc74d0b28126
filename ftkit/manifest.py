"""manifest.json: what a run was, on what, and how it ended."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import device, rundir
from ftkit.errors import FtkitError

if TYPE_CHECKING:
    from types import TracebackType

    from ftkit.session import Session

PACKAGES = ("ftkit", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers", "safetensors", "numpy")
STATUS = {75: "preempted", 130: "interrupted"}


class Manifest:
    """The manifest of a run in progress; written when it changes, and with the status when the run ends."""

    def __init__(self, output: Path, facts: dict[str, Any], main: bool) -> None:
        self._path, self._main = output / "manifest.json", main
        self.facts = facts
        self._started = time.time()

    def __enter__(self) -> Manifest:
        self.update(status="running", exit_code=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            code = error.code if isinstance(error, FtkitError) else 130 if isinstance(error, KeyboardInterrupt) else 1
            self.update(status=STATUS.get(code, "failed"), exit_code=code, error=str(error) or type(error).__name__, seconds_before=round(self.seconds, 1))

    def __getitem__(self, key: str) -> Any:
        return self.facts[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.facts.get(key, default)

    def update(self, **facts: Any) -> None:
        """Take the facts in and write the file."""
        self.facts |= facts
        if self._main:
            rundir.write_json(self._path, self.facts)

    def finish(self, **facts: Any) -> None:
        """The run is done and verified."""
        self.facts.pop("error", None)
        self.update(status="finished", exit_code=0, **facts)

    @property
    def seconds(self) -> float:
        """Wall time of this run so far, that of the parts before a resume included."""
        return self.get("seconds_before", 0.0) + time.time() - self._started


def describe(session: Session) -> dict[str, Any]:
    """What the run is made of: versions, model, data, seed, hardware, parameters."""
    import torch

    prepared, recipe = session.prepared, session.recipe
    groups = session.parameters
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "schema": 1,
        "task": recipe.task.kind,
        "method": recipe.method.kind,
        "objective": recipe.objective.kind,
        "teacher": rundir.teacher_sha256(recipe),
        "model": {"name": recipe.model.name, "revision": prepared.commit, "architecture": type(session.base.model).__name__},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "data": {"sha256": prepared.rows.sha256, "columns": prepared.rows.columns, "left_out": prepared.rows.bad, "audit": prepared.audits},
        "seed": recipe.train.seed,
        "hardware": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": device.num_cores(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
            "processes": session.accelerator.num_processes,
        },
        "precision": session.precision,
        "layout": session.sampler.layout,
        "parameters": {
            "trainable": sum(group["trainable"] for group in groups.values()),
            "total": sum(group["total"] for group in groups.values()),
            "groups": groups,
        },
    }


def _version(package: str) -> str | None:
    """The installed version; None where the package is not."""
    from importlib.metadata import PackageNotFoundError

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name as the system gives it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
