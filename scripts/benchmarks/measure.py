"""What a training process took: the same watch for every side of a comparison."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch


class Watch:
    """Wall time, real tokens and peak memory of the training in this process; the first `warm_up` steps take no part in time and tokens.

    A GPU computes behind the program's back: it is waited for where the clock is read, and nowhere else.
    """

    def __init__(self, warm_up: int = 0) -> None:
        self.warm_up, self.steps = warm_up, 0
        self._started = self._ended = self._first = 0.0
        self._peak = 0
        self._tokens: list[int] = []

    def start(self) -> None:
        """Everything is loaded; the first batch comes next."""
        self._started = time.time()

    def batch(self, tokens: int) -> None:
        """One more batch was made, of so many real tokens; the steps take them in this order."""
        self._tokens.append(tokens)

    def step(self) -> None:
        """One more optimizer step is done."""
        self.steps += 1
        if self.steps in (1, self.warm_up):
            wait()
        self._ended = time.time()
        if self.steps == 1:
            self._first = self._ended - psutil.Process().create_time()
        if self.steps == self.warm_up:
            self._started = self._ended
        self._peak = peak_memory()

    def stop(self) -> None:
        """That was the last step."""
        wait()
        self._ended = time.time()

    def write(self, path: Path, **facts: Any) -> None:
        """As JSON: `seconds` and `tokens` of training, `first_step` since the process began, `peak_memory` in bytes, `device`, and other facts."""
        taken = {
            "steps": self.steps,
            "seconds": self._ended - self._started,
            "tokens": sum(self._tokens[self.warm_up : self.steps]),
            "first_step": self._first,
            "peak_memory": self._peak,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        }
        path.write_text(json.dumps(taken | facts), encoding="utf-8")


def wait() -> None:
    """Until the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: what tensors took of the GPU's memory, or, without one, the process of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
