"""The last word of a run, on stdout: base against tuned, what was written, how it was verified."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.progress import open_console, print_line
from ftkit.quantities import denominator, duration, interval, number, size

if TYPE_CHECKING:
    from rich.table import Table

    from ftkit.tasks import Task

LOWER_IS_BETTER = {"loss", "perplexity", "ece", "mse"}


def leading_metric(task: Task, values: Mapping[str, float]) -> str:
    """The main metric of a task among those that were measured, or the first one, where eval.metrics leaves that out."""
    return task.main_metric if task.main_metric in values else next(iter(values))


def share_kept(metric: str, own: float, other: float) -> float | None:
    """The share of another model's score that a model keeps, 1 where they are equal; None where that has no measure."""
    better, base = (other, own) if metric in LOWER_IS_BETTER else (own, other)
    return better / base if base else None


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print what there is of: metrics and details (as in metrics.json and details.json), baselines (name -> accuracy on the first set),
    parameters, seconds, tokens_per_second, peak_memory_bytes, verification, notes, output, files, against (as in comparison.json).
    """
    console = open_console(sys.stdout)
    if metrics := summary.get("metrics"):
        console.print(_table(metrics, {split: found.get("intervals", {}) for split, found in summary.get("details", {}).items()}))
        console.print()
    if against := summary.get("against"):
        console.print(_comparison(against))
        console.print()
    for line in _facts(summary):
        print_line(console, line)
    if notes := summary.get("notes"):
        print_line(console, "notes")
        for note in notes:
            print_line(console, note, indent=2)
    if files := summary.get("files"):
        output = Path(summary.get("output", "."))
        console.print(f"written to {output}", soft_wrap=True)  # paths are never wrapped: they are for copying
        sizes = [size(count) for _, count in files]
        width = max(map(len, sizes))
        for (path, _), text in zip(files, sizes, strict=True):
            inside = Path(path).is_relative_to(output)
            console.print(f"  {text:>{width}}  {Path(path).relative_to(output) if inside else path}", soft_wrap=True)


def print_compression(summary: Mapping[str, Any]) -> None:
    """Print what `ftkit compress` returns: a row for each model, with its size, speed and score."""
    from rich import box
    from rich.table import Table

    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1000:.1f} ms"

    rows = summary["models"]
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "model": ("", str),
        "parameters": ("parameters", lambda count: f"{count / 1e6:,.1f} M"),
        "bytes_on_disk": ("on disk", size),
        "bytes_loaded": ("loaded", size),
        "seconds_batch_1": ("1 row", milliseconds),
        "seconds_batch_32": ("32 rows", milliseconds),
        "score": (rows[0]["metric"] or "score", number),
        "kept": ("kept", lambda share: "-" if share is None else f"{share:.1%}"),
    }
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for title, _ in columns.values():
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(shown(row[key]) for key, (_, shown) in columns.items()))
    console = open_console(sys.stdout)
    console.print(table)
    print_line(console, f"times are medians, on a CPU with {summary['threads']} threads")
    if compared := summary.get("int8"):
        told = ", ".join(f"{name} {number(value)}" for name, value in compared.items() if name != "rows")
        print_line(console, f"int8 against float, on {compared['rows']} rows: {told}")
    console.print(f"written to {summary['output']}", soft_wrap=True)


def _table(metrics: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """A row for each set and metric, columns for the base and the tuned model, the better one standing out, and for the intervals of the tuned one's."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    base = metrics.get("base", {})
    tuned = {split: values for split, values in metrics.items() if split != "base"}
    columns = [name for name, measured in (("base", base), ("tuned", tuned)) if measured]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", min_width=7, no_wrap=True)
    if any(intervals.values()):
        table.add_column("95 % interval", justify="right", no_wrap=True)
    for split in dict.fromkeys((*tuned, *base)):
        values = {"base": base.get(split, {}), "tuned": tuned.get(split, {})}
        table.add_row(Text(split, style="bold"))
        for metric in dict.fromkeys((*values["tuned"], *values["base"])):
            if metric == "loss_count":
                continue
            row = {name: values[name].get(metric) for name in columns}
            best = _best(metric, [value for value in row.values() if value is not None])
            cells = [Text(number(value), style="bold green" if value == best else "") for value in row.values()]
            between = (Text(interval(found), style="dim") for found in (intervals.get(split, {}).get(metric),) if found)
            table.add_row(f"  {metric}{denominator(values[columns[-1]]) if metric == 'loss' else ''}", *cells, *between)
    return table


def _comparison(against: Mapping[str, Any]) -> Table:
    """This run beside another: scores, size, time, and what share of the other's each is."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("own", Path(against["run"]).name, "share", "agreement"):
        table.add_column(name, justify="right", no_wrap=True)

    def share(pair: Mapping[str, float]) -> str:
        return f"{pair['own'] / pair['other']:.1%}"

    for split, found in against["sets"].items():
        kept, agreement = (f"{found[name]:.1%}" if found[name] is not None else "-" for name in ("kept", "agreement"))
        table.add_row(f"{split} {against['metric']}", number(found["own"]), number(found["other"]), kept, agreement)
    for name, show in (("parameters", number), ("bytes", size)):
        pair = against[name]
        table.add_row(name, show(pair["own"]), show(pair["other"]), share(pair))
    for rows, pair in against["latency_seconds"].items():
        table.add_row(f"milliseconds, batch of {rows}", *(f"{1000 * pair[name]:.2f}" for name in ("own", "other")), share(pair))
    return table


def _best(metric: str, values: list[float]) -> float:
    """The best of several values; NaN, which equals nothing, where there is no better one."""
    if len(set(values)) < 2:
        return math.nan
    return min(values) if metric in LOWER_IS_BETTER else max(values)


def _facts(summary: Mapping[str, Any]) -> list[str]:
    """How the run went, in a line each."""
    facts = []
    if baselines := summary.get("baselines"):
        named = (f"{name.replace('_', ' ')} {number(value)}" for name, value in baselines.items())
        facts.append(f"baselines {', '.join(named)} (accuracy)")
    if counts := summary.get("parameters"):
        facts.append(f"trained   {counts['trainable']:,} of {counts['total']:,} parameters ({counts['trainable'] / counts['total']:.2%})")
    cost = [
        text.format(show(summary[key]))
        for key, text, show in (
            ("seconds", "{}", duration),
            ("tokens_per_second", "{} tokens/s", "{:,.0f}".format),
            ("peak_memory_bytes", "peak memory {}", size),
        )
        if summary.get(key) is not None
    ]
    if cost:
        facts.append(f"took      {', '.join(cost)}")
    if check := summary.get("verification"):
        same = "the same" if check["max_difference"] <= check["tolerance"] else "OTHER"
        facts.append(
            f"verified  a fresh {check['loads_with']} load gives {same} outputs "
            f"(largest difference {check['max_difference']:.2g}, tolerance {check['tolerance']:.2g})"
        )
    return facts
