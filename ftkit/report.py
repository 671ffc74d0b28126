"""What a run tells of itself while it works: notes, progress, `log.jsonl`, trackers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, BinaryIO

from ftkit.errors import DiskError
from ftkit.progress import LINE_AFTER, Stage, open_display
from ftkit.quantities import duration, metrics_line, number, size

if TYPE_CHECKING:
    from ftkit.trackers import Tracker

FACTS = {  # key of a log record -> how the progress display words it
    "epoch": "epoch {:.2f}",
    "loss": "loss {:#.4g}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.2g}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class Reporter:
    """Tells the user (on stderr), `log.jsonl` and the trackers what a run does.

    Only the main process has anything to tell.  `quiet` leaves out notes and progress, never a warning.
    `notes` collects notes and warnings for the manifest.
    """

    def __init__(self, log: Path | None, quiet: bool = False, main: bool = True) -> None:
        self.notes: list[str] = []
        self._main = main
        self._quiet = quiet or not main
        self._warns = main
        self._log = log
        self._log_file: BinaryIO | None = None  # opened by the first line: a run that is refused leaves no file
        self._trackers: list[Tracker] = []
        self._display = open_display(sys.stderr)
        self._stages: list[Stage] = []
        self._watch = OverfittingWatch()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in list(self._trackers):
            self._guard(tracker, tracker.close)
        self._close_log()

    def track(self, trackers: Sequence[Tracker]) -> None:
        """Tell these trackers, too, and close them at the end; one that fails is dropped with a warning."""
        self._trackers += trackers if self._main else []

    def note(self, text: str) -> None:
        """Say what was applied, changed or substituted."""
        self.notes.append(text)
        self._say(text)

    def warn(self, text: str) -> None:
        """Say what the user probably does not want."""
        self.notes.append(f"warning: {text}")
        if self._warns:
            self._display.print(f"warning: {text}", style="yellow")

    @contextmanager
    def told(self, by_another: bool) -> Iterator[None]:
        """Collect notes and warnings without a word where another process has told them already."""
        before = self._quiet, self._warns
        if by_another:
            self._quiet, self._warns = True, False
        try:
            yield
        finally:
            self._quiet, self._warns = before

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        """Progress of a piece of work, of `total` parts where that is known; nothing if it is over at once."""
        with self._shown(Stage(title, total)) as stage:
            yield stage
        if stage.seconds >= LINE_AFTER and not self._stages:
            self._say(f"{title}: {', '.join(filter(None, [stage.count, duration(stage.seconds)]))}")

    @contextmanager
    def training(self, total_steps: int, done: int = 0) -> Iterator[Stage]:
        """Progress of the optimizer steps, `done` of which an earlier process made.

        `advance()` the stage after each step; `Reporter.step` at log steps keeps its facts up to date.
        """
        with self._shown(Stage("training", total_steps, done)) as stage:
            yield stage
        self._say(f"trained to step {stage.done:,} in {duration(stage.seconds)}")

    def step(self, record: Mapping[str, Any]) -> None:
        """Log a step: step, epoch, loss, learning_rate, grad_norm, tokens_per_second, peak_memory_bytes.

        The last is measured here where it is missing.  Raises DiskError if the line cannot be written.
        """
        if not self._main:
            return
        record = dict(record)
        record.setdefault("peak_memory_bytes", peak_memory())
        self._write(record)
        self._track(record["step"], "train", record)
        self._watch.trained(record["loss"])
        if self._stages and not self._quiet:
            training = self._stages[0]
            training.done = record["step"]
            training.facts = [form.format(record[key]) for key, form in FACTS.items() if record.get(key) is not None]
            training.facts.append(size(record["peak_memory_bytes"]))
            self._display.update(training)

    def evaluation(self, step: int, name: str, metrics: Mapping[str, float]) -> None:
        """Log what was measured on the set `name` after `step`.  Raises DiskError as `step` does."""
        if not self._main:
            return
        self._write({"step": step, "split": name, **metrics})
        self._track(step, name, metrics)
        self._say(f"step {step:,}  {name}: {metrics_line(metrics)}")
        if "loss" in metrics and (warning := self._watch.evaluated(step, name, metrics["loss"])):
            self.warn(warning)

    def log_position(self) -> int:
        """Length of the log in bytes: what a checkpoint stores for `cut_log`."""
        return self._log.stat().st_size if self._log and self._log.exists() else 0

    def cut_log(self, position: int) -> None:
        """Forget the lines after `position`: steps that a resumed run makes again."""
        if not (self._main and self._log):
            return
        self._close_log()
        if self.log_position() > position:
            os.truncate(self._log, position)

    def print_summary(self, summary: Mapping[str, Any]) -> None:
        """Print the results to stdout; see `ftkit.summary`."""
        from ftkit.summary import print_summary

        if self._main:
            print_summary(summary)

    @contextmanager
    def _shown(self, stage: Stage) -> Iterator[Stage]:
        self._stages.append(stage)
        if not self._quiet:
            self._display.show(stage)
        try:
            yield stage
        finally:
            self._stages.remove(stage)
            if not self._quiet:
                self._display.hide(stage)

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._display.print(text)

    def _write(self, record: Mapping[str, Any]) -> None:
        """Append one line.  JSON has no NaN and no infinity: they become null."""
        if self._log is None:
            return
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        try:
            self._log_file = self._log_file or self._log.open("ab")
            self._log_file.write(json.dumps(finite).encode() + b"\n")
            self._log_file.flush()
        except OSError as error:
            raise DiskError(f"cannot write {self._log}: {error.strerror}") from error

    def _close_log(self) -> None:
        if self._log_file:
            self._log_file.close()
            self._log_file = None

    def _track(self, step: int, group: str, record: Mapping[str, Any]) -> None:
        values = {f"{group}/{key}": float(value) for key, value in record.items() if key != "step" and isinstance(value, int | float) and math.isfinite(value)}
        for tracker in list(self._trackers):
            self._guard(tracker, partial(tracker.log, step, values))

    def _guard(self, tracker: Tracker, action: Callable[[], None]) -> None:
        """A tracker that fails, in whatever way, is dropped: hours of training are worth more than its plots."""
        try:
            action()
        except Exception as error:
            self._trackers.remove(tracker)
            self.warn(f"{tracker.name} failed ({type(error).__name__}: {error}); the run goes on without it")


class OverfittingWatch:
    """Notices, once a run, that a validation loss rose twice in a row while the training loss fell."""

    def __init__(self) -> None:
        self._train_losses: list[float] = []  # since the last evaluation
        self._train_loss = math.nan  # their mean, for all sets measured after the same step
        self._history: dict[str, list[tuple[int, float, float]]] = {}  # set -> (step, its loss, training loss)
        self._warned = False

    def trained(self, loss: float) -> None:
        self._train_losses.append(loss)

    def evaluated(self, step: int, name: str, loss: float) -> str | None:
        """The warning, if it is time for it."""
        if self._train_losses:
            self._train_loss, self._train_losses = fmean(self._train_losses), []
        history = self._history.setdefault(name, [])
        history.append((step, loss, self._train_loss))
        if self._warned or len(history) < 3:
            return None
        (_, first, trained), (_, second, _), (_, third, fitted) = history[-3:]
        self._warned = first < second < third and fitted < trained
        if not self._warned:
            return None
        course = ", ".join(f"{number(value)} (step {at:,})" for at, value, _ in history[-3:])
        return (
            f"the model overfits: {name} loss rose twice in a row, {course}, while the training loss fell from "
            f"{number(trained)} to {number(fitted)}. Train less (train.epochs), or let train.early_stopping: {{patience: 2}} "
            "stop the run and keep the best checkpoint"
        )


def peak_memory() -> int:
    """Most bytes this process ever held: on the GPU if it uses one, else resident in main memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
