"""The end of a run: measure, write the artefact, prove that it loads, and tell what came out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftkit import adapters, checkpoint, compiled, device, plots, reload, rundir, verify
from ftkit.card import model_card
from ftkit.data.ondisk import Records
from ftkit.evaluate import details_of, measure, predictions, samples, side_by_side
from ftkit.model import without_pooler
from ftkit.quantities import duration
from ftkit.report import peak_memory
from ftkit.session import load_base
from ftkit.sources import Source

if TYPE_CHECKING:
    from torch import nn

    from ftkit.evaluate import Measured
    from ftkit.loop import Position
    from ftkit.manifest import Manifest
    from ftkit.methods import Method
    from ftkit.model import Base
    from ftkit.report import Reporter
    from ftkit.session import Session
    from ftkit.signals import StopRequest


def finish(session: Session, output: Path, report: Reporter, stop: StopRequest, position: Position, manifest: Manifest) -> dict[str, Any]:
    """Everything after the last step; returns the summary."""
    _take_best(session, output, report, position)
    measured = measure(session, session.prepared.splits, report, stop, keep_records=True)
    written = samples(session, report, stop)
    if stop.agreed(session.accelerator):
        raise stop.error()  # the last step is checkpointed: nothing is lost
    for name, result in measured.items():
        report.evaluation(position.step, name, result.values)
        _write_records(session, output, name, result)
    if session.recipe.train.compile:
        report.note(f"compiling layers took {duration(compiled.seconds())}")
    main = session.accelerator.is_main_process
    session.release()  # what is saved is compared as it will be used
    with report.stage("saving"):
        if session.recipe.train.parallel == "fsdp":
            _gather(session)
        if main:
            artifact = write_model(session.recipe.method, session.learner, session.base, session.recipe.model.config, output / "model")
            if not session.base.stored and artifact["loads_with"] != "transformers":
                _write_base(session, output / "model" / "base")
            if lay_out := getattr(session.recipe.task, "lay_out", None):
                lay_out(output / "model", session.base.model.config, session.limits.max_length)
            loads = session.recipe.task.write_beside(session.beside, output / "model") if session.beside is not None else None  # type: ignore[attr-defined]
            if loads:
                artifact["companion"] = loads
            rows = verify.choose(_sample_split(session))
            if session.recipe.model.attention == "flash_attention_2":  # takes no float32, which learned weights are stored in
                session.base.model.set_attn_implementation("sdpa")
            expected = verify.capture(session.learner, session.prepared.tokenizer, rows, output / "model", artifact, converted=session.recipe.method.converts)
            if loads:
                expected.answers |= reload.companion_answers(session.beside, rows)
            if read_off := getattr(session.recipe.task, "read_off", None):
                expected.answers |= read_off(session.learner, rows)
    _release(session)
    if not main:
        return {}
    rundir.write_json(output / "metrics.json", {"base": manifest["base"]} | {name: result.values for name, result in measured.items()})
    details = details_of(measured, report)
    if written:
        details[next(iter(details))] |= side_by_side(session, manifest["base_samples"], written)
    rundir.write_json(output / "details.json", details)
    _draw(session, output, details)
    manifest.update(artifact=artifact)
    with report.stage("loading the result in a fresh process"):
        verification = verify.check(output / "model", artifact, expected)
    baselines = _baselines(session, report)
    summary: dict[str, Any] = {
        "output": str(output),
        "metrics": {"base": manifest["base"]} | {name: result.values for name, result in measured.items()},
        "details": details,
        "baselines": baselines,
        "verification": verification | {"loads_with": artifact["loads_with"]},
        "seconds": round(manifest.seconds, 1),
        "tokens_per_second": _tokens_per_second(output / "log.jsonl"),
        "peak_memory_bytes": peak_memory(),
        "parameters": {key: manifest["parameters"][key] for key in ("trainable", "total")},
    }
    manifest.update(verification=verification)
    rundir.write_text(output / "README.md", model_card(session.recipe, manifest.facts, summary["metrics"], details))
    summary["files"] = [[str(path), _size(path)] for path in sorted(output.iterdir()) if not path.name.startswith(".")]
    manifest.finish(notes=report.notes, summary=summary)
    return summary


def _gather(session: Session) -> None:
    """Rebuild what FSDP has shared out in the main memory of the first process, which writes and answers alone; collective."""
    learned = checkpoint.learned(session.learner)
    if not session.accelerator.is_main_process:
        return
    session.base = load_base(session.prepared, session.precision, torch.device("cpu"))
    session.learner = session.recipe.method.apply(session.base)
    checkpoint.restore_model(session.learner, learned)


def write_model(method: Method, learner: nn.Module, base: Base, overrides: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The trained weights with their tokenizer; returns how a fresh process loads them.

    `overrides` are what the run changed in the config that the base is stored with.
    """
    if directory.exists():  # what a killed run left half written
        shutil.rmtree(directory)
    base.task.complete(base.model, base.tokenizer)
    method_artifact = method.save(learner, base, directory)
    if base.model.can_generate():
        base.model.generation_config.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    artifact: dict[str, Any] = {
        "loads_with": method_artifact.loads_with,
        "auto_class": base.task.auto_class,
        "load_kwargs": method_artifact.load_kwargs | without_pooler(base.model.config, base.task),
    }
    if method_artifact.loads_with != "transformers":
        source = base.source if base.source and base.stored else Source("base")  # beside the adapter
        artifact |= {"base": source.name, "revision": source.revision}
    if method_artifact.loads_with != "transformers" and base.stored:
        changes = overrides | base.task.config_kwargs()
        artifact["load_kwargs"] |= json.loads(json.dumps(changes))  # integer keys of id2label become text, as in any JSON
    if base.source is not None and base.source.trust_remote_code:
        artifact["load_kwargs"]["trust_remote_code"] = True
    if method_artifact.loads_with == "ftkit":
        adapters.write_settings(method.stored(), artifact, learner, directory)
    return artifact


def _write_base(session: Session, directory: Path) -> None:
    """Random weights that an adapter belongs on exist nowhere on disk; the seed makes them again."""
    load_base(session.prepared, session.precision, session.base.model.device).model.save_pretrained(directory)
    session.base.tokenizer.save_pretrained(directory)


def _sample_split(session: Session) -> Any:
    """The rows that verification tries: the first validation set, else the training rows."""
    names = session.prepared.validation
    return session.prepared.splits[names[0]][1] if names else session.prepared.train


def _take_best(session: Session, output: Path, report: Reporter, position: Position) -> None:
    """Under early stopping, the best checkpoint becomes the model."""
    best = position.best_step
    if session.recipe.train.early_stopping is None or best is None or best == position.step:
        return
    state = checkpoint.load(output / "checkpoints" / f"step-{best}", session.accelerator.process_index)
    checkpoint.restore_model(session.whole, state.model)
    report.note(f"the model is that of step {best}, the best on validation")


def _write_records(session: Session, output: Path, name: str, result: Measured) -> None:
    """predictions/<split>.jsonl in the order of the rows; each process writes its share, the first joins them."""
    rows, features = session.prepared.splits[name]
    directory = output / "predictions"
    share = directory / f".{name}-{session.accelerator.process_index}.jsonl"
    rundir.write_lines(share, (json.dumps(record, ensure_ascii=False) + "\n" for record in result.records))
    session.accelerator.wait_for_everyone()
    if not session.accelerator.is_main_process:
        return
    shares = [directory / f".{name}-{rank}.jsonl" for rank in range(session.accelerator.num_processes)]
    records = Records()
    for path in shares:
        with path.open(encoding="utf-8") as file:
            records.extend(map(json.loads, file))
    rundir.write_lines(directory / f"{name}.jsonl", predictions(records, rows, features))
    for path in shares:
        path.unlink()


def _draw(session: Session, output: Path, details: dict[str, dict[str, Any]]) -> None:
    """The loss curve, and a confusion matrix for each split of a classification."""
    (output / "plots").mkdir(exist_ok=True)
    plots.loss_curve(output / "log.jsonl", output / "plots" / "loss.png")
    for name, found in details.items():
        if "confusion" in found:
            target = "confusion.png" if name in (*session.prepared.validation[:1],) else f"confusion-{name}.png"
            plots.confusion(found["confusion"], session.recipe.task.labels, output / "plots" / target)


def _baselines(session: Session, report: Reporter) -> dict[str, float]:
    """What needs no model at all would score on the first validation set, if the task knows such a thing; of the rows that were used."""
    prepared, names = session.prepared, session.prepared.validation
    baselines = getattr(session.recipe.task, "baselines", None)
    if baselines is None or not names:
        return {}
    measured, features = prepared.splits[names[0]]
    with report.stage("baselines"):
        return baselines((prepared.rows.train[row] for row in prepared.train.rows()), (measured[row] for row in features.rows()))


def _release(session: Session) -> None:
    """End the process group and let go of the model: verification happens in a process of its own."""
    session.accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    session.accelerator.free_memory()
    session.wrapped = session.trainee = session.learner = session.beside = session.optimizer = None  # type: ignore[assignment]
    session.base.model = None  # type: ignore[assignment]
    device.free_memory()


def _tokens_per_second(log: Path) -> float | None:
    """Median over the logged steps after the first, which pays for warming up."""
    from statistics import median

    rates = [record["tokens_per_second"] for record in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "tokens_per_second" in record]
    return median(rates[1:] or rates) if rates else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
