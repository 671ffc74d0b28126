"""The recipes that ship are data beside the library; each must be one that `ftkit train` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftkit.recipe import dump, read

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))


def test_there_are_some() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_valid_and_documented(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    recipe = read(path).recipe
    written = tmp_path / "recipe.yaml"
    written.write_text(dump(recipe), encoding="utf-8")
    assert read(written).recipe.model_dump() == recipe.model_dump()
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# yaml-language-server: $schema=") for line in comments)
    assert any("ftkit train" in line or "scripts/" in line for line in comments)
