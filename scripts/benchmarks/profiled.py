"""Where the time of ftkit's training steps goes, by torch's profiler: JSON to stdout."""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.ftkit_loop import opened
from benchmarks.measure import wait
from ftkit.loop import Position, fit

SHOWN = 10


def took(event: Any, cuda: bool) -> float:
    """Microseconds that an operation took itself, others that it called left out: on the GPU, if there is one."""
    return event.self_device_time_total if cuda else event.self_cpu_time_total


def summary(events: Any, seconds: float, steps: int, cuda: bool) -> dict[str, Any]:
    """A step's milliseconds, those of its computation, and its `SHOWN` largest parts; kernels are counted with the operation that started them."""
    operations = [event for event in events if event.device_type == DeviceType.CPU and took(event, cuda) > 0]
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    largest = sorted(operations, key=lambda event: took(event, cuda), reverse=True)[:SHOWN]
    return {
        "step_ms": seconds * 1e3 / steps,
        "busy_ms": sum(took(event, cuda) for event in (kernels if cuda else operations)) / 1e3 / steps,
        "parts": [{"name": event.key, "ms": took(event, cuda) / 1e3 / steps, "calls": event.count / steps} for event in largest],
        "device": torch.cuda.get_device_name() if cuda else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--warm-up", type=int, default=3, metavar="STEPS", help="leave the first ones out")
    parser.add_argument("--steps", type=int, default=3, help="how many are looked at")
    parser.add_argument("--trace", metavar="FILE", help="keep what happened when, for ui.perfetto.dev; packed if it ends in .gz")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    _, session = opened(args.recipe, args.overrides)
    training = fit(session, Position())
    for _ in islice(training, args.warm_up):
        pass
    wait()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        began = time.monotonic()
        steps = len(list(islice(training, args.steps)))
        wait()
        seconds = time.monotonic() - began
    if args.trace:
        profiler.export_chrome_trace(args.trace)
    print(json.dumps(summary(profiler.key_averages(), seconds, steps, cuda)))


if __name__ == "__main__":
    main()
