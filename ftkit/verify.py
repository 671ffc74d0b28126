"""An artefact is done when a fresh process that loads it holds the same tensors and gives the same outputs.

`capture` records both while the model is in memory; the caller frees it; `check` loads what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftkit import reload
from ftkit.errors import OutOfMemory, VerificationFailed
from ftkit.methods.modules import added

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet

# What two processes may differ by, relative to the largest output: same weights, same code, same device, but
# kernels may add in another order.  float32: 84 units in the last place, room for sums of thousands of terms.
# float16 and bfloat16: two units in the last place, since the last rounding of an output may fall either way.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
# 8-bit layers also round their inputs, to 127 steps: a value that falls to the other side moves by one step.
TOLERANCE_8BIT = 2e-2
# Upper and lower case, accents, digits, other scripts, white space and control characters, for the tokenizer.
PROBE = "The naïve Façade cost 1,234.50 €\n\tfor 東京 and Пётр; don't  ask [MASK] <s>why</s>? 👍🏽"
WORKPLACE = ".verify"  # files for the fresh process, inside the model's directory
# Set by launchers for their own processes: the fresh process is on its own.
LAUNCHER = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_", "RANK", "WORLD_SIZE", "MASTER_")
SHOWN = 5  # differences that an error names


@dataclass
class Expected:
    """What a fresh load must hold and answer."""

    rows: list[reload.Row]
    texts: list[str]
    answers: dict[str, torch.Tensor]  # output of a row -> float32
    digests: dict[str, str]  # tensor of the model -> sha256
    facts: dict[str, Any]  # labels, token ids, special tokens, chat template
    files: dict[str, str]  # file of the model's directory -> sha256
    tolerance: float  # largest absolute difference of an output
    base_sha256: str | None  # of the frozen base, where that does not depend on the device
    device: str


def choose(features: FeatureSet, count: int = 8) -> list[reload.Row]:
    """The inputs of `count` rows, short to long, with different targets as far as there are; of several texts in a row, the first one."""
    order = np.argsort(features.lengths, kind="stable")
    seen: set[str] = set()
    chosen: list[reload.Row] = []
    for part in np.array_split(order, min(count, len(order))):
        candidates = {index: str(features.get(int(index))["targets"]) for index in part[:50]}
        index = next((index for index, targets in candidates.items() if targets not in seen), part[0])
        seen.add(candidates[index])
        row = features.get(int(index))
        inputs = {name: row[name] for name in ("input_ids", "token_type_ids")}
        chosen.append({name: torch.from_numpy(values[: row["texts"][0]].astype(np.int64)) for name, values in inputs.items() if values is not None})
    return chosen


def tolerance(dtype: str, config: Any, answers: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute difference between two loads in `dtype` of a model with this config, whose weights may be in few bits."""
    relative = TOLERANCE[dtype]
    stored = getattr(config, "quantization_config", None)
    quantization = stored if isinstance(stored, dict) else stored.to_dict() if stored else {}
    if quantization.get("load_in_4bit"):
        relative = max(relative, TOLERANCE[quantization.get("bnb_4bit_compute_dtype", "float32")])
    elif quantization.get("load_in_8bit"):
        relative = max(relative, TOLERANCE_8BIT)
    return relative * scale(answers)


def scale(answers: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute output."""
    return max(value.abs().max().item() for value in answers.values())


def capture(model: Any, tokenizer: Any, rows: Sequence[reload.Row], directory: Path, artifact: Mapping[str, Any], converted: bool = False) -> Expected:
    """What a fresh load of `directory`, just written from `model`, must hold and answer.

    The model is put into eval mode and the stored dtype, as a load finds it: it cannot train on.
    `converted`: the adapter was written in another form than it learned in, so only its outputs can be compared.
    """
    learned = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    as_loaded(model, getattr(torch, artifact["load_kwargs"]["dtype"]))
    answers = reload.answers(model.eval(), rows)
    texts = [PROBE, *(tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows)]
    digests = reload.digests(model)
    if converted:
        digests = {name: digest for name, digest in digests.items() if not added(name) and ".base_layer." not in name}
    unknown = converted or artifact["loads_with"] == "transformers" or "quantization_config" in artifact["load_kwargs"]
    return Expected(
        rows=list(rows),
        texts=texts,
        answers=answers,
        digests=digests,
        facts=reload.facts(model, tokenizer, texts, artifact),
        files=file_digests(directory),
        tolerance=tolerance(artifact["load_kwargs"]["dtype"], model.config, answers),
        base_sha256=None if unknown else base_sha256(digests, learned),
        device=str(model.device),
    )


def base_sha256(digests: Mapping[str, str], learned: Container[str] = ()) -> str:
    """sha256 over the tensors of an adapter's base: those that no method added, and that are not among the learned ones."""
    base = {name: digest for name, digest in digests.items() if not added(name) and ".modules_to_save." not in name and name not in learned}
    return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


def as_loaded(model: nn.Module, dtype: torch.dtype) -> None:
    """Round what learned in float32 to what it is loaded in: everything, but adapters, which PEFT keeps in float32, and what the architecture keeps so."""
    adapter = hasattr(model, "peft_config")
    kept = _kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and (not adapter or ".modules_to_save." in name) and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Names of modules that transformers loads in float32 whatever is asked for, such as T5's `wo`, whose outputs float16 cannot hold."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) if dtype in (torch.float16, torch.bfloat16) else None
    return {*(always or ()), *((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else ())}


def check(directory: Path, artifact: Mapping[str, Any], expected: Expected) -> dict[str, Any]:
    """Load `directory` in a fresh process and compare; returns what the manifest tells of it.

    Raises VerificationFailed, naming files, tensors, settings and rows that differ and by how much.
    """
    failure, found, answers = _reloaded(directory, artifact, expected)
    problems = [f"{name} is not as it was written" for name in _differing(expected.files, file_digests(directory))]
    if failure:
        problems.append(f"it cannot be loaded: {failure}")
        raise VerificationFailed(_message(directory, problems))
    tensors = {name: found["digests"].get(name) for name in expected.digests}
    problems += [f"tensor {name} differs" for name in _differing(expected.digests, tensors)]
    problems += [f"the {name} differ" for name in _differing(expected.facts, {name: found[name] for name in expected.facts})]
    difference, differing = compare(expected.answers, answers, expected.tolerance)
    if problems + differing:
        raise VerificationFailed(_message(directory, problems + differing))
    return {
        "max_difference": difference,
        "tolerance": expected.tolerance,
        "rows": len(expected.rows),
        "tensors": len(tensors),
        "files": len(expected.files),
        "base_sha256": expected.base_sha256,
    }


def compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], limit: float) -> tuple[float, list[str]]:
    """The largest absolute difference, and a sentence for every output that differs by more than `limit`."""
    largest, problems = 0.0, []
    for name, value in expected.items():
        if name not in found or found[name].shape != value.shape:
            problems.append(f"{name} has shape {tuple(found[name].shape) if name in found else None}, not {tuple(value.shape)}")
            continue
        difference = (found[name] - value).abs().max().item()
        largest = max(largest, difference)
        if not difference <= limit:  # NaN, too
            problems.append(f"{name} differ by {difference:.2g}, more than {limit:.2g}")
    return largest, problems


def _reloaded(directory: Path, artifact: Mapping[str, Any], expected: Expected) -> tuple[str | None, dict[str, Any], dict[str, torch.Tensor]]:
    """Why the fresh process failed, or None, what it found, and what the model answered there."""
    request = directory / WORKPLACE
    shutil.rmtree(request, ignore_errors=True)  # of a check that was killed
    request.mkdir()
    try:
        asked = {
            "directory": str(directory.absolute()),
            "artifact": dict(artifact),
            "texts": expected.texts,
            "rows": len(expected.rows),
            "device": expected.device,
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
        (request / "request.json").write_text(json.dumps(asked), encoding="utf-8")
        save_file({f"{i}.{name}": values for i, row in enumerate(expected.rows) for name, values in row.items()}, request / "rows.safetensors")
        # -P keeps ftkit's folder, whose modules are called data or report, off the path.  In a session of its own, a
        # Ctrl-C reaches the child only through this process, which decides what it means.
        done = subprocess.run(
            [sys.executable, "-P", str(Path(reload.__file__).absolute()), str(request.absolute())],
            capture_output=True,
            text=True,
            errors="replace",
            env={name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)},
            start_new_session=True,
        )
        last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if done.returncode == -signal.SIGKILL or "OutOfMemoryError" in last_line:
            raise OutOfMemory(f"{directory} was written, but there is not enough memory to load it in a fresh process for verification")
        if done.returncode:
            return last_line, {}, {}
        found = json.loads((request / "facts.json").read_text(encoding="utf-8"))
        answers = {name: value.clone() for name, value in load_file(request / "answers.safetensors").items()}  # the file goes away
        return None, found, answers
    finally:
        shutil.rmtree(request, ignore_errors=True)


def file_digests(directory: Path) -> dict[str, str]:
    """sha256 of each file of a model's directory."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and WORKPLACE not in path.relative_to(directory).parts:
            with path.open("rb") as file:
                digests[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name in [*expected, *(name for name in found if name not in expected)]
        if name not in found or name not in expected or found[name] != expected[name]
    ]


def _message(directory: Path, problems: Sequence[str]) -> str:
    lines = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{directory} does not give the model back that was saved:\n{lines}{more}"
