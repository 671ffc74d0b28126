"""What the user sees on a terminal and elsewhere, and what log.jsonl holds."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ftkit import progress
from ftkit.errors import DiskError
from ftkit.progress import Stage
from ftkit.quantities import duration, number, size
from ftkit.report import Reporter, peak_memory
from ftkit.summary import _table, print_compression, print_summary

RECORD = {"epoch": 0.5, "loss": 0.42131, "learning_rate": 1.8e-5, "grad_norm": 1.25, "tokens_per_second": 12340.2, "peak_memory_bytes": 1_240_000_000}


@pytest.fixture
def quick(monkeypatch):
    """Progress lines after 0.1 s and every 0.1 s."""
    monkeypatch.setattr(progress, "LINE_AFTER", 0.1)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)
    monkeypatch.setattr("ftkit.report.LINE_AFTER", 0.1)


def on_terminal(script: str, columns: int = 80, **environment: str) -> str:
    """What a script writes to a terminal of `columns` columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, "-c", script], stdin=child, stdout=child, stderr=child, env=base | {"TERM": "xterm"} | environment)
    os.close(child)
    seen = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(parent)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


WORK = """
import time
from ftkit.report import Reporter
with Reporter(None) as report:
    with report.training(10) as stage:
        for step in range(1, 11):
            stage.advance()
            report.step({"step": step, "loss": 1 / step, "learning_rate": 1e-4, "tokens_per_second": 10.0})
            time.sleep(0.1)
"""


def test_a_terminal_gets_a_bar_that_disappears():
    seen = on_terminal(WORK)
    assert "━" in seen
    assert "loss 0.1" in seen
    assert seen.rstrip().splitlines()[-1].startswith("trained to step 10 in 1.")
    assert "training 10/10  " not in seen  # the plain line


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_colour_gets_plain_lines(environment):
    seen = on_terminal(WORK, **environment)
    assert "\x1b" not in seen
    assert "training 10/10  loss 0.1000  lr 1.00e-04  10 tokens/s" in seen


def test_short_work_says_nothing(capsys):
    with Reporter(None) as report, report.stage("reading", 3) as stage:
        stage.advance(3)
    assert capsys.readouterr() == ("", "")


def test_long_work_says_where_it_is(capsys, quick):
    with Reporter(None) as report, report.stage("reading", 1000) as stage:
        stage(250, 1000)
        time.sleep(0.3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("reading 250/1,000  ")
    assert err.splitlines()[-1] == "reading: 250/1,000, 0.3 s"


def test_work_inside_work_is_what_is_told(capsys, quick):
    with Reporter(None) as report, report.training(10), report.stage("evaluating"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluating"
    assert not any(line.startswith("evaluating:") for line in lines)  # the evaluation's own line says that it is over


def test_the_display_ends_with_an_error(capsys, quick):
    with pytest.raises(ValueError, match="broken"), Reporter(None) as report, report.stage("reading"):
        raise ValueError("broken")
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    stage = Stage("training", total=100, done=50)
    stage.advance(10)
    monkeypatch.setattr(time, "monotonic", lambda: 20.0)
    assert stage.left == "1 min 20 s left"


def test_notes_and_warnings_are_told_and_kept(capsys):
    report = Reporter(None)
    report.note("fp32: this device has no bf16 [bold]")
    report.warn("3 % of the rows are truncated")
    assert capsys.readouterr() == ("", "fp32: this device has no bf16 [bold]\nwarning: 3 % of the rows are truncated\n")
    assert report.notes == ["fp32: this device has no bf16 [bold]", "warning: 3 % of the rows are truncated"]


def test_quiet_keeps_warnings_only(capsys, quick):
    with Reporter(None, quiet=True) as report:
        report.note("a note")
        with report.training(2):
            report.step({"step": 1, **RECORD})
            time.sleep(0.2)
        report.evaluation(1, "validation", {"loss": 0.5})
        report.warn("beware")
    assert capsys.readouterr().err == "warning: beware\n"


def test_what_another_process_told_is_only_kept(capsys):
    with Reporter(None) as report:
        with report.told(by_another=True):
            report.note("12 rows")
            report.warn("1 bad")
        with report.told(by_another=False):
            report.warn("2 bad")
    assert report.notes == ["12 rows", "warning: 1 bad", "warning: 2 bad"]
    assert capsys.readouterr().err == "warning: 2 bad\n"


def test_other_processes_write_nothing(capsys, tmp_path):
    log = tmp_path / "log.jsonl"
    with Reporter(log, main=False) as report:
        report.note("a note")
        report.warn("beware")
        report.step({"step": 1, **RECORD})
        report.evaluation(1, "validation", {"loss": 0.5})
        report.print_summary({"seconds": 1.0})
    assert capsys.readouterr() == ("", "")
    assert not log.exists()


def test_each_record_is_one_line_at_once(capsys, tmp_path):
    log = tmp_path / "log.jsonl"
    with Reporter(log) as report:
        assert report.log_position() == 0
        with report.training(10):
            report.step({"step": 5, **RECORD})
        assert json.loads(log.read_text()) == {"step": 5, **RECORD}
        report.evaluation(5, "validation", {"accuracy": 0.9375, "loss": 0.21434, "loss_count": 1640.0})
        assert json.loads(log.read_text().splitlines()[1]) == {"step": 5, "split": "validation", "accuracy": 0.9375, "loss": 0.21434, "loss_count": 1640.0}
        assert report.log_position() == log.stat().st_size
    err = capsys.readouterr().err
    assert "training 5/10  epoch 0.50  loss 0.4213  lr 1.80e-05  grad norm 1.2  12,340 tokens/s  1.2 GB" in err
    assert "step 5  validation: accuracy 0.9375  loss 0.2143 (n = 1,640)\n" in err


def test_memory_is_measured_where_the_loop_did_not(tmp_path):
    log = tmp_path / "log.jsonl"
    with Reporter(log) as report:
        report.step({"step": 1, "loss": 1.0})
    assert json.loads(log.read_text())["peak_memory_bytes"] == pytest.approx(peak_memory(), rel=0.1)
    assert 5e6 < peak_memory() < 1e12  # a Python process, in bytes


def test_what_is_not_finite_is_null_in_json(tmp_path):
    log = tmp_path / "log.jsonl"
    with Reporter(log) as report:
        report.step({"step": 1, **RECORD, "grad_norm": float("inf")})
    assert json.loads(log.read_text(), parse_constant=pytest.fail)["grad_norm"] is None


def test_a_resumed_log_is_cut_and_goes_on(tmp_path):
    log = tmp_path / "log.jsonl"
    with Reporter(log) as report:
        report.step({"step": 1, **RECORD})
        position = report.log_position()
        report.step({"step": 2, **RECORD})
    log.write_bytes(log.read_bytes() + b'{"step": 3, "lo')  # killed here
    with Reporter(log) as report:
        report.cut_log(position)
        report.step({"step": 2, **RECORD, "loss": 7.0})
    assert [json.loads(line)["loss"] for line in log.read_text().splitlines()] == [RECORD["loss"], 7.0]


def test_a_log_shorter_than_its_checkpoint_stays_as_it_is(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"{}\n")
    Reporter(log).cut_log(1000)
    assert log.read_bytes() == b"{}\n"
    Reporter(tmp_path / "none.jsonl").cut_log(1000)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_a_disk_error():
    with pytest.raises(DiskError, match="cannot write /dev/full: No space left on device"):
        Reporter(Path("/dev/full")).step({"step": 1, **RECORD})


def run(report: Reporter, train: list[float], validation: list[float]) -> None:
    for step, (loss, held_out) in enumerate(zip(train, validation, strict=True), 1):
        report.step({"step": step, **RECORD, "loss": loss})
        report.evaluation(step, "validation", {"loss": held_out})


def test_overfitting_is_told_once_with_numbers():
    report = Reporter(None)
    run(report, [1.0, 0.8, 0.6, 0.4, 0.2], [0.9, 0.7, 0.8, 0.9, 1.0])
    (warning,) = report.notes
    assert "validation loss rose twice in a row, 0.7000 (step 2), 0.8000 (step 3), 0.9000 (step 4)" in warning
    assert "training loss fell from 0.8000 to 0.4000" in warning
    assert "train.early_stopping" in warning


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ([1.0, 0.8, 0.6], [0.9, 0.8, 0.85]),  # rose once
        ([1.0, 1.1, 1.2], [0.7, 0.8, 0.9]),  # both rise: a learning rate too high, not overfitting
        ([1.0, 0.8, 0.6], [0.7, 0.7, 0.7]),
    ],
)
def test_other_courses_are_no_overfitting(train, validation):
    report = Reporter(None)
    run(report, train, validation)
    assert report.notes == []


class Diary:
    name = "diary"

    def __init__(self, fails_at: int | None = None) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.closed = fails_at, False

    def log(self, step: int, values: dict[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to host")
        self.entries.append((step, values))

    def close(self) -> None:
        self.closed = True


def test_trackers_get_finite_numbers_by_set():
    diary = Diary()
    with Reporter(None) as report:
        report.track([diary])
        report.step({"step": 1, "loss": 1.0, "grad_norm": float("nan"), "learning_rate": None, "peak_memory_bytes": 5})
        report.evaluation(1, "validation", {"f1": 0.5})
    assert diary.entries == [(1, {"train/loss": 1.0, "train/peak_memory_bytes": 5.0}), (1, {"validation/f1": 0.5})]
    assert diary.closed


def test_a_failing_tracker_is_dropped_with_one_warning():
    bad, good = Diary(fails_at=2), Diary()
    with Reporter(None) as report:
        report.track([bad, good])
        for step in (1, 2, 3):
            report.step({"step": step, **RECORD})
    assert [step for step, _ in bad.entries] == [1]
    assert [step for step, _ in good.entries] == [1, 2, 3]
    assert report.notes == ["warning: diary failed (ConnectionError: no route to host); the run goes on without it"]


SUMMARY = {
    "output": "runs/cola-lora",
    "metrics": {
        "base": {"validation": {"accuracy": 0.125, "loss": 2.08131, "loss_count": 640.0}},
        "validation": {"accuracy": 0.9375, "loss": 0.21432, "loss_count": 640.0},
        "test": {"accuracy": 0.91, "loss": 0.2543, "loss_count": 1203.0},
    },
    "baselines": {"majority": 0.12, "bag_of_words": 0.7},
    "verification": {"max_difference": 1.2e-7, "tolerance": 1e-5, "loads_with": "peft"},
    "seconds": 151.2,
    "tokens_per_second": 12340.4,
    "peak_memory_bytes": 1_240_000_000,
    "files": [["runs/cola-lora/model", 1_200_000], ["runs/cola-lora/README.md", 420]],
    "notes": ["fp32: this device has no bf16"],
    "parameters": {"trainable": 295_682, "total": 66_955_010},
}


def test_the_summary_is_plain_text_in_a_pipe(capsys):
    print_summary(SUMMARY)
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    for expected in (
        "base tuned",
        "accuracy 0.1250 0.9375",
        "loss (n = 640) 2.081 0.2143",
        "loss (n = 1,203) - 0.2543",
        "baselines majority 0.1200, bag of words 0.7000 (accuracy)",
        "trained 295,682 of 66,955,010 parameters (0.44%)",
        "took 2 min 31 s, 12,340 tokens/s, peak memory 1.2 GB",
        "verified a fresh peft load gives the same outputs (largest difference 1.2e-07, tolerance 1e-05)",
        "fp32: this device has no bf16",
        "written to runs/cola-lora",
        "1.2 MB model",
        "420 B README.md",
    ):
        assert expected.split() in lines
    assert "\x1b" not in out
    assert "loss_count" not in out


PRINT = f"from ftkit.summary import print_summary\nprint_summary({SUMMARY!r})"


@pytest.mark.parametrize("columns", [40, 80])
def test_the_summary_fits_the_terminal(columns):
    for environment in ({}, {"NO_COLOR": "1"}):
        seen = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(PRINT, columns, **environment))
        assert max(map(len, seen.split("\r\n"))) <= columns
        assert {"0.1250", "0.9375", "2.081", "0.2143", "0.2543"} <= set(seen.split())


def test_only_the_better_number_stands_out():
    seen = on_terminal(PRINT)
    assert re.findall(r"\x1b\[1;32m *([0-9.]+)", seen) == ["0.9375", "0.2143"]  # of the loss the smaller one; of test there is one


@pytest.mark.parametrize("left_out", list(SUMMARY))
def test_any_part_of_the_summary_may_be_absent(left_out, capsys):
    print_summary({key: value for key, value in SUMMARY.items() if key != left_out})
    assert capsys.readouterr().out


def test_a_summary_of_the_base_alone(capsys):
    print_summary({"metrics": {"base": SUMMARY["metrics"]["base"]}})
    assert "tuned" not in capsys.readouterr().out


def test_a_failed_verification_is_not_called_the_same(capsys):
    print_summary({"verification": {"max_difference": 0.5, "tolerance": 1e-5, "loads_with": "peft"}})
    assert "OTHER outputs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.912, "0.9120"),
        (12.3456, "12.35"),
        (123.456, "123.5"),
        (999.96, "1000"),
        (12345.6, "12,346"),
        (1.5e300, "1.500e+300"),
        (0.0, "0.000"),
        (None, "-"),
        (float("nan"), "nan"),
    ],
)
def test_metrics_have_4_significant_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.84, "0.8 s"), (9.97, "10 s"), (59.6, "1 min 00 s"), (151.2, "2 min 31 s"), (11100, "3 h 05 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1, "1 B"), (512, "512 B"), (4200, "4.2 kB"), (1_240_000_000, "1.2 GB")])
def test_sizes(count, text):
    assert size(count) == text


def test_nothing_heavy_is_imported():
    heavy = {"torch", "matplotlib", "rich", "numpy", "yaml"}
    script = f"import sys, ftkit.report, ftkit.summary, ftkit.plots, ftkit.trackers, ftkit.card; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("metric", "better"), [("accuracy", "0.9000"), ("mse", "0.1000"), ("ece", "0.1000"), ("perplexity", "0.1000")])
def test_the_better_number_stands_out(metric, better):
    table = _table({"base": {"test": {metric: 0.1}}, "test": {metric: 0.9}}, {})
    cells = [cell for column in table.columns for cell in column.cells]
    assert [str(cell) for cell in cells if getattr(cell, "style", "") == "bold green"] == [better]


def test_a_compression_is_a_table_of_models(capsys):
    before = {"model": "before", "parameters": 22_713_986, "bytes_on_disk": 90_900_000, "bytes_loaded": 90_900_000, "seconds_batch_1": 0.0216}
    before |= {"seconds_batch_32": 0.586, "metric": "accuracy", "score": 0.8075, "kept": 1.0}
    int8 = before | {"model": "int8", "bytes_loaded": 59_100_000, "seconds_batch_1": 0.0136, "score": 0.8, "kept": 0.8 / 0.8075}
    print_compression({"output": "small", "models": [before, int8], "threads": 1, "int8": {"error": 0.0619, "agreement": 0.984375, "rows": 64}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["before", "22.7", "M", "90.9", "MB", "90.9", "MB", "21.6", "ms", "586.0", "ms", "0.8075", "100.0%"] in lines
    assert ["int8", "22.7", "M", "90.9", "MB", "59.1", "MB", "13.6", "ms", "586.0", "ms", "0.8000", "99.1%"] in lines
    assert ["int8", "against", "float,", "on", "64", "rows:", "error", "0.06190,", "agreement", "0.9844"] in lines
    nothing = before | {"metric": None, "score": None, "kept": None}
    print_compression({"output": "small", "models": [nothing], "threads": 1})
    assert capsys.readouterr().out.splitlines()[2].split()[-2:] == ["-", "-"]
