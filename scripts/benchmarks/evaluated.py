"""Measure a run on the rows of a file as `ftkit eval` does, and write what memory that took at most.

python -m benchmarks.evaluated RUN FILE --report out.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.measure import peak_memory
from ftkit.remeasure import evaluate


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("file")
    options.add_argument("--report", type=Path, required=True)
    args = options.parse_args()
    measured = evaluate(args.run, data=args.file)
    args.report.write_text(json.dumps({"peak_memory": peak_memory(), "metrics": measured["metrics"]}), encoding="utf-8")


if __name__ == "__main__":
    main()
