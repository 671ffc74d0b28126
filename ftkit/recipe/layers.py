"""The layers of a recipe: the files that it extends, itself, and the command line, merged into one tree."""

from __future__ import annotations

import os
import re
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import RecipeError
from ftkit.recipe.benchmarks import BENCHMARKS
from ftkit.recipe.document import MAX_BYTES, MAX_DEPTH, Node, Place, Problem, parse, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ftkit.recipe.spec import Default

COMMAND_LINE = "command line"
SHORTHAND = {"model": "name", "task": "kind", "method": "kind", "objective": "kind"}  # what a string there is short for

_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16}|sk-(?=[\w-]{0,60}[0-9])[\w-]{16}|AKIA[0-9A-Z]{12}|gh[oprsu]_[A-Za-z0-9]{20}|github_pat_\w{20})")
_HUB_MODEL = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_DATA = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[^@/\s]+)?(@[\w./-]+)?", re.ASCII)
_DATA_FILE = re.compile(r"\.(csv|tsv|jsonl|ndjson|json|parquet|txt)(\.gz)?$", re.IGNORECASE)


def from_file(file: Path, problems: list[Problem]) -> Node:
    """A recipe file on top of those that it extends."""
    return _extended(file, Path.cwd(), "", {}, {}, problems)


def _extended(file: Path, base: Path, asked: str, chain: dict[Path, str], done: dict[Path, Node], problems: list[Problem]) -> Node:
    """`base` is the folder that relative paths start from, `chain` holds the files that extend this one."""
    identity = Path(os.path.realpath(file))
    if identity in chain:
        raise RecipeError(f"{asked}`extends` goes in a circle: {' -> '.join([*chain.values(), str(file)])}")
    if len(chain) == MAX_DEPTH:
        raise RecipeError(f"{asked}`extends` goes deeper than {MAX_DEPTH} files")
    if identity not in done:
        node = _cleaned(parse(_text(file, asked), str(file), problems), str(file), problems)
        parents = []
        for name in _listed(node.value.pop("extends", None)):
            if isinstance(name.value, str) and "\0" not in name.value:
                parent = file.parent / name.value
                parents.append(_extended(parent, parent.parent.absolute(), f"{name.place}: ", {**chain, identity: str(file)}, done, problems))
            else:
                problems.append(Problem(name.place, f"`extends: {shown(name.plain())}` is not the path of a recipe"))
        done[identity] = reduce(over, [*parents, _located(node, base)])
    return done[identity]


def from_command_line(overrides: Sequence[str], problems: list[Problem]) -> tuple[Node, dict[tuple[str, ...], str]]:
    """The tree of `key=value` arguments, and the text of each value."""
    place = Place(COMMAND_LINE)
    tree, texts = Node({}, place), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path):
            problems.append(Problem(place, f"{shown(override)} is not key=value, such as train.learning_rate=1e-4"))
            continue
        node = parse(text, f"{COMMAND_LINE}: {shown(key)}", problems)
        if isinstance(node.value, dict | list) and not text.lstrip().startswith(("{", "[")):
            problems.append(Problem(place, f"{shown(key)}: a map is written {{key: value}} here, a list [a, b]"))
            continue
        node = _nested(path, node).changed(lambda _, inner: Node(inner.value, place))
        tree = merged(tree, _cleaned(node, COMMAND_LINE, problems))
        texts[path] = text.strip()
    return _located(tree, Path.cwd()), texts


def from_defaults(defaults: Mapping[str, Default]) -> Node:
    """The tree of dotted keys with a default and its source each."""
    tree = Node({}, Place("default"))
    for key, default in defaults.items():
        place = Place(f"default: {default.source}")
        value = [Node(item, place) for item in default.value] if isinstance(default.value, list) else default.value
        tree = merged(tree, _nested(key.split("."), Node(value, place)))
    return tree


def over(base: Node, top: Node) -> Node:
    """The layer `top` over the layer `base`: maps merge, everything else replaces.

    What `top` makes meaningless goes: the fields of another kind, epochs where it counts steps, rows of a batch where it counts tokens.
    """
    below, above = dict(base.value), dict(top.value)
    for axis in ("task", "method", "objective"):
        was, now = at(base, axis, "kind"), at(top, axis, "kind")
        if was and now and was.value != now.value:
            del below[axis]
    for pair in (("epochs", "steps"), ("batch_size", "batch_tokens")):
        given = [node for key in pair if (node := at(top, "train", key)) and node.value is not None]
        if len(given) == 1:
            above["train"] = merged(Node({key: Node(None, given[0].place) for key in pair}, given[0].place), above["train"])
    return merged(Node(below, base.place), Node(above, top.place))


def merged(base: Node, top: Node) -> Node:
    """Two trees as one, `top` replacing what is not a map in both."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    both = {key: merged(base.value[key], node) if key in base.value else node for key, node in top.value.items()}
    return Node({**base.value, **both}, base.place if top.place.source == COMMAND_LINE else top.place)


def at(node: Node, *path: str) -> Node | None:
    """The node under keys, if there is one."""
    for key in path:
        if not isinstance(node.value, dict) or key not in node.value:
            return None
        node = node.value[key]
    return node


def _nested(path: Sequence[str], node: Node) -> Node:
    for key in reversed(path):
        node = Node({key: node}, node.place)
    return node


def _text(file: Path, asked: str) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)  # never the whole of what may be endless
    except (OSError, ValueError) as error:
        reason = "a directory, not a recipe" if isinstance(error, IsADirectoryError) else getattr(error, "strerror", None) or error
        raise RecipeError(f"{asked}{file}: {reason}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{file}: larger than {MAX_BYTES:,} bytes; a recipe holds settings, data belongs into data files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = Place(str(file), data.count(b"\n", 0, error.start) + 1)
        raise RecipeError(f"{place}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None


def _listed(node: Node | None) -> list[Node]:
    if node is None:
        return []
    return node.value if isinstance(node.value, list) else [node]


def _cleaned(node: Node, source: str, problems: list[Problem]) -> Node:
    """A layer without secrets and empty sections, with strings written out as the maps that they are short for."""
    if node.value is None:
        raise RecipeError(f"{source}: the recipe is empty; it needs at least model, task and data.train")
    if not isinstance(node.value, dict):
        raise RecipeError(f"{source}: a recipe is a map of keys to values, not {'a list' if isinstance(node.value, list) else 'one value'}")

    def redacted(_: tuple[str, ...], inner: Node) -> Node:
        def text(value: Any) -> Any:
            if not (isinstance(value, str) and _SECRET.search(value)):
                return value
            problems.append(Problem(inner.place, "this looks like a secret; put it into an environment variable (HF_TOKEN for the hub)"))
            return "(secret)"

        if isinstance(inner.value, dict):
            return Node({text(key): child for key, child in inner.value.items()}, inner.place)
        return Node(text(inner.value), inner.place)

    sections = {}
    for key, section in node.changed(redacted).value.items():
        if key in SHORTHAND and isinstance(section.value, str):
            sections[key] = Node({SHORTHAND[key]: section}, section.place)
        elif section.value is not None:
            sections[key] = section
    return Node(sections, node.place)


def _located(node: Node, base: Path) -> Node:
    """With absolute paths wherever a value names something on disk."""

    def located(path: tuple[str, ...], inner: Node) -> Node:
        locate = _LOCATE.get(path) or _LOCATE.get((*path[:-1], "*"))
        return Node(locate(inner.value, base), inner.place) if locate and isinstance(inner.value, str) and inner.value else inner

    return node.changed(located)


def _path(name: str, base: Path) -> str:
    return str(base / (Path(name).expanduser() if name.startswith("~/") else name))


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that no file system takes
        return False


def _local(name: str, base: Path) -> bool:
    """Whether the path, or its first folder, is there."""
    first, slash, _ = name.partition("/")
    return _exists(_path(name, base)) or (bool(slash) and _exists(_path(first, base)))


def _data(name: str, base: Path) -> str:
    hub = (name in BENCHMARKS or _HUB_DATA.fullmatch(name)) and not _DATA_FILE.search(name) and not _local(name, base)
    return name if hub else _path(name, base)


def _model(name: str, base: Path) -> str:
    return name if _HUB_MODEL.fullmatch(name) and not _local(name, base) else _path(name, base)


def _tokenizer_data(name: str, base: Path) -> str:
    return name if name == "data" else _path(name, base)


_LOCATE: dict[tuple[str, ...], Callable[[str, Path], str]] = {
    ("model", "name"): _model,
    ("model", "tokenizer"): _model,
    ("model", "tokenizer", "train"): _tokenizer_data,
    ("model", "add_tokens", "file"): _path,
    ("data", "train"): _data,
    ("data", "validation"): _data,
    ("data", "validation", "*"): _data,
    ("data", "test"): _data,
    ("objective", "teacher"): _model,
    ("output",): _path,
}
