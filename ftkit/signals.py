"""Signals that ask a run to stop: the handler only notes the request, the run chooses the moment.

with listening() as stop:
    prepare(poll=stop.poll)     # nothing to save yet: raises at the next safe point
    ...
    if stop.requested:          # training: checkpoint first
        checkpoint.save(...)
        raise stop.error()
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from ftkit.errors import Interrupted, Preempted

if TYPE_CHECKING:
    from accelerate import Accelerator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether, and by which signal, the run was asked to stop.

    `signum` is 0 until a signal arrives.
    """

    signum = 0

    @property
    def requested(self) -> bool:
        return self.signum != 0

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether a stop was requested of any process of the run, which all of them know afterwards.  Collective."""
        if accelerator.num_processes == 1:
            return self.requested
        import torch

        everyone: Any = accelerator.gather(torch.tensor([self.signum], device=accelerator.device))
        agreed = int(everyone.max())
        if agreed:  # if not, a signal that came meanwhile must stay for the next time
            self.signum = agreed
        return agreed != 0

    def error(self) -> Preempted | Interrupted:
        """What to raise, once everything worth keeping is saved."""
        kind = Interrupted if self.signum == signal.SIGINT else Preempted
        return kind(f"stopped by {signal.Signals(self.signum).name}; the same command with --resume continues")

    def poll(self) -> None:
        """Raise Preempted or Interrupted if a stop was requested: for work that has nothing to save."""
        if self.requested:
            raise self.error()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of dying of them; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, the request stays empty.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    owner = os.getpid()

    def note(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker inherits this handler, but not the duty to save
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif signum == stop.signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            stop.signum = signum

    before = {signum: signal.signal(signum, note) for signum in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
