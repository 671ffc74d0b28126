"""The JSON Schema of recipes, for editors."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field

from ftkit import plugins
from ftkit.recipe.layers import SHORTHAND
from ftkit.recipe.spec import Recipe


def of_recipes() -> dict[str, Any]:
    """Every kind that is installed.  What `extends` may bring is required only of recipes without it."""
    kinds = {axis: [plugins.find(axis, kind) for kind in plugins.known(axis)] for axis in plugins.BUILTIN}
    result = Recipe[tuple(_union(classes) for classes in kinds.values())].model_json_schema()  # type: ignore[misc]
    properties, definitions = result["properties"], result["$defs"]
    for key, short in SHORTHAND.items():
        names = {"enum": plugins.known(key)} if short == "kind" else {}
        value = {name: properties[key].pop(name) for name in ("$ref", "oneOf", "discriminator") if name in properties[key]}
        if "oneOf" in value:
            value["anyOf"] = value.pop("oneOf")  # a map without its kind, which a parent gave, fits several
        properties[key] |= {"anyOf": [{"type": "string", **names}, value]}
    properties["extends"] = {
        "description": "recipes to start from; paths relative to this file",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    required = definitions["Data"].pop("required")
    complete = {"required": ["model", "task", "data"], "properties": {"data": {"required": required}}}
    del result["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result, "title": "ftkit recipe", "anyOf": [{"required": ["extends"]}, complete]}


def _union(classes: list[Any]) -> Any:
    return Annotated[reduce(or_, classes), Field(discriminator="kind")] if len(classes) > 1 else classes[0]
