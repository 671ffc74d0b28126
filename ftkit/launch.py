"""Many processes: who we are under torchrun, accelerate or srun, and torchrun started by ourselves.

torchrun turns every failure of a rank into exit code 1.  Each rank of ours therefore leaves its code and
message in a file (`leave_error`), from which `launch` tells the cause.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit import device
from ftkit.errors import FtkitError, Interrupted, Preempted, RecipeError
from ftkit.signals import STOP_SIGNALS, StopRequest

if TYPE_CHECKING:
    from ftkit.recipe.spec import Train

ERROR_DIR = "FTKIT_ERROR_DIR"
STOPPED = (Preempted.code, Interrupted.code)


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    local_rank: int = 0  # among those on this machine: the index of its GPU
    size: int = 1


def world() -> World:
    """This process among those that torchrun, accelerate launch or srun started; alone if none did.

    Under srun, sets the variables that torch.distributed reads.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
    # inside an allocation, SLURM_NTASKS is what was asked of the job: the step says how many really run
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if tasks == 1 or "SLURM_PROCID" not in env:
        return World()
    here = World(int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), tasks)
    env.update(RANK=str(here.rank), LOCAL_RANK=str(here.local_rank), WORLD_SIZE=str(here.size))
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"))
    # the same on all ranks, another for each step of the job, below the ports that Linux gives out itself
    step = 31 * int(env.get("SLURM_JOB_ID", 0)) + int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_PORT", str(20000 + step % 12000))
    return here


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: `gpu[007-012,15],login` begins with `gpu007`."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def processes(train: Train) -> int:
    """How many processes the run takes: more than `world().size` means that they are to be launched.

    Raises RecipeError if a launcher started another number than the recipe asks for, or there are not as many GPUs.
    """
    here = world()
    if here.size > 1 or "RANK" in os.environ:
        if train.processes not in ("auto", here.size):
            raise RecipeError(
                f"train.processes: {train.processes}, but the launcher started {here.size}; leave train.processes out, or start ftkit without a launcher"
            )
        return here.size
    if train.processes == 1:
        return 1
    import torch

    num_gpus = torch.cuda.device_count()
    if train.processes == "auto":
        return max(1, num_gpus)
    if 0 < num_gpus < train.processes:
        raise RecipeError(f"train.processes: {train.processes}, but there are {num_gpus} GPUs here")
    return train.processes


def leave_error(code: int, message: str) -> bool:
    """Tell the process that launched this rank why it ends; False if nobody asked, so that the rank must say it itself."""
    directory = os.environ.get(ERROR_DIR)
    if directory is None:
        return False
    report = Report(world().rank, code, message, time.time())
    Path(directory, f"rank-{report.rank}.json").write_text(json.dumps(report._asdict()), encoding="utf-8")
    return True


class Report(NamedTuple):
    """How a rank ended."""

    rank: int
    code: int
    message: str
    time: float  # seconds since the epoch
    silent: bool = False  # it died without a word


def launch(argv: Sequence[str], num_processes: int, module: str = "ftkit") -> None:
    """Run `python -m module *argv` as `num_processes` ranks on this machine, through torchrun's own API.

    SIGTERM, SIGUSR1 and SIGINT go to the ranks, as often as they come.  When one rank fails, torchrun ends
    the others, and the error that caused it is raised here.
    """
    with tempfile.TemporaryDirectory(prefix="ftkit-ranks-") as directory, _forwarding_signals() as stop:
        try:
            from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
            from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        finally:
            stop.poll()  # what a signal raises while modules are imported, some of them catch, or turn into another error
        elastic = logging.getLogger("torch.distributed.elastic")
        elastic.addHandler(logging.NullHandler())
        elastic.propagate = False  # it would tell of every rank's end once more, in its own words
        os.environ[ERROR_DIR] = directory
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, device.num_cores() // num_processes)))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=Path(directory).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=directory),
            signals_to_handle="SIGQUIT",  # the others are ours: torchrun would kill the ranks 30 s later, checkpoint or not
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", module, *argv)  # -P: a user's torch.py stays off the path
        except ChildFailedError as failed:
            cause = _cause([*_told(directory), *_silent(directory, failed.failures)], stop)
            kinds = {kind.code: kind for kind in FtkitError.__subclasses__()}
            raise kinds.get(cause.code, FtkitError)(cause.message) from None
        finally:
            del os.environ[ERROR_DIR]


@contextmanager
def _forwarding_signals() -> Iterator[StopRequest]:
    """Hand signals that ask for an end on to the ranks, which run in sessions of their own."""
    import psutil  # not above: every error of the command line passes through this file

    stop = StopRequest()

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum in STOP_SIGNALS:
            stop.signum = signum
        ranks = psutil.Process().children()
        if not ranks:
            stop.poll()  # raises here, in the launcher, while there is nothing to stop but itself
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signum)

    # a closed terminal must not leave ranks behind; under nohup it is ignored, and stays so
    signals = [*STOP_SIGNALS, signal.SIGHUP]
    before = {signum: signal.signal(signum, forward) for signum in signals if signal.getsignal(signum) is not signal.SIG_IGN}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _told(directory: str) -> Iterator[Report]:
    for file in Path(directory).glob("rank-*.json"):
        yield Report(**json.loads(file.read_text(encoding="utf-8")))


def _silent(directory: str, failures: Mapping[int, Any]) -> Iterator[Report]:
    """Ranks that died without a report, by what torchrun saw of them."""
    for rank, failure in failures.items():
        if Path(directory, f"rank-{rank}.json").exists():
            continue
        code, message = 1, f"rank {rank} ended with exit code {failure.exitcode} and no message"
        if failure.exitcode > 0:
            code = failure.exitcode
        elif -failure.exitcode in STOP_SIGNALS:
            stop = StopRequest()
            stop.signum = -failure.exitcode
            code, message = stop.error().code, str(stop.error())
        else:
            message = f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
            if failure.exitcode == -signal.SIGKILL:
                message += ": most often the system does that when memory runs out"
        yield Report(rank, code, message, failure.timestamp, silent=True)


def _cause(reports: Sequence[Report], stop: StopRequest) -> Report:
    """The report that explains the others: the gravest, and of those the first in time.

    When one rank ends, the others lose their connection or are stopped by torchrun's SIGTERM: an
    unexpected error, or a stop that nobody asked for, is their echo.  So a documented error comes first,
    then a stop that was asked for, then a rank that was killed, then the rest.
    """

    def order(report: Report) -> tuple[int, float]:
        if report.code in STOPPED:
            return (1 if stop.requested else 4), report.time
        if report.code != FtkitError.code:
            return 0, report.time
        return (2 if report.silent else 3), report.time

    return min(reports, key=order)
