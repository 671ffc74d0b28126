"""The benchmark's arithmetic: what training needs, what is counted, and what is not."""

from __future__ import annotations

import json
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports from scripts/."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def bench(modules: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/bench as a module."""
    loader = SourceFileLoader("bench", str(SCRIPTS / "bench"))
    spec = spec_from_loader("bench", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench", module)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("tied", [True, False])
def test_a_shape_knows_its_parameters_and_what_full_fine_tuning_computes(tied: bool, modules: None) -> None:
    """Beside torch's own count, of unfused attention, which computes all pairs; the gradient of the embedded tokens is for looking up only."""
    from benchmarks.flops import Llama, of_row

    shape = Llama(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, vocabulary=50, tied=tied)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=50, tie_word_embeddings=tied
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert shape.parameters == model.num_parameters()
    ids = torch.randint(50, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    other_half = 6 * shape.layers * shape.hidden * 32**2
    rotary = counter.get_total_flops() - of_row(shape, "full", 32, 32) - other_half
    assert 0 <= rotary <= 0.001 * counter.get_total_flops()


def test_frozen_weights_need_two_thirds_and_prompts_no_logits(modules: None) -> None:
    from benchmarks.flops import Llama, of_row

    shape = Llama(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocabulary=128_256)
    assert shape.parameters == 8_030_261_248  # of Llama 3 8B
    attention = 6 * 32 * 4096 * 1000**2
    full, lora = (of_row(shape, method, 1000, 200) - attention for method in ("full", "lora"))
    assert 4 / 6 < lora / full < 4 / 6 + 0.01  # and the updates
    assert of_row(shape, "qlora", 1000, 200) == of_row(shape, "lora", 1000, 200)
    assert of_row(shape, "full", 1000, 200) - of_row(shape, "full", 1000, 0) == 200 * 6 * 4096 * 128_256


@pytest.mark.parametrize(
    ("device", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_what_a_device_can_do_is_known_or_not_said(device: str, flops: float | None, modules: None) -> None:
    from benchmarks.flops import peak

    assert peak(device) == flops


def test_the_watch_leaves_the_warm_up_out(modules: None, tmp_path: Path) -> None:
    from benchmarks.measure import Watch

    watch = Watch(warm_up=2)
    watch.start()
    for tokens in (100, 100, 7, 8, 1000):  # of the last batch, made ahead, nothing was computed
        watch.batch(tokens)
    for seconds in (0.2, 0.2, 0.01, 0.01):
        time.sleep(seconds)
        watch.step()
    watch.stop()
    watch.write(tmp_path / "report.json", supervised=3)
    taken = json.loads((tmp_path / "report.json").read_text())
    assert (taken["steps"], taken["tokens"], taken["supervised"]) == (4, 15, 3)
    assert 0.02 <= taken["seconds"] < 0.2


def test_long_rows_are_nearly_full_and_never_longer(modules: None) -> None:
    from itertools import islice

    from benchmarks import workloads

    rows = workloads.made_up("chat", 100)
    rows += [{"messages": [{"role": "user", "content": "번역하세요 " * 30}, {"role": "assistant", "content": "이와 같은 솔직한 토론은 " * 30}]}]
    tokenizer = workloads.chat_tokenizer(rows, 512)
    lengths = [
        len(tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"])
        for row in islice(workloads.full_length(rows, tokenizer, 1024), 50)
    ]
    assert max(lengths) <= 1024
    assert min(lengths) > 1024 - 64


def result(seconds: float, **other: Any) -> dict[str, Any]:
    same = {"tokens": 1000, "peak_memory": 2_000_000, "first_step": 1.0, "held_out": 3.0, "device": "NVIDIA H200", "steps": 5, "supervised": 80}
    return same | {"seconds": seconds} | other


WORKLOAD = {"name": "1B", "kind": "chat", "parameters": 10**9, "batch_size": 8, "steps": 5, "checkpointing": True, "flops_per_token": 989e9}


def compared(bench: Any, monkeypatch: pytest.MonkeyPatch, **results: dict[str, Any] | None) -> list[list[str]]:
    monkeypatch.setattr(bench, "train", lambda name, *_: results[name])
    return bench.compare(WORKLOAD, list(results), Path(), bench.Manner(1, 2, "bf16", warm_up=2, gpu=True))


def test_the_table_shows_utilisation_and_who_ran_out_of_memory(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compared(bench, monkeypatch, Trainer=result(5.0), TRL=None, ftkit=result(2.5, device="unknown"))
    label = "1B: 1,000.0 M, batch 8, 3 steps after 2, gradient checkpointing"
    assert rows == [
        [label, "Trainer", "200", "1.00", "20.0", "2", "1.0", "3.0000"],
        [label, "TRL", "out of memory", "-", "-", "-", "-", "-"],
        [label, "ftkit", "400", "2.00", "-", "2", "1.0", "3.0000"],
    ]
    assert {len(row) for row in rows} == {len(bench.Manner(1, 2, "bf16", gpu=True).head)}


def test_the_table_says_where_batches_were_laid_out_in_another_way(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"Trainer": result(5.0), "ftkit": result(2.5, layout="bucketed"), "ftkit, padded": result(2.5, layout="padded")}
    assert [row[1] for row in compared(bench, monkeypatch, **sides)] == ["Trainer", "ftkit (bucketed)", "ftkit, padded"]
    assert [row[1] for row in compared(bench, monkeypatch, ftkit=result(2.5, layout="flat"))] == ["ftkit"]


def test_other_work_is_not_compared(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="different work: supervised 80 in Trainer, 81 in ftkit"):
        compared(bench, monkeypatch, Trainer=result(5.0), ftkit=result(2.5, supervised=81))


def test_without_a_device_the_code_is_that_of_the_environment(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--gpu"])
    monkeypatch.setattr(bench, "cuda_device", lambda: "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 4
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_trace_is_of_a_profile(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--trace", "trace.json.gz"])
    with pytest.raises(SystemExit):
        bench.options()
    assert "--trace goes with --profile" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench", "--gpu", "--trace", "trace.json.gz"])  # which profiles the first workload
    assert bench.options().trace == Path("trace.json.gz")


def test_full_rows_are_ftkits_alone_unless_others_are_asked_for(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)  # TRL is not installed
    for given, full, chats in (([], ["ftkit"], ["Trainer", "ftkit"]), (["--sides", "Trainer", "TRL"], ["Trainer"], ["Trainer"])):
        monkeypatch.setattr("sys.argv", ["bench", "--gpu", *given])
        args = bench.options()
        assert bench.sides(args, {"full_length": True}) == full
        assert bench.sides(args, {"full_length": False}) == chats


def test_what_a_teacher_costs_is_told_turn_by_turn(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step beside one without a teacher, and answers beside the teacher's, of a student with every other layer."""
    (tmp_path / "chats" / "model").mkdir(parents=True)
    (tmp_path / "chats" / "model" / "config.json").write_text('{"num_hidden_layers": 6}')
    seconds = iter([3.0, 3.3, 6.0, 6.0, 6.6, 9.0])  # of three steps without, with a cached and with a live teacher, twice
    caches, objectives = set(), []

    def run(arguments: list[str | Path], env: dict[str, str]) -> Any:
        caches.add(env["FTKIT_CACHE"])
        given = list(map(str, arguments))
        if "benchmarks.ftkit_loop" in given:
            assert "model.layers=[1, 3, 5]" in given
            objectives.append([option for option in given if option.startswith("objective")])
            Path(given[-1]).write_text(json.dumps({"seconds": next(seconds), "steps": 4}))
        return SimpleNamespace(stdout=json.dumps({"against": {"latency_seconds": {"1": {"own": 0.002, "other": 0.004}, "32": {"own": 0.03, "other": 0.05}}}}))

    monkeypatch.setattr(bench, "run", run)
    rows = bench.distillation(tmp_path, WORKLOAD | {"name": "chats", "steps": 4}, bench.Manner(2, 2, "fp32"))
    label = "chats: 1,000.0 M, student with 3 of 6 layers"
    assert rows == [
        [label, "a step, teacher cached", "1650.0", "without a teacher", "1500.0", "1.10", "at most 1.1"],
        [label, "a step, teacher live", "2500.0", "teacher cached", "1650.0", "1.59", "at least 2"],
        [label, "the student's answers, batch of 1", "2.0", "the teacher's", "4.0", "0.50", ""],
        [label, "the student's answers, batch of 32", "30.0", "the teacher's", "50.0", "0.60", ""],
    ]
    assert {len(row) for row in rows} == {len(bench.DISTILLATION_HEAD)}
    assert len(caches) == 1  # the teacher is asked once in all turns
    assert [len(given) for given in objectives] == [0, 2, 3, 0, 2, 3]


def test_what_needs_no_gpu_is_not_measured_on_one(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in bench.MEASURED_ALONE:
        monkeypatch.setattr("sys.argv", ["bench", "--gpu", "--only", name])
        with pytest.raises(SystemExit):
            bench.options()
        assert "are measured without it" in capsys.readouterr().err
