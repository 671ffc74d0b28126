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

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch.step()
        if state.global_step == state.max_steps:  # what comes after is not training
            self.watch.stop()


class Counted:
    """A collator that tells the watch how many real tokens each batch has."""

    def __init__(self, collator: Any, watch: Watch) -> None:
        self.collator, self.watch = collator, watch

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.watch.batch(sum(map(real_tokens, rows)))
        return self.collator(rows)


def real_tokens(row: dict[str, Any]) -> int:
    """Those that something is computed from: of language modelling the last token of a text only ends it, and packed rows hold many texts."""
    of_classes = isinstance(row.get("labels"), int)
    return len(row["input_ids"]) - (0 if of_classes else len(row.get("seq_lengths") or [1]))
