"""Rows -> features on all cores, in the order of the rows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from ftkit import device
from ftkit.data.types import Features, Limits, Row, RowError
from ftkit.recipe.spec import Spec

if TYPE_CHECKING:
    from ftkit.tasks import Task

ROWS_A_PROCESS = 10_000  # fewer are tokenised sooner than a process has imported what it needs, 5 s
CHUNK = 256  # rows handed over together
AHEAD = 4  # chunks of each process that wait for the reader, so that features do not pile up

Outcome = list[Features] | str  # of a row: its features, or why it cannot be used


def outcomes(rows: Sequence[Row], task: Task, tokenizer: Any, limits: Limits, poll: Callable[[], None]) -> Iterator[Outcome]:
    """What the task makes of each row; `poll` is called between rows and may raise to stop."""
    workers = min(device.num_cores(), len(rows) // ROWS_A_PROCESS)
    if type(tokenizer).__module__.startswith("transformers_modules"):  # code of a repository, which another process would not find
        workers = 1
    if workers < 2:
        for row in rows:
            poll()
            yield outcome(row, task, tokenizer, limits)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take torch's and the tokenizer's threads with it half
    assert isinstance(task, Spec), "a plugin class is its own spec"
    settings = type(task).model_validate(task.model_dump())  # without what it keeps of this process
    pool = ProcessPoolExecutor(workers, context, _open, (settings, tokenizer, limits))
    try:
        waiting: deque[Future[list[Outcome]]] = deque()
        for start in range(0, len(rows), CHUNK):
            poll()
            waiting.append(pool.submit(_encode, rows[start : start + CHUNK]))
            if len(waiting) > AHEAD * workers:
                yield from _result(waiting.popleft(), poll)
        while waiting:
            yield from _result(waiting.popleft(), poll)
    finally:
        pool.shutdown(cancel_futures=True)


def outcome(row: Row, task: Task, tokenizer: Any, limits: Limits) -> Outcome:
    """What the task makes of one row."""
    try:
        return task.encode(row, tokenizer, limits)
    except RowError as error:
        return str(error)


def _result(future: Future[list[Outcome]], poll: Callable[[], None]) -> list[Outcome]:
    while True:
        try:
            return future.result(timeout=0.2)
        except TimeoutError:
            poll()
        except BrokenProcessPool:  # perhaps by the signal that asks to stop
            poll()
            raise


_work: tuple[Task, Any, Limits]  # of a process of the pool


def _open(task: Task, tokenizer: Any, limits: Limits) -> None:
    """Begin a process of the pool: Ctrl-C is the reader's business, and without a reader there is no work."""
    global _work
    _work = task, tokenizer, limits
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(rows: Sequence[Row]) -> list[Outcome]:
    return [outcome(row, *_work) for row in rows]
