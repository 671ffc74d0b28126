"""Runs, compared."""

import json
from pathlib import Path

import pytest

CLOCK_AND_PROCESS = {"tokens_per_second", "peak_memory_bytes"}


def log(run: Path) -> list[dict]:
    """log.jsonl without what depends on the clock and the process."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCK_AND_PROCESS} for record in records]


@pytest.fixture
def assert_same_run():
    """The same model to the bit, the same log but for times, the same measurements and answers."""

    def written(run: Path) -> dict[Path, bytes]:
        paths = [run / "metrics.json", *(run / "model").rglob("*"), *(run / "predictions").rglob("*")]
        return {path.relative_to(run): path.read_bytes() for path in paths if path.is_file()}

    def compare(one: Path, other: Path) -> None:
        assert log(one) == log(other)
        files, others = written(one), written(other)
        assert files.keys() == others.keys()
        assert [str(path) for path in files if files[path] != others[path]] == []

    return compare
