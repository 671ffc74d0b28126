"""ftkit fine-tunes any transformer from one YAML recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

__version__ = "0.1.0"


def load(path: str | PathLike[str], device: str = "cpu") -> Any:
    """The model of a run, in eval mode: its directory, or the `model/` within or copied from it.

    A model of transformers with what was learned in place, whatever the method.  Raises `ftkit.errors.RecipeError` for
    what is no run, and for a base that is not the one of the training.
    """
    from ftkit.opened import load_model

    return load_model(path, device)
