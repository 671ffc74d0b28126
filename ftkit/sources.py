"""Where weights and tokenizers come from: found, looked at, and what goes wrong on the way told in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ftkit import rundir
from ftkit.errors import DiskError, FtkitError, HubError, MissingDependency, RecipeError, first_line
from ftkit.exits import DISK_ERRORS

if TYPE_CHECKING:
    import transformers

    from ftkit.recipe.spec import Model

LFS_POINTER = b"version https://git-lfs"


class Source(NamedTuple):
    """Where weights or a tokenizer come from: what `from_pretrained` takes."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None  # directory of one that is merged into these weights first

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    @property
    def local(self) -> bool:
        return Path(self.name).is_dir()


def locate(model: Model) -> Source | None:
    """Where the weights are: a directory, the model of a run directory, or a hub id; None for random ones without a name."""
    if model.name is None:
        return None
    path = Path(model.name)
    if path.is_dir():
        if rundir.is_run(path):
            rundir.finished(path)
            path = path / "model"
        if (path / "adapter_config.json").is_file() or (path / "adapter.json").is_file():
            from ftkit import merge

            adapter = merge.find(path)
            try:
                merge.check_mergeable(adapter, "stored")
            except RecipeError as error:
                base = adapter.source.name
                raise RecipeError(
                    f"model.name: {model.name} holds what cannot become part of its base's weights, so no run can start from it; name its base, {base}"
                ) from error
            return adapter.source._replace(adapter=str(adapter.directory))
        if not (path / "config.json").is_file():
            raise RecipeError(f"model.name: {model.name} is a directory without config.json, so it holds no model")
        return Source(str(path), None, model.trust_remote_code)
    if path.is_absolute() or model.name.startswith((".", "~")) or model.name.count("/") > 1 or path.is_file():
        raise RecipeError(f"model.name: there is no directory {model.name}")
    return Source(model.name, model.revision, model.trust_remote_code)


def pinned(source: Source | None, config: transformers.PreTrainedConfig) -> Source | None:
    """The source at the very commit that the config came from: a branch of the hub may move while a run lasts, and after it."""
    commit = getattr(config, "_commit_hash", None)
    return source._replace(revision=commit) if source and commit else source


def check_whole(directory: Path) -> None:
    """Raise DiskError where a file of weights cannot be read or was cut off, or where Git LFS has left a pointer to it.  Reads the headers alone."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise DiskError(f"{path} only points to weights, for Git LFS; fetch them with `git lfs pull`")
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise DiskError(f"{path} is broken ({error}); copy it here or download it once more") from error


def check_weights(model: Model, source: Source | None) -> None:
    """Raise DiskError where a run would start from weights on this disk that are broken; where only config or tokenizer are read, nothing is asked of them."""
    if source and model.init == "pretrained":
        check_whole(Path(source.name))


class hub_errors:
    """Turn what loading from disk or the hub raises into our errors."""

    def __init__(self, source: Source, code: str = "read it, then set model.trust_remote_code: true and model.revision") -> None:
        self.source, self.code = source, code

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SafetensorError):
            raise DiskError(f"{self.source.name}: a file of its weights is broken ({error}); copy it here or download it once more") from error
        if error is None or isinstance(error, FtkitError) or not isinstance(error, OSError | ValueError | ImportError):
            return
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return  # a full disk is no trouble with the hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        name, chain = self.source.name, []
        link: BaseException | None = error
        while link is not None:
            chain.append(link)
            link = link.__cause__ or link.__context__
        if isinstance(error, ImportError):
            raise MissingDependency(f"{name}: {first_line(error)}") from error
        if "trust_remote_code" in str(error):
            raise RecipeError(f"{name} needs Python code from its repository; {self.code}") from error
        if self.source.local:
            if isinstance(error, json.JSONDecodeError) or "not a valid JSON" in str(error):
                raise RecipeError(f"{name}: a JSON file is broken ({first_line(error)})") from error
            if "safetensors" in str(error):
                raise RecipeError(f"{name} has no safetensors weights; pickled ones (.bin, .pt) are not read: convert them with transformers first") from error
            if isinstance(error, OSError) and error.errno is None:
                raise RecipeError(f"{name}: {first_line(error)}") from error
            return
        if any(isinstance(link, GatedRepoError) for link in chain):
            raise HubError(f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`") from error
        if any(isinstance(link, RevisionNotFoundError) for link in chain):
            raise HubError(f"{name} has no revision {self.source.revision!r} on the hub") from error
        if any(isinstance(link, RepositoryNotFoundError) for link in chain):
            raise HubError(f"{name} is neither a local directory nor a model on the hub (or it is private: `hf auth login`)") from error
        if isinstance(error, OSError):
            if "safetensors" in str(error):
                raise HubError(f"{name} has no safetensors weights on the hub; pickled ones are not read") from error
            raise HubError(f"{name} is no local directory, and the hub cannot be reached or lacks it: {first_line(error)}") from error
