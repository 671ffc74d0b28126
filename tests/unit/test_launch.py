"""Real ranks under torchrun: results, causes, signals; and who we are under other launchers."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ftkit import launch
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Train
from ftkit.signals import StopRequest

RANK = """
import os, sys, time
from ftkit.errors import DataError, FtkitError
from ftkit.launch import leave_error, world
from ftkit.signals import listening

def all_reduce():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    value = torch.tensor([float(world().rank + 1)])
    dist.all_reduce(value)
    return value.item()

def main(what, stop):
    rank = world().rank
    if what == "sum":
        line = f"rank {rank}: {all_reduce()} threads {os.environ['OMP_NUM_THREADS']}\\n"
        os.write(1, line.encode())  # in one piece, whatever the other rank prints meanwhile
    elif what == "data-error":
        all_reduce()
        if rank == 1:
            raise DataError("train.csv:7: no label")
        all_reduce_again()
    elif what == "killed":
        all_reduce()
        if rank == 1:
            os.kill(os.getpid(), 9)
        all_reduce_again()
    elif what == "train":
        os.write(1, b"training\\n")
        while True:
            time.sleep(0.02)
            if stop.requested:
                time.sleep(1.0)  # writes the checkpoint
                raise stop.error()
    elif what == "stubborn":
        os.write(1, b"training\\n")
        while True:
            time.sleep(0.02)

def all_reduce_again():
    import torch, torch.distributed as dist
    dist.all_reduce(torch.zeros(1))

code = 0
with listening() as stop:
    try:
        main(sys.argv[1], stop)
    except FtkitError as error:
        code = error.code
        leave_error(code, str(error))
    except KeyboardInterrupt:
        code = 130
        leave_error(code, "at once")
    except Exception as error:
        code = 1
        leave_error(code, f"unexpected: {error}")
os._exit(code)
"""

PARENT = """
import sys
from ftkit.errors import FtkitError
from ftkit.launch import launch
print("launching", flush=True)
try:
    launch(sys.argv[1:], 2, module="tiny_rank")
except FtkitError as error:
    print(error, file=sys.stderr)
    sys.exit(error.code)
"""


@pytest.fixture
def start(tmp_path):
    """Start the launcher in a process of its own; returns it, and ends it if the test did not."""
    (tmp_path / "tiny_rank.py").write_text(RANK)
    started = []

    def run(what, **env):
        (tmp_path / "parent.py").write_text(PARENT)
        clean = {name: value for name, value in os.environ.items() if name not in {"OMP_NUM_THREADS", "RANK", "WORLD_SIZE"}}
        started.append(
            subprocess.Popen(
                [sys.executable, str(tmp_path / "parent.py"), what],
                env=clean | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)} | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=listen_to_signals,
            )
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            for member in (*psutil.Process(process.pid).children(recursive=True), process):
                member.kill()
            process.wait()


def listen_to_signals():
    """A shell starts what it puts into the background with SIGINT ignored, and nohup with SIGHUP: the tests may have been started so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def both_train(process):
    assert process.stdout.readline() == "launching\n"
    for _ in range(2):
        assert process.stdout.readline() == "training\n"


def test_two_ranks_reduce_and_share_the_cores(start, tmp_path):
    process = start("sum")
    out, err = process.communicate(timeout=60)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(out.splitlines())[1:] == [f"rank {rank}: 3.0 threads {threads}" for rank in range(2)], err
    assert process.returncode == 0
    assert err == ""
    assert [path.name for path in tmp_path.iterdir() if "ranks" in path.name or "torchelastic" in path.name] == []


def test_the_threads_the_user_chose_stay(start):
    out, _ = start("sum", OMP_NUM_THREADS="7").communicate(timeout=60)
    assert "threads 7" in out


def test_an_error_of_one_rank_ends_all_with_its_code_and_message(start):
    process = start("data-error")
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.count("train.csv:7: no label") == 1
    assert "Traceback" not in err
    assert time.monotonic() - began < 30


def test_a_rank_that_is_killed_is_named(start):
    process = start("killed")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("rank 1 was killed by SIGKILL")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_lets_the_ranks_finish_their_checkpoint(signum, code, start):
    process = start("train")
    both_train(process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == f"stopped by {signal.Signals(signum).name}; the same command with --resume continues\n"


def test_a_signal_before_there_are_ranks_ends_the_launcher(start):
    process = start("train")
    assert process.stdout.readline() == "launching\n"
    time.sleep(0.2)  # it imports torch now, which takes seconds
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err.startswith("stopped by SIGTERM")


def test_a_second_interrupt_reaches_the_ranks_too(start):
    process = start("stubborn")
    both_train(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "at once\n")


def test_a_closed_terminal_leaves_no_rank_behind(start):
    process = start("stubborn")
    both_train(process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "was killed by SIGHUP" in err


def report(rank, code, time, silent=False):
    return launch.Report(rank, code, f"{rank}", time, silent)


@pytest.mark.parametrize(
    ("reports", "signum", "cause"),
    [
        ([report(0, 1, 5.0), report(1, 3, 5.1)], 0, 1),  # a lost connection may be noticed before the error is told
        ([report(0, 7, 5.2), report(1, 75, 5.1)], signal.SIGTERM, 0),  # no checkpoint: its disk was full
        ([report(0, 75, 5.0), report(1, 1, 5.1)], signal.SIGTERM, 0),  # rank 1 lost rank 0, which had stopped
        ([report(0, 75, 5.0), report(1, 1, 5.1)], 0, 1),  # nobody asked for a stop: it was torchrun's SIGTERM
        ([report(0, 1, 5.0), report(1, 1, 5.1, True)], 0, 1),  # killed, and missed by rank 0
        ([report(0, 3, 5.1), report(1, 8, 5.0)], 0, 1),
    ],
)
def test_the_cause_is_told_from_its_echoes(reports, signum, cause):
    stop = StopRequest()
    stop.signum = signum
    assert launch._cause(reports, stop).rank == cause


@pytest.fixture
def no_launcher(monkeypatch):
    for name in os.environ:
        if name.startswith("SLURM_") or name in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", launch.ERROR_DIR}:
            monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what world() sets is undone as well
        monkeypatch.delenv(name)
    return monkeypatch


def set_all(monkeypatch, **env):
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))


def test_alone(no_launcher):
    assert launch.world() == (0, 0, 1)
    assert launch.processes(Train(processes=1)) == 1
    assert launch.processes(Train(processes=4)) == 4
    assert launch.leave_error(3, "nobody reads this") is False


def test_under_torchrun(no_launcher):
    set_all(no_launcher, RANK=5, LOCAL_RANK=1, WORLD_SIZE=8)
    assert launch.world() == (5, 1, 8)
    assert launch.processes(Train()) == launch.processes(Train(processes=8)) == 8
    with pytest.raises(RecipeError, match=r"train.processes: 4, but the launcher started 8"):
        launch.processes(Train(processes=4))


def test_under_torchrun_with_one_process_nothing_more_is_launched(no_launcher):
    set_all(no_launcher, RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    no_launcher.setitem(sys.modules, "torch", None)
    assert launch.processes(Train()) == 1


def test_under_srun(no_launcher):
    set_all(no_launcher, SLURM_PROCID=3, SLURM_LOCALID=1, SLURM_NTASKS=4, SLURM_JOB_ID=123456, SLURM_NODELIST="gpu[007-008]")
    assert launch.world() == (3, 1, 4)
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
    }
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 32000
    assert launch.world() == (3, 1, 4)


def test_a_master_that_the_user_chose_stays(no_launcher):
    set_all(no_launcher, SLURM_PROCID=0, SLURM_NTASKS=2, SLURM_NODELIST="a,b", MASTER_ADDR="10.0.0.1", MASTER_PORT=1234)
    launch.world()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_an_interactive_shell_of_a_job_is_one_process(no_launcher):
    set_all(no_launcher, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NTASKS=4, SLURM_STEP_NUM_TASKS=1)
    assert launch.world() == (0, 0, 1)
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[007-012,15],login", "gpu007"), ("gpu[3,5]-ib", "gpu3-ib"), ("r[0-1]n[08-9]", "r0n08")],
)
def test_first_host(nodelist, host):
    assert launch.first_host(nodelist) == host


def test_importing_launch_does_not_import_torch():
    program = "import ftkit.launch, ftkit.signals, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
