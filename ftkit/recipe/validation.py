"""A merged tree to a Recipe, its defaults filled in; all that is wrong with it in the recipe's own words."""

from __future__ import annotations

import difflib
import json
import re
import types
from functools import cache, reduce
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, create_model

from ftkit import plugins
from ftkit.errors import RecipeError
from ftkit.recipe.benchmarks import BENCHMARKS
from ftkit.recipe.document import MAX_PROBLEMS, Node, Place, Problem, refuse, shown
from ftkit.recipe.layers import COMMAND_LINE, at, from_defaults, over
from ftkit.recipe.spec import DEFAULT_KINDS, FROM_SCRATCH, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_WANTED = {
    "string_type": "text (quote it if it is)",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "size_type": "a size such as 2GB",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
}
_BOUNDS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}


def build(tree: Node, texts: Mapping[tuple[str, ...], str], problems: list[Problem]) -> tuple[Recipe[Any, Any, Any], Node]:
    """The recipe that a tree means, and the tree with the defaults of its kinds.

    `texts` holds the command line's values as they were typed.  Raises RecipeError with `problems` and all others.
    """
    if (train := at(tree, "data", "train")) and isinstance(train.value, str) and (benchmark := BENCHMARKS.get(train.value)):
        tree = over(from_defaults(benchmark.defaults), tree)
        tree = over(tree, Node({"data": Node({"train": Node(benchmark.train, train.place)}, train.place)}, train.place))
    tree = over(from_defaults({f"{axis}.kind": default for axis, default in DEFAULT_KINDS.items()}), tree)
    kinds = [_kind(axis, tree, problems) for axis in plugins.BUILTIN]
    layers = [from_defaults(kind.defaults) for kind in kinds if kind is not Any and hasattr(kind, "defaults")]
    if (init := at(tree, "model", "init")) and init.value == "random":
        layers.append(from_defaults(FROM_SCRATCH))
    tree = reduce(over, [*layers, tree])
    recipe_type = _recipe_type(*kinds)
    for path, text in texts.items():
        tree = _as_text(tree, path, text, recipe_type)
    try:
        recipe = _validated(tree, recipe_type)
    except ValidationError as error:
        problems.extend(_problems(error, tree, recipe_type))
        known = _without_unknown(error, tree)  # the rules of a section are asked only where all of its keys are known
        try:
            _validated(known, recipe_type)
        except ValidationError as rest:
            problems.extend(_problems(rest, known, recipe_type))
    refuse(problems)
    return recipe, tree


def _validated(tree: Node, recipe_type: Any) -> Recipe[Any, Any, Any]:
    """As JSON, since strict validation of Python values would refuse a list for a tuple."""
    return recipe_type.model_validate_json(json.dumps(tree.plain()), strict=True)


def _without_unknown(error: ValidationError, tree: Node) -> Node:
    """The tree without the keys that the error calls unknown."""
    unknown = {_path(detail, tree) for detail in error.errors(include_url=False, include_input=False) if detail["type"] == "extra_forbidden"}

    def keep(path: tuple[str, ...], node: Node) -> Node:
        if not isinstance(node.value, dict):
            return node
        return Node({key: child for key, child in node.value.items() if (*path, key) not in unknown}, node.place)

    return tree.changed(keep)


def origins(value: Any, node: Node | None, path: str = "", source: str | None = None) -> Iterator[tuple[str, str]]:
    """Each leaf of a recipe as a dotted key, and where its value came from."""
    inner = node.value if node and isinstance(node.value, dict) else {}
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            extra: Any = field.json_schema_extra or {}
            yield from origins(getattr(value, name), inner.get(name), f"{path}.{name}".lstrip("."), extra.get("source"))
    elif inner:
        for name, child in inner.items():
            yield from origins(child.plain(), child, f"{path}.{name}")
    elif node:
        yield path, str(node.place._replace(column=0))
    else:
        yield path, f"default: {source}" if source else "default"


@cache
def _recipe_type(task: Any, method: Any, objective: Any) -> type[Recipe[Any, Any, Any]]:
    """What Recipe[task, method, objective] means, without the validator that pydantic would build for Recipe itself."""
    return create_model("Recipe", __base__=Recipe, task=(task, ...), method=(method, ...), objective=(objective, ...))


def _kind(axis: str, tree: Node, problems: list[Problem]) -> Any:
    """The class that `axis` names; Any, which takes every value, where it names none."""
    section = tree.value.get(axis)
    if section is None:
        return Any  # reported as missing by the schema
    kind = section.value.get("kind") if isinstance(section.value, dict) else section
    if kind is None:
        problems.append(Problem(section.place, f"missing required key `{axis}.kind` (known: {', '.join(plugins.known(axis))})"))
    elif not isinstance(kind.value, str):
        problems.append(Problem(kind.place, f"`{axis}: {shown(kind.plain())}` is not the name of a kind (known: {', '.join(plugins.known(axis))})"))
    else:
        try:
            return plugins.find(axis, kind.value)
        except RecipeError as error:
            problems.append(Problem(kind.place, str(error)))
    return Any


def _as_text(tree: Node, path: tuple[str, ...], text: str, recipe_type: Any) -> Node:
    """With a command line's 123 as text where only text will do: shells make quotes hard to pass."""
    node = at(tree, *path)
    members = [member for annotation in _annotations(recipe_type, path) for member in _members(annotation)]
    if node is None or str not in members or isinstance(node.value, str | dict | list) or node.value is None:
        return tree
    if type(node.value) in members or (float in members and type(node.value) is int):
        return tree
    return tree.changed(lambda where, inner: Node(text, inner.place) if where == path else inner)


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, without their constraints."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _annotations(annotation: Any, path: Sequence[str | int]) -> list[Any]:
    """The types that the value at a path may have, one for each alternative on the way."""
    if not path:
        return [annotation]
    found = []
    for member in _members(annotation):
        if get_origin(member) in (dict, list, tuple):
            found += _annotations(get_args(member)[-1], path[1:])
        elif _is_spec(member) and path[0] in member.model_fields:
            found += _annotations(member.model_fields[path[0]].annotation, path[1:])
    return found


def _is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _specs(annotation: Any, path: Sequence[str | int]) -> list[type[BaseModel]]:
    return [member for found in _annotations(annotation, path) for member in _members(found) if _is_spec(member)]


def _known(spec: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a spec."""
    for name, field in spec.model_fields.items():
        yield prefix + name
        for inner in _specs(field.annotation, ()):
            yield from _known(inner, f"{prefix}{name}.")


def _problems(error: ValidationError, tree: Node, recipe_type: Any) -> Iterator[Problem]:
    """One problem for each wrong key, where pydantic reports one for each alternative of a type."""
    grouped: dict[tuple[str | int, ...], list[Any]] = {}
    for detail in error.errors(include_url=False, include_input=False):
        grouped.setdefault(_path(detail, tree), []).append(detail)
    above = {path[:length] for path in grouped for length in range(len(path))}
    for number, (path, details) in enumerate(grouped.items()):
        hints = number < MAX_PROBLEMS  # more are not shown, and looking for 100,000 takes minutes
        node, place = _nearest(tree, path)
        key = shown(_dotted(path))
        kinds = {detail["type"] for detail in details}
        mismatch = kinds <= {*_WANTED, "literal_error"}
        if mismatch and path in above:
            continue  # an alternative that was not meant; the one that was has errors of its own
        if kinds == {"extra_forbidden"}:
            message = f"unknown key `{key}`{_suggestion(path, recipe_type) if hints else ''}"
        elif kinds == {"missing"}:
            message = f"missing required key `{key}`{_described(path, recipe_type)}"
        elif mismatch:
            message = f"`{key}: {shown(node.plain())}` is not {_alternatives(details)}{_closest(details, node.value) if hints else ''}"
        else:
            wrong = next(_wrong(detail) for detail in details if detail["type"] not in _WANTED)
            message = wrong if isinstance(node.value, dict) else f"`{key}: {shown(node.plain())}` {wrong}"
        yield Problem(place, message)


def _path(detail: Any, tree: Node) -> tuple[str | int, ...]:
    """The keys of an error's place, without the names that pydantic gives to the alternatives of a type."""
    node, path = tree, []
    for part in detail["loc"]:
        inside = part in node.value if isinstance(node.value, dict) else isinstance(node.value, list) and isinstance(part, int)
        if inside:
            node = node.value[part]
            path.append(part)
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else tuple(path)


def _nearest(tree: Node, path: Sequence[str | int]) -> tuple[Node, Place]:
    """The deepest node on a path, and the best place to point at."""
    node, place = tree, tree.place
    for part in path:
        if isinstance(node.value, dict) and part not in node.value:
            break
        node = node.value[part]
        if node.place.line or node.place.source == COMMAND_LINE:  # not a default
            place = node.place
    return node, place


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _wrong(detail: Any) -> str:
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    bound = _BOUNDS.get(detail["type"])
    return bound.format(**detail["ctx"]) if bound else detail["msg"][0].lower() + detail["msg"][1:]


def _alternatives(details: Sequence[Any]) -> str:
    words = [_WANTED.get(detail["type"]) or f"one of {detail['ctx']['expected'].replace(' or ', ', ')}" for detail in details]
    return " or ".join(dict.fromkeys(words))


def _closest(details: Sequence[Any], value: Any) -> str:
    names = [name for detail in details if detail["type"] == "literal_error" for name in re.findall(r"'([^']*)'", detail["ctx"]["expected"])]
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean `{close[0]}`?" if close else ""


def _suggestion(path: Sequence[str | int], recipe_type: Any) -> str:
    """What an unknown key could have been: a key of another section, or the nearest of its own."""
    key = str(path[-1])
    siblings = [name for spec in _specs(recipe_type, path[:-1]) for name in spec.model_fields]
    everywhere = {known.rpartition(".")[2]: known for known in _known(recipe_type)}
    if key in everywhere:
        return f"; did you mean `{everywhere[key]}`?"
    if close := difflib.get_close_matches(key, siblings, n=1):
        return f"; did you mean `{close[0]}`?"
    if close := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75):
        return f"; did you mean `{everywhere[close[0]]}`?"
    return f" (known: {', '.join(siblings)})"


def _described(path: Sequence[str | int], recipe_type: Any) -> str:
    docs = [spec.model_fields[path[-1]].description for spec in _specs(recipe_type, path[:-1]) if path[-1] in spec.model_fields]
    return f": {docs[0]}" if docs and docs[0] else ""
