"""Everything that `ftkit train` does up to the end of the first optimizer step, on a tiny model, but for measuring the base; then the process ends at once.

python -m benchmarks.first_step METHOD RECIPE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ftkit


def write(path: Path, method: str) -> None:
    """A recipe of a BERT of 100 k random weights on the rows of the quickstart."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
    tokenizer = {"train": "data", "kind": "wordpiece", "vocab_size": 1000}
    recipe = {
        "model": {"init": "random", "config": {"model_type": "bert", **sizes}, "tokenizer": tokenizer},
        "task": "text-classification",
        "data": {"train": str(Path(ftkit.__file__).parent / "demo" / "train.csv")},
        "method": method,
        "train": {"steps": 1, "precision": "fp32"},
        "output": str(path.parent / "run"),
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")


def main() -> None:
    method, path = sys.argv[1], Path(sys.argv[2])
    write(path, method)
    from ftkit.loop import Position, fit
    from ftkit.model import quiet_libraries
    from ftkit.prepare import prepare
    from ftkit.recipe import read
    from ftkit.report import Reporter
    from ftkit.run import open_session

    quiet_libraries()
    with Reporter(None, quiet=True) as report:
        session = open_session(prepare(read(path), report), report)
    next(fit(session, Position()))
    os._exit(0)


if __name__ == "__main__":
    main()
