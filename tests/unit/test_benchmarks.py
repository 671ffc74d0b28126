"""Names of public benchmarks, as a recipe reads them; the data sets themselves are on the hub."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ftkit.errors import RecipeError
from ftkit.recipe import Resolved, read
from ftkit.recipe.benchmarks import BENCHMARKS


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def build(train: str, *overrides: str, **sections: Any) -> Resolved:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "google-bert/bert-base-uncased", "data": {"train": train}} | sections))
        return read(tmp_path / "recipe.yaml", overrides)

    return build


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_a_whole_recipe(name, recipe):
    """Task, columns and metrics are known to ftkit, and have their source beside them."""
    resolved = recipe(name)
    task, data = resolved.recipe.task, resolved.recipe.data
    assert data.train == BENCHMARKS[name].train
    known = {column.name for shape in task.shapes for column in (*shape.required, *shape.optional)}
    assert set(data.columns) <= known
    assert set(resolved.recipe.eval.metrics) <= set(task.metric_names)
    assert "arXiv" in resolved.origins["eval.metrics"] or "github" in resolved.origins["eval.metrics"]
    assert "recipe.yaml:" in resolved.origins["data.train"]


def test_the_recipe_s_own_words_come_first(recipe):
    resolved = recipe("glue/mrpc", "eval.metrics=[mcc]", task={"kind": "text-classification", "class_weights": "balanced"})
    assert resolved.recipe.eval.metrics == ["mcc"]
    assert resolved.recipe.task.class_weights == "balanced"
    assert resolved.recipe.task.labels == ["not_equivalent", "equivalent"]
    assert resolved.recipe.data.columns == {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
    assert resolved.recipe.task.metric_names[:3] == ("accuracy", "f1", "f1_binary")


def test_what_is_there_is_no_benchmark(recipe, tmp_path):
    (tmp_path / "glue").mkdir()
    assert recipe("glue/cola", task="text-classification").recipe.data.train == str(tmp_path / "glue" / "cola")


def test_without_a_benchmark_the_task_must_be_named(recipe):
    with pytest.raises(RecipeError, match=r"task"):
        recipe("stanfordnlp/imdb")
