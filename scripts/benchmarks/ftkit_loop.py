"""Train with ftkit's own stages, without what `ftkit train` does around the loop: evaluation, checkpoints, verification."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.measure import Watch
from ftkit import teachers
from ftkit.loop import Position, fit
from ftkit.prepare import Prepared, prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import Session, open_session


def opened(recipe: str, overrides: list[str]) -> tuple[Prepared, Session]:
    """A run up to its first step; a teacher whose answers are kept has given them."""
    with Reporter(None, quiet=True) as report:
        prepared = prepare(read(recipe, overrides), report)
        session = open_session(prepared, report)
        teachers.assign(session, report, lambda: None)
        return prepared, session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--warm-up", type=int, default=0, metavar="STEPS", help="leave the first ones out of what is measured")
    parser.add_argument("--output", type=Path, required=True, help="save the model there")
    parser.add_argument("--report", type=Path, required=True, help="write measurements there, as JSON")
    args = parser.parse_args()

    prepared, session = opened(args.recipe, args.overrides)
    watch, outcomes = Watch(args.warm_up), []
    watch.start()
    with tempfile.TemporaryDirectory() as scratch, Reporter(None, quiet=True) as report:
        session.compute_frozen(Path(scratch), report, lambda: None)
    for done in fit(session, Position()):
        watch.batch(done.tokens)
        watch.step()
        outcomes.append(done.outcome)  # to look at its numbers would be to wait for the device
    watch.stop()
    done.settle()
    session.release()
    session.learner.save_pretrained(args.output)
    prepared.tokenizer.save_pretrained(args.output)
    watch.write(args.report, layout=session.sampler.layout, supervised=round(sum(outcome.items.item() for outcome in outcomes)))


if __name__ == "__main__":
    main()
