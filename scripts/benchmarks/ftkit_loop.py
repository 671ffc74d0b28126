"""Train with ftkit's own stages, without what `ftkit train` does around the loop: evaluation, checkpoints, verification."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.measure import Watch
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", type=Path, required=True, help="save the model there")
    parser.add_argument("--report", type=Path, required=True, help="write measurements there, as JSON")
    args = parser.parse_args()

    with Reporter(None, quiet=True) as report:
        prepared = prepare(read(args.recipe, args.overrides), report)
        session = open_session(prepared, report)
    watch, tokens, supervised = Watch(), 0, 0.0
    watch.start()
    with tempfile.TemporaryDirectory() as scratch, Reporter(None, quiet=True) as report:
        session.compute_frozen(Path(scratch), report, lambda: None)
    for done in fit(session, Position()):
        watch.step()
        tokens += done.tokens
        supervised += done.items
    session.release()
    session.learner.save_pretrained(args.output)
    prepared.tokenizer.save_pretrained(args.output)
    watch.write(args.report, supervised=round(supervised), tokens=tokens)


if __name__ == "__main__":
    main()
