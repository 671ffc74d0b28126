"""How long models take, beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

WARM_UP = 3  # turns that take no part in medians


def in_turns(calls: Mapping[str, Callable[[int], Any]], count: int) -> dict[str, float]:
    """Median seconds of `count` calls of each, by its name, after a few to warm up; they take turns, so that other load meets all alike.

    Each is given the number of the turn, from 0, and returns when its numbers are there: a GPU computes behind the program's back.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + count):
        for name, call in calls.items():
            begun = time.perf_counter()
            call(turn)
            seconds[name].append(time.perf_counter() - begun)
    return {name: median(taken[WARM_UP:]) for name, taken in seconds.items()}
