"""The pictures of a run: how the loss went, and which classes are taken for which."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ftkit.data import cache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# from the palette of Okabe and Ito, told apart by every kind of colour vision
BLUE = "#0072B2"
SET_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00")
GREY = "#555555"
COUNTED_CLASSES = 20  # up to here a confusion matrix has room for counts
LABEL_LENGTH = 24  # characters of a class name


def loss_curve(log: Path, target: Path) -> None:
    """Draw the losses and the learning rate that a `log.jsonl` holds over the optimizer steps, as a PNG."""
    _settle_matplotlib()
    from matplotlib.ticker import MaxNLocator

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    trained = [record for record in records if "split" not in record]
    steps = [record["step"] for record in trained]
    losses = [math.nan if record["loss"] is None else record["loss"] for record in trained]
    measured: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if "split" in record and record.get("loss") is not None:
            measured.setdefault(record["split"], []).append((record["step"], record["loss"]))

    figure = _figure(7.2, 4.4)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    marker = "o" if len(steps) <= 20 else ""
    half = len(losses) // 50
    if half:
        loss.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    name = f"training, mean of {2 * half + 1} log steps" if half else "training"
    loss.plot(steps, _smooth(losses, half), color=BLUE, linewidth=1.6, marker=marker, markersize=3, label=name)
    for (name, points), color in zip(measured.items(), cycle(SET_COLORS)):
        loss.plot(*zip(*points, strict=True), color=color, linewidth=1, marker="o", markersize=5, markeredgecolor="white", label=name)
    loss.set_ylabel("mean loss")
    loss.legend(frameon=False)
    rate.plot(steps, [record["learning_rate"] for record in trained], color=GREY, linewidth=1.2, marker=marker, markersize=3)
    rate.set_ylabel("learning\nrate")
    rate.set_xlabel("optimizer step")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    rate.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    rate.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.align_ylabels()
    figure.savefig(target)


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str], target: Path) -> None:
    """Draw a confusion matrix, `matrix[true][predicted]` being a number of rows, as a PNG.

    Colours are shares of the true class, so that a rare class is as visible as a frequent one.
    """
    _settle_matplotlib()
    from matplotlib.ticker import PercentFormatter

    count = len(labels)
    shares = [[cell / (sum(row) or 1) for cell in row] for row in matrix]
    names = [label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…" for label in labels]
    counted = count <= COUNTED_CLASSES
    side = max(2.2, count * (0.5 if counted else 0.15))  # inches
    figure = _figure(side + 2.6, side + 1.8)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), names)
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0, labelsize=9 if counted else 6)
    if not counted:
        axes.tick_params(axis="x", rotation=90)
    elif max(map(len, names)) > 11 * side / count:  # more characters than fit beside each other
        for name in axes.get_xticklabels():
            name.set(rotation=45, ha="right", rotation_mode="anchor")
    for name in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        name.set_parse_math(False)  # a class may be called $5-$10
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if counted:
        for i, row in enumerate(matrix):
            for j, cell in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black" if cell else "#aaaaaa"
                axes.text(j, i, f"{cell:,}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, label="share of the true class", format=PercentFormatter(1), fraction=0.04, pad=0.02)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box; one warning a character helps nobody
        figure.savefig(target, bbox_inches="tight")


def _settle_matplotlib() -> None:
    """Before its first import: its list of fonts belongs into our cache, not into the home directory."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache.directory() / "matplotlib"))


def _figure(width: float, height: float) -> Figure:
    """A figure in inches that shares no state with anyone (pyplot keeps every figure it made)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _smooth(values: list[float], half: int) -> list[float]:
    """Means over `half` values before to `half` values after each one."""
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
