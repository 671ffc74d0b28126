"""Reads the watch of a comparison inside transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.measure import Watch


class Clock(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.step()
