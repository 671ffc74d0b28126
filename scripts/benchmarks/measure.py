"""What a training process took: the same watch for every side of a comparison."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil


class Watch:
    """Wall time and peak memory of the training in this process."""

    def __init__(self) -> None:
        self.steps = 0
        self._started = self._ended = self._first = 0.0
        self._peak = 0

    def start(self) -> None:
        """Everything is loaded; the first batch comes next."""
        self._started = time.time()

    def step(self) -> None:
        """One more optimizer step is done."""
        self.steps += 1
        self._ended = time.time()
        if self.steps == 1:
            self._first = self._ended - psutil.Process().create_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._peak = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

    def write(self, path: Path, **facts: Any) -> None:
        """As JSON: `seconds` of training, `first_step` since the process began, `peak_memory` in bytes, and other facts."""
        taken = {"steps": self.steps, "seconds": self._ended - self._started, "first_step": self._first, "peak_memory": self._peak}
        path.write_text(json.dumps(taken | facts), encoding="utf-8")
