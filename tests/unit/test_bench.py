"""The benchmark's arithmetic: what training needs, what is counted, and what is not."""

from __future__ import annotations

import json
import time
from pathlib import Path
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
