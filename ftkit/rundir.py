"""The run directory: who may write into it, and its JSON files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import DiskError, RecipeError, VerificationFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ftkit.prepare import Prepared
    from ftkit.recipe.spec import Recipe

MANIFEST = "manifest.json"
CLAIMED = "claimed"  # status of a run that has written nothing yet
CONTENTS = (
    "recipe.yaml",
    MANIFEST,
    "log.jsonl",
    "metrics.json",
    "details.json",
    "compression.json",
    "model",
    "checkpoints",
    "predictions",
    "plots",
    "eval",
    "README.md",
    "tensorboard",
    "wandb",
    "mlruns",
    "errors",
)
# What a resumed run may do otherwise than before: none of it changes a number, ...
MAY_CHANGE = {"train.processes", "train.keep_memory", "train.log_every", "train.keep", "train.save_every", "train.trackers", "data.streaming", "output"}
# ... or only its last digits, since sums are taken in another order: what helps a run that ran out of memory.
MAY_ROUND = {
    "train.accumulate",
    "train.gradient_checkpointing",
    "train.round_batches",
    "train.fast_attention",
    "train.liger",
    "train.compile",
    "objective.in_chunks",
    "objective.cache",
    "eval.batch_size",
}


def check(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that holds something, unless the user said what to do with it.  Changes nothing."""
    if output.is_file():
        raise RecipeError(f"output: {output} is a file")
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise DiskError(f"output: cannot write into {existing}")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (is_run(output) or (output / _draft(MANIFEST)).is_file()):
        raise RecipeError(f"output: {output} is not empty and not a run of ftkit; choose another output")
    if not (resume or overwrite):
        raise RecipeError(f"output: {output} holds a run; continue it with --resume, replace it with --overwrite, or choose another output")


def is_run(path: str | Path) -> bool:
    """Whether it is the directory of a run: other programs, too, keep a manifest.json."""
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "status" in manifest


def finished(run: Path) -> dict[str, Any]:
    """The manifest of a run whose model is written and verified; RecipeError for any other."""
    manifest = read_json(run / MANIFEST)
    if manifest["status"] == "finished":
        return manifest
    if manifest.get("exit_code") == VerificationFailed.code:
        raise RecipeError(f"{run} failed: a fresh load of its model gave other outputs; train it anew with --overwrite")
    raise RecipeError(f"{run} has no model yet: its run is {manifest['status']}; continue it with --resume")


def claim(output: Path, anew: bool) -> None:
    """Make the directory this run's own, so that a run killed from here on can be resumed.

    `anew` removes what an earlier run wrote, and nothing else; killed meanwhile, it leaves nothing to continue.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if anew:
            write_json(output / MANIFEST, {"status": CLAIMED, "exit_code": None})
            for path in (output / name for name in CONTENTS if name != MANIFEST):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"output: cannot write into {output}: {error.strerror}") from error


def spare(output: Path, prepared: Prepared) -> None:
    """Refuse to remove, with an earlier run, what this one starts from."""
    data = prepared.recipe.data
    sets = data.validation.values() if isinstance(data.validation, dict) else [data.validation]
    start = prepared.source
    sources = [*((start.name, start.adapter) if start else ()), *([data.train] if isinstance(data.train, str) else data.train), *sets, data.test]
    if hasattr(prepared.recipe.objective, "teacher"):
        teacher = Path(prepared.recipe.objective.teacher)
        sources.append(str(teacher / "model" if is_run(teacher) else teacher))
    ours = [(output / name).resolve() for name in CONTENTS]
    for source in sources:
        if isinstance(source, str) and Path(source).exists() and any(Path(source).resolve().is_relative_to(path) for path in ours):
            raise RecipeError(f"output: this run would write over {source}, which it starts from; choose another output")


def continued(output: Path, prepared: Prepared, resume: bool, warn: Callable[[str], None]) -> dict[str, Any]:
    """The manifest of the run to continue, after making sure that it had this recipe, data and model; empty if there is none."""
    if not (resume and is_run(output)):
        return {}
    manifest = read_json(output / MANIFEST)
    if manifest["status"] == CLAIMED:
        return {}
    check_same_recipe(prepared.recipe, output, warn)
    facts = {"data": prepared.rows.sha256, "rows and tokens": prepared.audits, "model": prepared.commit, "teacher": teacher_sha256(prepared.recipe)}
    now = json.loads(json.dumps(facts))
    then = {"data": manifest["data"]["sha256"], "rows and tokens": manifest["data"]["audit"], "model": manifest["model"]["revision"]}
    then["teacher"] = manifest.get("teacher")
    if changed := [name for name in now if now[name] != then[name]]:
        raise RecipeError(
            f"--resume: since the run in {output} was started, something else has come under the same names: {', '.join(changed)}; "
            "bring back what it was, or start anew with --overwrite"
        )
    return manifest


def teacher_sha256(recipe: Recipe) -> str | None:
    """Of the run that the objective learns from its manifest, which no other training writes alike; of a stored model its config and the sizes of its weights.

    None where there is no teacher, or one on the hub, of which the recipe names the commit.
    """
    if not hasattr(recipe.objective, "teacher"):
        return None
    teacher = Path(recipe.objective.teacher)
    if is_run(teacher):
        return hashlib.sha256((teacher / MANIFEST).read_bytes()).hexdigest()
    if not teacher.is_dir():
        return None
    sizes = sorted((path.name, path.stat().st_size) for path in teacher.glob("*.safetensors"))
    return hashlib.sha256((teacher / "config.json").read_bytes() + repr(sizes).encode()).hexdigest()


def check_same_recipe(recipe: Recipe, output: Path, warn: Callable[[str], None]) -> None:
    """Refuse to continue a run under a recipe that would have trained otherwise; names what differs."""
    from ftkit.recipe import read

    before = _flat(read(output / "recipe.yaml").recipe.model_dump())
    now = _flat(recipe.model_dump())
    changes = {
        key: f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in MAY_CHANGE
    }
    if changes.keys() - MAY_ROUND:
        lines = "\n".join(f"  {change}" for change in changes.values())
        raise RecipeError(f"--resume: the run in {output} was started with another recipe:\n{lines}\nset these back, or start anew with --overwrite")
    for change in changes.values():
        warn(f"not bit for bit as without the interruption: {change}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, whole."""
    write_lines(path, (text,))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """The same of lines, which no memory has to hold together."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(_draft(path.name))
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        draft.replace(path)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}") from error


def _draft(name: str) -> str:
    return f".{name}.draft"


def read_json(path: Path) -> Any:
    """Raises RecipeError if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: v for name, inner in value.items() for key, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()} or {prefix: {}}
