"""Stop requests: noted, not died of; restored afterwards; not inherited by workers."""

import contextlib
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from ftkit.errors import Interrupted, Preempted
from ftkit.signals import STOP_SIGNALS, StopRequest, listening


@pytest.mark.parametrize(
    ("signum", "error", "code"),
    [(signal.SIGTERM, Preempted, 75), (signal.SIGUSR1, Preempted, 75), (signal.SIGINT, Interrupted, 130)],
)
def test_a_signal_is_noted_and_raised_by_poll(signum, error, code):
    with listening() as stop:
        stop.poll()
        assert not stop.requested
        os.kill(os.getpid(), signum)
        assert stop.requested
        with pytest.raises(error, match=signal.Signals(signum).name) as caught:
            stop.poll()
    assert caught.value.code == code


def test_the_second_interrupt_is_immediate_but_a_second_sigterm_is_not():
    with listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored_after_an_error():
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with contextlib.suppress(Preempted), listening() as stop:
        stop.signum = signal.SIGTERM
        assert [signal.getsignal(signum) for signum in STOP_SIGNALS] != before
        stop.poll()
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


def test_a_forked_worker_dies_of_the_signal():
    with listening() as stop:
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert not stop.requested


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with listening() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize(("here", "elsewhere", "agreed"), [(0, 0, 0), (0, signal.SIGUSR1, signal.SIGUSR1), (signal.SIGTERM, 0, signal.SIGTERM)])
def test_all_processes_stop_for_a_signal_to_one(here, elsewhere, agreed):
    stop = StopRequest()
    stop.signum = here
    two = SimpleNamespace(num_processes=2, device="cpu", gather=lambda signum: torch.cat([signum, torch.tensor([elsewhere])]))
    assert stop.agreed(two) == bool(agreed)
    assert stop.signum == agreed


def test_a_signal_that_comes_while_the_processes_agree_counts_the_next_time():
    stop = StopRequest()

    def gather(own):
        stop.signum = signal.SIGTERM  # this process waits for the other one
        return torch.cat([own, torch.tensor([0])])

    two = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    assert not stop.agreed(two)  # the other process goes on: so must this one
    assert stop.agreed(two)
    assert stop.signum == signal.SIGTERM
