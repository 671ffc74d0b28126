"""The driver of the table of all methods: which runs there are, which rate is best, what is run again, and what the report says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, ClassVar

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "methods"
DEFAULTS = {"full": 2e-5, "lora": 1e-3, "qlora": 2e-4, "bitfit": 1e-3, "partial": 5e-5}


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/methods as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    loader = SourceFileLoader("methods", str(SCRIPT))
    spec = spec_from_loader("methods", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "methods", module)  # dataclasses look their module up there
    loader.exec_module(module)
    return module


def record(run: Any, value: float | None, **facts: Any) -> dict[str, Any]:
    """The line of a run; one without a value ended with a code and a reason among the facts."""
    outcome = {
        "base": 0.5,
        "trainable": 250,
        "total": 10_000,
        "peak_memory_bytes": 600e6,
        "seconds": 30.0,
        "model_bytes": 2e6,
        "weights_bytes": 1e6,
        "threads": 1,
    }
    outcome |= {"value": value, "code": 0, "versions": dict.fromkeys(("torch", "transformers", "peft"), "1"), "processor": "P", "precision": "fp32"}
    common = {"run": run.name, "what": "search", **vars(run), "settings": run.settings(False), "quick": False, "ftkit": "abc"}
    return common | {"command": {"seconds": 40.0, "cpu_seconds": 36.0}} | (outcome if value is not None else {}) | facts


def searched(methods: Any, values: Mapping[str, Mapping[str, Mapping[float, float]]]) -> list[dict[str, Any]]:
    """Records of the first seed: method -> set -> rate -> value."""
    return [
        record(methods.Run(dataset, method, rate, 42), value)
        for method, sets in values.items()
        for dataset, found in sets.items()
        for rate, value in found.items()
    ]


LORA_RATES = (1e-3, 3e-3, 1e-2)
LORA = {"cola": dict(zip(LORA_RATES, (0.1, 0.3, 0.1), strict=True)), "sst2": dict(zip(LORA_RATES, (0.8, 0.7, 0.6), strict=True))}


def test_the_best_rate_has_the_best_mean_over_the_sets(methods: Any) -> None:
    plan = methods.Plan(methods.Known(searched(methods, {"lora": LORA})), DEFAULTS)
    assert plan.best("lora", ["cola", "sst2"]) == 3e-3
    assert plan.best("lora", ["sst2"]) == 1e-3


def test_of_losses_the_lowest_is_best(methods: Any) -> None:
    records = searched(methods, {"lora": {"enko_chat": dict(zip(LORA_RATES, (5.0, 4.0, 4.5), strict=True))}})
    assert methods.Plan(methods.Known(records), DEFAULTS).best("lora", ["enko_chat"]) == 3e-3


@pytest.mark.parametrize("dataset", ["sst2", "enko_chat"])
def test_a_run_that_diverged_is_never_best(methods: Any, dataset: str) -> None:
    records = searched(methods, {"lora": {dataset: dict.fromkeys(LORA_RATES[:2], -0.1)}})
    records.append(record(methods.Run(dataset, "lora", LORA_RATES[2], 42), None, code=6, reason="non-finite loss"))
    assert methods.Plan(methods.Known(records), DEFAULTS).best("lora", [dataset]) in LORA_RATES[:2]


def test_there_is_no_best_rate_before_all_are_tried_on_all_sets_but_a_guess(methods: Any) -> None:
    known = methods.Known([r for r in searched(methods, {"lora": LORA}) if r["run"] != "cola/lora/0.01/42"])
    assert methods.Plan(known, DEFAULTS).best("lora", ["cola", "sst2"]) is None
    assert methods.Plan(known, DEFAULTS, guess=True).best("lora", ["cola", "sst2"]) in LORA_RATES


def test_other_seeds_and_findings_wait_for_the_search_and_take_its_best_rate(methods: Any) -> None:
    def others(plan: Any) -> set[str]:
        return {run.name for run, what in plan.steps.items() if run.method == "lora" and what != "search" and run.learning_rate not in methods.FINE["lora"]}

    def wanted(plan: Any) -> set[str]:
        return {run.name for run in plan.steps if run.method == "lora" and run.dataset in ("cola", "sst2")}

    before, after = (methods.Plan(methods.Known(records), DEFAULTS) for records in ([], searched(methods, {"lora": LORA})))
    assert not others(before)
    assert {f"{name}/lora/0.003/{seed}" for name in ("cola", "sst2") for seed in (42, 13, 87)} <= wanted(after)  # the best rate of both
    assert {f"sst2/lora/0.001/{seed}" for seed in methods.SEEDS} <= wanted(after)
    assert wanted(after) <= wanted(methods.Plan(methods.Known(searched(methods, {"lora": LORA})), DEFAULTS, guess=True))


def test_a_method_that_ftkit_has_not_is_in_no_plan(methods: Any) -> None:
    kinds = {methods.METHODS[run.method].settings["kind"] for run in methods.Plan(methods.Known([]), DEFAULTS, guess=True).steps}
    assert kinds == set(DEFAULTS)


def test_rows_leave_room_for_virtual_tokens(methods: Any) -> None:
    def longest(dataset: str, method: str) -> int | None:
        return methods.Run(dataset, method, 1e-3, 42).settings(quick=False)["data"].get("max_length")

    assert [longest("enko_chat", method) for method in ("lora", "prompt", "prompt-labels", "p-tuning", "prefix")] == [512, 492, 492, 492, 512]
    assert longest("sst2", "prompt") is None
    assert methods.SETS["enko_chat"].data == {"max_length": 512}


def test_a_refusal_ends_the_search(methods: Any) -> None:
    refused = record(methods.Run("enko_chat", "bitfit", 1e-3, 42), None, code=2, reason="no biases")
    plan = methods.Plan(methods.Known([refused]), DEFAULTS, guess=True)
    assert {run.dataset for run in plan.steps if run.method == "bitfit"} == {"cola", "sst2", *methods.OTHERS["MiniLM"]}


def test_other_tasks_are_tried_once_at_the_rate_of_the_search(methods: Any) -> None:
    known = methods.Known(searched(methods, {"lora": LORA}))
    lora = [run for run, what in methods.Plan(known, DEFAULTS).steps.items() if what == "other task" and run.method == "lora"]
    assert {(run.dataset, run.learning_rate, run.seed) for run in lora} == {(dataset, 3e-3, 42) for dataset in methods.OTHERS["MiniLM"]}
    for run in lora:
        known.add(record(run, 0.25))
    assert methods.others(methods.Plan(known, DEFAULTS), ("wnut17", "tydiqa_en"), ("cola", "sst2")).splitlines()[2:] == [
        "| before training |  | 0.5000 | 0.5000 |",
        "| lora | 0.003 | 0.2500 | 0.2500 |",
    ]


def test_the_two_kinds_of_lora_have_equally_many_parameters(methods: Any) -> None:
    def count(method: str, attention: int, others: int) -> int:
        settings = methods.METHODS[method].settings
        return settings.get("r", 8) * (attention + (0 if settings.get("targets") == "attention" else others))

    square = 4 * (384 + 384)  # query, key, value, output
    assert count("lora", square, 2 * (384 + 1536)) == count("lora-attention-18", square, 0)  # MiniLM
    assert count("lora", square, 3 * (384 + 1536)) == count("lora-attention-23", square, 0)  # the Llama, which has a gate


@pytest.fixture
def listed(methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """What `--list` prints for a file with some text."""

    def names(text: str, *options: str) -> list[str]:
        out = tmp_path / "methods.jsonl"
        out.write_text(text, encoding="utf-8")
        monkeypatch.setattr(methods, "default_rates", lambda: DEFAULTS)
        monkeypatch.setattr(sys, "argv", ["methods", "--out", str(out), "--list", "--only", "sst2/bitfit", *options])
        assert methods.main() == 0
        return capsys.readouterr().out.split()

    return names


def test_what_is_recorded_is_not_run_again_and_an_unfinished_line_is(methods: Any, listed: Any) -> None:
    line = json.dumps(record(methods.Run("sst2", "bitfit", 1e-3, 42), 0.1)) + "\n"
    assert listed("") == [f"sst2/bitfit/{rate}/42" for rate in ("0.001", "0.003", "0.01")]
    assert listed(line + line.replace("0.001", "0.003")[:-10]) == [f"sst2/bitfit/{rate}/42" for rate in ("0.003", "0.01")]


def test_a_record_with_other_settings_does_not_count(methods: Any, listed: Any) -> None:
    run = methods.Run("sst2", "bitfit", 1e-3, 42)
    assert run.name in listed(json.dumps(record(run, 0.1, settings=run.settings(False) | {"epochs": 99})) + "\n")
    assert run.name in listed(json.dumps(record(run, 0.1)) + "\n", "--quick")


class FakeProcess:
    """One that has ended."""

    def __init__(self, code: int) -> None:
        self.code, self.errors, self.taken = code, "its last words", {"seconds": 1.0, "cpu_seconds": 1.0}

    def ended(self) -> bool:
        return True


@pytest.fixture
def attempts(methods: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Attempts that end at once: with a code of their own by the name of the run, else 0; and how many were under way at most."""

    class FakeAttempt:
        codes: ClassVar[dict[str, int]] = {}
        under_way = most = 0

        def __init__(self, run: Any, what: str, place: Any, threads: int) -> None:
            self.run, self.process = run, FakeProcess(self.codes.get(run.name, 0))
            FakeAttempt.under_way += 1
            FakeAttempt.most = max(FakeAttempt.most, FakeAttempt.under_way)

        def record(self) -> dict[str, Any] | None:
            outcomes = {0: {"value": 0.5}, 1: None, 2: {"value": None, "code": 2, "reason": "no biases"}}
            outcome = outcomes[self.process.code]
            return None if outcome is None else record(self.run, **outcome)

        def close(self) -> None:
            FakeAttempt.under_way -= 1

    monkeypatch.setattr(methods, "Attempt", FakeAttempt)
    monkeypatch.setattr(methods.time, "sleep", lambda seconds: None)
    return FakeAttempt


@pytest.mark.parametrize("jobs", [1, 2])
def test_refusals_are_recorded_and_failures_are_told(methods: Any, attempts: Any, tmp_path: Path, capsys: Any, jobs: int) -> None:
    refused = ["sst2/bitfit/0.001/42", "sst2/bitfit/0.003/42"]
    attempts.codes |= {"sst2/partial/0.0003/42": 1, **dict.fromkeys(refused, 2)}
    out, place = tmp_path / "methods.jsonl", methods.Place(tmp_path, tmp_path, False)
    assert not methods.carry_out(DEFAULTS, out, place, ["sst2/partial", "sst2/bitfit"], jobs, threads=1)
    names = {line["run"]: line["code"] for line in methods.finished(out)}
    assert {name: code for name, code in names.items() if name not in refused} == {"sst2/partial/0.001/42": 0, "sst2/partial/0.003/42": 0}
    assert names[refused[0]] == 2  # and not all rates of what is refused
    assert "its last words" in capsys.readouterr().err
    assert (attempts.under_way, attempts.most) == (0, jobs)


def test_what_another_driver_works_on_is_left_to_it(methods: Any, attempts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, place, only = tmp_path / "methods.jsonl", methods.Place(tmp_path, tmp_path, False), ["sst2/bitfit"]
    theirs = methods.Run("sst2", "bitfit", 3e-3, 42)
    claimed = methods.claim(place, theirs.name)

    def wait(seconds: float) -> None:
        if len(methods.finished(out)) == 2 and not claimed.closed:  # all others are done: now theirs is, too
            methods.append(out, record(theirs, 0.7))
            claimed.close()

    monkeypatch.setattr(methods.time, "sleep", wait)
    assert methods.carry_out(DEFAULTS, out, place, only, jobs=1, threads=1)
    assert {line["run"]: line["value"] for line in methods.finished(out)} == {
        theirs.name: 0.7,
        **{f"sst2/bitfit/{rate}/42": 0.5 for rate in ("0.001", "0.01")},
    }


def test_the_llama_is_trained_once_and_by_one_driver(methods: Any, attempts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, trained = methods.Place(tmp_path, tmp_path, False), []

    def pretrain(place: Any) -> None:
        trained.append(place)
        assert not methods.has_base(run, place)  # for another driver, which has other runs to do
        place.llama.mkdir()
        (place.llama / "metrics.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(methods, "pretrain", pretrain)
    run = methods.Run("enko_chat", "full", 1e-3, 42)
    assert methods.has_base(methods.Run("sst2", "full", 1e-3, 42), place)
    assert not trained
    assert methods.has_base(run, place)
    assert methods.has_base(run, place)
    assert trained == [place]


def test_the_report(methods: Any) -> None:
    records = searched(methods, {"lora": LORA})
    records += [record(methods.Run("cola", "lora", 3e-3, seed), value) for seed, value in ((13, 0.2), (87, 0.1))]
    for method, rate, values in (("lora", 1e-2, (3.9, 4.1, 4.2, 4.0, 4.2)), ("qlora", 1e-3, (4.0, 4.3, 4.3, 4.2, 4.35))):
        records += [record(methods.Run("enko_chat", method, other, 42), 5.0) for other in LORA_RATES]
        records += [record(methods.Run("enko_chat", method, rate, seed), value) for seed, value in zip(methods.SEEDS, values, strict=True)]
    records += [record(methods.Run("enko_chat", "bitfit", 1e-3, 42), None, code=2, reason="method bitfit: no biases")]
    records += [record(methods.Run("sst2", "full", rate, 42), value) for rate, value in zip(methods.FINE["full"], (0.6, 0.8, 0.7, 0.6, 0.5), strict=True)]
    text = methods.report(methods.Known(records), DEFAULTS)
    assert "| lora | 0.003 | 0.2000 ± 0.1000 (3) | 0.7000 | 2.5 | 600 | 30 | 36 | 2.00 | 1.00 |" in text
    assert "| partial | - | - | - | - | - | - | - | - | - |" in text
    assert "- bitfit: method bitfit: no biases" in text
    assert "| lora | 0.001 | 0.1000 | 0.8000 | default |" in text
    assert "| lora | **0.003** | 0.3000 | 0.7000 | best |" in text
    assert "| lora | **0.01** | 3.9000 | best, end of the grid |" in text
    assert "| qlora | 0.001 | 250 | 4.2300 ± 0.1396 (5) | -0.1500 ± 0.0500 (5) | worse |" in text
    assert "Gradual unfreezing" not in text  # nothing is known of it
    assert "Best: 0.001 and 5e-05, a ratio of 20." in text


@pytest.mark.parametrize(
    ("pairs", "said"), [((0.1, 0.12, 0.11, 0.1, 0.09), "better"), ((-0.1, -0.1, -0.2), "worse"), ((0.1, -0.1, 0.2), "no difference seen"), ((0.1,), "")]
)
def test_a_difference_is_one_by_a_t_test(methods: Any, pairs: tuple[float, ...], said: str) -> None:
    assert methods.verdict(pairs) == said
