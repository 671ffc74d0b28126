"""The processes that drivers start: how they end and what they leave."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import measured

    return measured


@pytest.fixture
def place(measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where modules are found in tmp_path."""
    monkeypatch.setattr(measured, "SCRIPTS", tmp_path)
    return measured.Place(tmp_path, tmp_path, quick=True)


def write(place: Any, code: str) -> str:
    (place.work / "example.py").write_text(code, encoding="utf-8")
    return "example"


def test_a_run_gives_its_output_and_the_time_of_all_its_processes(measured: Any, place: Any) -> None:
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    code = f"import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\nprint(os.environ['HF_HUB_OFFLINE'], sys.argv[1])"
    taken, output = measured.run(place, write(place, code), "argument")
    assert output == "1 argument\n"
    assert taken["cpu_seconds"] >= 0.3
    assert taken["seconds"] > 0


def test_an_error_is_raised_with_its_last_words(measured: Any, place: Any) -> None:
    with pytest.raises(measured.Failed, match=r"code 3\nits last words"):
        measured.run(place, write(place, "import sys\nprint('its last words', file=sys.stderr)\nsys.exit(3)"))


def test_a_process_under_way_is_not_waited_for_and_ended_on_closing_with_those_it_started(measured: Any, place: Any) -> None:
    started = place.work / "started"
    own = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    process = measured.Process(place, write(place, f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {own!r}])"))
    while not (started.exists() and started.read_text()):
        assert not process.ended()
        time.sleep(0.01)
    process.close()
    assert process.ended()
    assert process.code != 0
    status = Path(f"/proc/{started.read_text()}/status")
    deadline = time.monotonic() + 30
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)  # nobody may be there to wait for it
    assert time.monotonic() < deadline


def test_a_process_has_as_many_threads_as_are_said(measured: Any, place: Any) -> None:
    process = measured.Process(place, write(place, "import os\nprint(os.environ['OMP_NUM_THREADS'])"), threads=3)
    assert process.ended(wait=True)
    assert process.output == "3\n"
    process.close()


def test_what_one_driver_works_on_is_not_for_another_one_until_it_lets_go(measured: Any, place: Any) -> None:
    first = measured.claim(place, "sst2/lora/0.001/42")
    assert first is not None
    assert measured.claim(place, "sst2/lora/0.001/42") is None
    other = measured.claim(place, "sst2/lora/0.001/13")
    assert other is not None
    first.close()
    again = measured.claim(place, "sst2/lora/0.001/42")
    assert again is not None
    for file in (other, again):
        file.close()
