"""The spine: what `ftkit train` does, one statement a stage."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import checkpoint, launch, model, rundir, signals, teachers, trackers
from ftkit.errors import Diverged, RecipeError
from ftkit.evaluate import measure, samples
from ftkit.finish import finish
from ftkit.loop import Position, fit
from ftkit.manifest import Manifest, describe
from ftkit.prepare import prepare
from ftkit.recipe import dump, read
from ftkit.report import Reporter
from ftkit.session import Session, open_session
from ftkit.summary import LOWER_IS_BETTER

if TYPE_CHECKING:
    from ftkit.recipe import Resolved
    from ftkit.recipe.spec import Train


def train(path: str, overrides: Sequence[str] = (), resume: bool = False, overwrite: bool = False, smoke: bool = False) -> dict[str, Any]:
    """Do what the recipe says, verify what was written, and return the summary that `ftkit train` prints."""
    if smoke:
        from ftkit.smoke import rehearse

        if resume:
            raise RecipeError("--smoke always starts anew: leave --resume out")
        return rehearse(path, overrides)
    resolved = read(path, overrides)
    output = Path(resolved.recipe.output)
    world, wanted = launch.world(), launch.processes(resolved.recipe.train)
    if world.rank == 0:
        rundir.check(output, resume, overwrite)
    if world.size == 1 and wanted > 1:
        flags = {"--resume": resume, "--overwrite": overwrite}
        return _launch(resolved, ["train", str(path), *overrides, *(flag for flag, on in flags.items() if on)], wanted)
    with signals.listening() as stop:
        return _train(resolved, stop, resume, overwrite, world.rank == 0)


def _launch(resolved: Resolved, argv: list[str], processes: int) -> dict[str, Any]:
    """Preprocess here, so that the ranks find everything in the cache, then run them and return what they wrote."""
    with signals.listening() as stop, Reporter(None) as report:
        prepare(resolved, report, stop.poll)
        report.note(f"starting {processes} processes")
    launch.launch(argv, processes)
    return rundir.read_json(Path(resolved.recipe.output) / "manifest.json")["summary"]


def _train(resolved: Resolved, stop: signals.StopRequest, resume: bool, overwrite: bool, main: bool) -> dict[str, Any]:
    model.quiet_libraries()
    output = Path(resolved.recipe.output)
    with Reporter(output / "log.jsonl", main=main) as report:
        with report.told(by_another=launch.ERROR_DIR in os.environ):  # by the process that launched this one
            prepared = prepare(resolved, report, stop.poll)
        before = rundir.continued(output, prepared, resume, report.warn)
        if before.get("status") == "finished":
            report.note(f"{output} is finished; --overwrite trains it anew")
            return before["summary"]
        session = open_session(prepared, report, before)
        if main:
            trackers.check(prepared.recipe.train.trackers)  # before an earlier run is removed
            rundir.spare(output, prepared)
            rundir.claim(output, anew=overwrite or not before)
            report.track(trackers.open_trackers(prepared.recipe.train.trackers, output, prepared.recipe.model_dump()))
            rundir.write_text(output / "recipe.yaml", dump(prepared.recipe))
        with Manifest(output, before | describe(session), main) as manifest:
            position = _restore(session, output, report, resume)
            teachers.assign(session, report, stop.poll)
            session.compute_frozen(output, report, stop.poll)
            once = len(session.frozen.layers) if session.frozen else 0
            if before.get("layers_computed_once", once) != once:  # memory or disk have room for other things than before
                report.warn(f"not bit for bit as without the interruption: layers computed once were {before['layers_computed_once']} and are {once}")
            manifest.update(layers_computed_once=once)
            if position.step == 0 and "base" not in before:
                with session.untouched():
                    base, written = measure(session, prepared.splits, report, stop), samples(session, report, stop)
                _stop_if_asked(session, output, position, report, stop)
                manifest.update(base={name: measured.values for name, measured in base.items()}, base_samples=written)
            if position.step == 0:
                for name in prepared.validation:
                    report.evaluation(0, name, manifest["base"][name])
            _learn(session, output, report, stop, position)
            return finish(session, output, report, stop, position, manifest)


def _learn(session: Session, output: Path, report: Reporter, stop: signals.StopRequest, position: Position) -> None:
    """Train to the end, or until validation no longer improves; log, evaluate and save when due."""
    train, num_steps = session.recipe.train, session.num_steps
    with report.training(num_steps, position.step) as stage:
        if position.evaluation_due and _validate(session, output, report, stop, position):  # a signal had cut it off
            _save(session, output, position, report)
        clock, tokens = time.perf_counter(), 0
        with _named_failures(session, output):
            steps = fit(session, position)
            while not _out_of_patience(train, position) and (done := next(steps, None)):
                tokens += done.tokens
                stage.advance()
                last = position.step == num_steps
                logging = position.step % train.log_every == 0 or last or position.step == 1
                position.evaluation_due = _due(train.eval_every, position) and (not last or train.early_stopping is not None)
                if logging or position.evaluation_due:
                    done.settle()
                if logging:
                    rate = train.learning_rate * session.schedule(position.step - 1)
                    seconds = time.perf_counter() - clock
                    report.step(
                        {
                            "step": position.step,
                            "epoch": round(done.epoch, 4),
                            "loss": done.loss,
                            "learning_rate": rate,
                            "grad_norm": done.grad_norm,
                            "tokens_per_second": round(tokens / seconds, 1),
                        }
                    )
                    clock, tokens = time.perf_counter(), 0
                pause = time.perf_counter()
                best = position.evaluation_due and _validate(session, output, report, stop, position)
                stopping = stop.agreed(session.accelerator)
                if best or _due(train.save_every, position) or last or stopping:
                    done.settle()
                    _save(session, output, position, report)
                if stopping:
                    raise stop.error()
                clock += time.perf_counter() - pause
    if train.early_stopping and _out_of_patience(train, position):
        report.note(f"stopped early: no better {train.early_stopping.metric} since step {position.best_step}")


def _due(every: int | None, position: Position) -> bool:
    """Whether what happens every so many steps, or after every epoch, happens now."""
    return position.step % every == 0 if every else position.batch == 0


def _out_of_patience(train: Train, position: Position) -> bool:
    """Whether validation has not improved for as long as the recipe bears; asked before a step, since a resumed run may have stopped there."""
    return train.early_stopping is not None and position.evaluations_since_best >= train.early_stopping.patience


def _validate(session: Session, output: Path, report: Reporter, stop: signals.StopRequest, position: Position) -> bool:
    """Measure the validation sets and remember the best step; whether this one may become the model.  A signal leaves the evaluation due."""
    names = session.prepared.validation
    measured = measure(session, names, report, stop)
    _stop_if_asked(session, output, position, report, stop)
    position.evaluation_due = False
    for name, result in measured.items():
        report.evaluation(position.step, name, result.values)
    watched = session.recipe.train.early_stopping
    best = False
    if names:
        name, margin = (watched.metric, watched.min_delta) if watched else ("loss", 0.0)
        values = measured[names[0]].metrics.compute()  # eval.metrics may not ask for the one that is watched
        sign = -1 if name in LOWER_IS_BETTER else 1
        best = position.best_metric is None or sign * (values[name] - position.best_metric) > margin
        if best:
            position.best_step, position.best_metric, position.evaluations_since_best = position.step, values[name], 0
        else:
            position.evaluations_since_best += 1
    return best and watched is not None


@contextmanager
def _named_failures(session: Session, output: Path) -> Iterator[None]:
    """A divergence of a step is told with its number, its rows, and the checkpoint to go back to."""
    try:
        yield
    except Diverged as error:
        if error.step is None:  # of an evaluation
            raise
        rows, features = session.prepared.rows.train, session.prepared.train
        places = [rows[int(features.row[i])].where for i in error.rows[:5]]
        good = checkpoint.newest(output / "checkpoints", lambda reason: None)
        back = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise Diverged(
            f"step {error.step}: {error}, on the rows {', '.join(places)}{', ...' if len(error.rows) > 5 else ''}; it did not change the weights and {back}. "
            f"Lower train.learning_rate ({session.recipe.train.learning_rate}) or look at these rows",
            error.rows,
            error.step,
        ) from error


def _save(session: Session, output: Path, position: Position, report: Reporter) -> None:
    """Write a checkpoint of this moment, between two steps."""
    state = checkpoint.TrainingState(
        **asdict(position),
        model=checkpoint.learned(session.whole),
        optimizer=checkpoint.capture_optimizer(session.optimizer, session.whole.named_parameters()),
        rng=checkpoint.capture_rng(),
        environment=checkpoint.environment(session.accelerator.num_processes),
        log_bytes=report.log_position(),
        scaler=session.accelerator.scaler.state_dict() if session.accelerator.scaler else {},
    )
    checkpoint.save(
        output / "checkpoints",
        state,
        session.recipe.train.keep,
        position.best_step,
        rank=session.accelerator.process_index,
        barrier=session.accelerator.wait_for_everyone,
    )


def _restore(session: Session, output: Path, report: Reporter, resume: bool) -> Position:
    """Go on from the newest complete checkpoint, or from the start where there is none."""
    if not resume:
        return Position()
    if session.accelerator.is_main_process:
        checkpoint.newest(output / "checkpoints", report.warn)  # clears away what a killed run left unfinished
    session.accelerator.wait_for_everyone()
    path = checkpoint.newest(output / "checkpoints", lambda reason: None)
    if path is None:
        report.note("no complete checkpoint: starting from the first step")
        report.cut_log(0)
        return Position()
    state = checkpoint.load(path, session.accelerator.process_index)
    checkpoint.restore_model(session.whole, state.model)
    checkpoint.restore_optimizer(session.optimizer, session.whole.named_parameters(), state.optimizer)
    differences = [*checkpoint.changes(state.environment, checkpoint.environment(session.accelerator.num_processes))]
    if session.accelerator.device.type == "cuda":
        differences.append("GPUs add in no fixed order")
    elif session.accelerator.num_processes > 2:
        differences.append("more than two processes add in another order in the first step")  # DDP orders its buckets after it
    for difference in differences:
        report.warn(f"not bit for bit as without the interruption: {difference}")
    if session.accelerator.scaler and state.scaler:
        session.accelerator.scaler.load_state_dict(state.scaler)
    report.cut_log(state.log_bytes)
    report.note(f"continuing from {path}")
    if state.rng:
        checkpoint.restore_rng(state.rng)
    return Position(**{field.name: getattr(state, field.name) for field in fields(Position)})


def _stop_if_asked(session: Session, output: Path, position: Position, report: Reporter, stop: signals.StopRequest) -> None:
    """Checkpoint and leave, if a signal asked for it."""
    if stop.agreed(session.accelerator):
        _save(session, output, position, report)
        raise stop.error()
