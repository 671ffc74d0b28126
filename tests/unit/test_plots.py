"""The pictures: that they are drawn from the right numbers, at every size, without leaving state behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ftkit import plots


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Every figure that is saved, with its size in pixels instead of a file."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure, target, **kwargs):
        figures.append(figure)
        save(figure, target, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def write_log(path: Path, steps: int, eval_every: int = 0, sets: tuple[str, ...] = ("validation",)) -> Path:
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "epoch": 1.0, "loss": 1 / step, "learning_rate": 1e-4 * (1 - step / steps)})
        if eval_every and step % eval_every == 0:
            lines += [{"step": step, "split": name, "loss": 2 / step, "accuracy": 0.5} for name in sets]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_a_short_run_is_drawn_as_it_was(tmp_path, drawn):
    plots.loss_curve(write_log(tmp_path / "log.jsonl", 5), tmp_path / "loss.png")
    loss, rate = drawn[0].axes
    (line,) = loss.lines
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(line.get_ydata()) == [1 / step for step in range(1, 6)]
    assert list(rate.lines[0].get_ydata())[-1] == 0
    assert (loss.get_ylabel(), rate.get_xlabel()) == ("mean loss", "optimizer step")
    assert size(tmp_path / "loss.png") == (1080, 660)


def test_a_long_run_is_smoothed_over_its_raw_line(tmp_path, drawn):
    plots.loss_curve(write_log(tmp_path / "log.jsonl", 500), tmp_path / "loss.png")
    raw, smooth = drawn[0].axes[0].lines
    assert raw.get_alpha() < 0.5
    assert smooth.get_ydata()[100] == pytest.approx(sum(1 / step for step in range(91, 112)) / 21)
    assert smooth.get_label() == "training, mean of 21 log steps"


def test_each_validation_set_has_its_points(tmp_path, drawn):
    plots.loss_curve(write_log(tmp_path / "log.jsonl", 10, 5, ("matched", "mismatched")), tmp_path / "loss.png")
    _, matched, mismatched = drawn[0].axes[0].lines
    assert [list(line.get_xdata()) for line in (matched, mismatched)] == [[5, 10], [5, 10]]
    assert (matched.get_label(), mismatched.get_label()) == ("matched", "mismatched")
    assert matched.get_color() != mismatched.get_color()


@pytest.mark.parametrize("text", ["", '{"step": 1, "loss": null, "learning_rate": 0.0}\n', '{"step": 1, "split": "validation", "accuracy": 0.5}\n'])
@pytest.mark.filterwarnings("error")
def test_a_log_with_nothing_to_draw_is_no_error(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    plots.loss_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (1080, 660)


def test_a_confusion_matrix_shows_counts_over_shares(tmp_path, drawn):
    plots.confusion([[3, 1], [0, 0]], ["no", "yes"], tmp_path / "confusion.png")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]  # a class without rows is no division by zero
    assert [text.get_text() for text in axes.texts] == ["3", "1", "0", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["no", "yes"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize(("classes", "texts", "pixels"), [(1, 1, 900), (20, 400, 2100), (21, 0, 1100), (100, 0, 2800)])
def test_a_confusion_matrix_has_a_sensible_size(tmp_path, drawn, classes, texts, pixels):
    matrix = [[int(i == j) for j in range(classes)] for i in range(classes)]
    plots.confusion(matrix, [f"class_{i}" for i in range(classes)], tmp_path / "confusion.png")
    assert len(drawn[0].axes[0].texts) == texts
    width, height = size(tmp_path / "confusion.png")
    assert 0.7 * pixels < width <= pixels
    assert height <= width


@pytest.mark.filterwarnings("error")
def test_any_class_name_can_be_drawn(tmp_path, drawn):
    plots.confusion([[1, 0, 0], [0, 1, 0], [0, 0, 1]], ["$5-$10 \\frac", "좋아요", "x" * 80], tmp_path / "confusion.png")
    names = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert names[0] == "$5-$10 \\frac"
    assert len(names[2]) == plots.LABEL_LENGTH


def test_pyplot_and_its_figures_are_left_alone(tmp_path):
    script = (
        "import sys; from pathlib import Path; from ftkit.plots import confusion; "
        f"confusion([[1]], ['a'], Path({str(tmp_path / 'a.png')!r})); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
