"""The driver of the README's tables: which cells there are, and what it keeps when it is killed or a cell fails."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "results"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/results as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    loader = SourceFileLoader("results", str(SCRIPT))
    spec = spec_from_loader("results", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "results", module)  # dataclasses look their module up there
    loader.exec_module(module)
    return module


def test_one_seed_of_everything_comes_before_the_other_seeds(results: Any) -> None:
    cells = list(results.cells())
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    compared = [(dataset, method) for dataset in ("cola", "banking77", "snli", "sst2") for method in results.METHODS]
    compared += [(dataset, "full") for dataset in results.SETS if dataset not in dict(compared)]
    first = {f"{dataset}/{method}/42/{side}" for dataset, method in compared for side in results.SIDES}
    chain = {"gutenberg_en/pretraining"} | {f"{dataset}/{method}" for dataset in ("enko_chat", "self_instruct") for method in ("lora", "qlora")}
    assert set(names[: len(first | chain)]) == first | chain
    rest = [cell for cell in cells[len(first | chain) :] if not isinstance(cell, results.Student)]
    assert {cell.seed for cell in rest} == {13, 87, 1, 2}
    assert names.index("gutenberg_en/pretraining") < names.index("enko_chat/lora")


def test_a_line_that_a_killed_driver_left_unfinished_is_measured_again(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "results.jsonl"
    whole = json.dumps({"cell": "cola/full/42/ftkit", "quick": False}) + "\n"
    out.write_text(whole + '{"cell": "cola/full/42/pl', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path), "--out", str(out), "--only", "cola/full/42", "--list"])
    assert results.main() == 0
    assert capsys.readouterr().out.split() == ["cola/full/42/plain"]
    results.append(out, {"cell": "cola/full/42/plain", "quick": False})
    assert out.read_text(encoding="utf-8") == whole + whole.replace("ftkit", "plain")


def test_a_cell_that_fails_is_not_written_and_does_not_stop_the_others(results: Any, tmp_path: Path, capsys: Any) -> None:
    @dataclass
    class Known:
        name: str
        value: float | None

        def measure(self, place: Any, scratch: Path) -> dict[str, Any]:
            if self.value is None:
                raise results.Failed("code 2")
            return {"seconds": 0.0}

    out = tmp_path / "results.jsonl"
    place = results.Place(tmp_path, tmp_path / "work", quick=False)
    assert not results.measure([Known("a", None), Known("b", 0.5)], out, place)
    assert [(record["cell"], record["commit"]) for record in results.finished(out)] == [("b", results.commit())]
    assert "code 2" in capsys.readouterr().err
    assert list((tmp_path / "work").iterdir()) == []


def test_only_compares_whole_parts_of_names(results: Any) -> None:
    cell = results.Beside("cola", "full", 42, "plain")
    assert all(results.selected(cell.name, only) for only in ([], ["cola"], ["snli", "cola/full"]))
    assert not any(results.selected(cell.name, only) for only in (["co"], ["cola/lora"], ["full"]))


def test_the_table_has_mean_and_deviation_over_seeds(results: Any) -> None:
    common = {"dataset": "cola", "method": "full", "learning_rate": 3e-4}
    records = [common | {"side": "ftkit", "value": value, "cpu_seconds": 100.0} for value in (0.25, 0.5, 0.75)]
    records += [common | {"side": "plain", "value": 0.5, "cpu_seconds": 150.0}]
    records += [{"dataset": "enko_chat", "method": "lora", "base": 5.5, "value": 4.25, "merged_difference": 2e-6, "cpu_seconds": 60.0}]
    text = results.tables(records)
    assert "| cola (mcc) | full | 0.0003 | 0.5000 ± 0.2500 (3) | 0.5000 |" in text
    assert "| enko_chat | lora | 5.5000 | 4.2500 | 2.0e-06 | 60 |" in text


def test_students_come_after_their_teachers_and_are_shown_beside_them(results: Any) -> None:
    cells = [cell for cell in results.cells() if isinstance(cell, results.Student)]
    assert [cell.lesson for cell in cells[:3]] == [results.TEACHER] * 3
    assert {cell.seed for cell in cells} == {42, 13, 87}
    records = [{"dataset": "sst2", "beginning": "pretrained", "lesson": results.TEACHER, "seed": 42, "value": 0.8}]
    records += [{"dataset": "sst2", "beginning": "copied", "lesson": "soft", "seed": seed, "value": value} for seed, value in ((42, 0.7), (13, 0.8))]
    assert results.student_table(records).splitlines() == [
        "| layers | lesson | sst2: 0.8000 |",
        "| --- | --- | --- |",
        "| copied | soft | 0.7500 ± 0.0707 (2), 93.8% |",
    ]


def test_students_of_masked_words_are_shown_by_their_perplexity(results: Any) -> None:
    records = [{"dataset": results.MASKED, "lesson": lesson, "value": value} for lesson, value in (("soft", 120.04), (results.TEACHER, 80.0))]
    assert results.tables(records).split("\n\n")[-1].splitlines() == ["| lesson | perplexity |", "| --- | --- |", "| teacher | 80.0 |", "| soft | 120.0 |"]
