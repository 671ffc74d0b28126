"""Recipes: YAML to one frozen value that knows where each of its values came from."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftkit.recipe.document import Problem
    from ftkit.recipe.spec import Recipe


class Resolved(NamedTuple):
    """A recipe with every default filled in and every path absolute."""

    recipe: Recipe[Any, Any, Any]
    origins: dict[str, str]  # dotted key -> "recipe.yaml:7", "command line" or "default: <source>"


def read(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """The recipe in a file, under `key=value` overrides.

    Raises RecipeError with everything that is wrong, one line each: file:line:column, what, what would be right.
    """
    from ftkit.recipe.layers import from_command_line, from_defaults, from_file, over
    from ftkit.recipe.spec import Default
    from ftkit.recipe.validation import build, origins

    problems: list[Problem] = []
    file = Path(path)
    output = {"output": Default(str(Path.cwd() / "runs" / file.stem), "runs/ and the name of the recipe")}
    typed, texts = from_command_line(overrides, problems)
    tree = reduce(over, [from_defaults(output), from_file(file, problems), typed])
    recipe, tree = build(tree, texts, problems)
    return Resolved(recipe, dict(origins(recipe, tree)))


def dump(recipe: Recipe[Any, Any, Any]) -> str:
    """YAML that `read` reads back as the same recipe, every default written out."""
    from ftkit.recipe import document

    return document.dump(recipe.model_dump())


def schema() -> dict[str, Any]:
    """JSON Schema of recipes with every installed kind, for editors."""
    from ftkit.recipe.json_schema import of_recipes

    return of_recipes()
