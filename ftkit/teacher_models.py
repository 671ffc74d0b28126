"""Where teachers come from: finished runs, and language models as they are stored, on this disk or on the hub."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import transformers

from ftkit import model, opened, reload, rundir, verify
from ftkit.data import cache
from ftkit.errors import RecipeError
from ftkit.few_bits import as_objects, num_values, steady_quantised
from ftkit.methods import quantised
from ftkit.recipe.spec import Model
from ftkit.sources import Source, check_whole, hub_errors

if TYPE_CHECKING:
    import torch

    from ftkit.objectives.distill import Distill
    from ftkit.recipe.spec import Recipe
    from ftkit.tasks import Task


NO_CODE = "a teacher's is not run: fine-tune it first, with model.trust_remote_code and model.revision, then name that run"


class Run(NamedTuple):
    """A teacher that was trained by ftkit."""

    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return rundir.finished(self.path)

    @property
    def recipe(self) -> Recipe:
        from ftkit.recipe import read

        return read(self.path / "recipe.yaml").recipe

    @property
    def source(self) -> Source:
        """Where the model's base is; the model itself where it needs none."""
        artifact = self.manifest["artifact"]
        name = reload.base_name(self.path / "model", artifact) if artifact.get("base") else str(self.path / "model")
        return Source(name, artifact.get("revision"), artifact["load_kwargs"].get("trust_remote_code", False))

    def check_weights(self) -> None:
        """Raise DiskError where a file of the model, or of its base, is broken."""
        check_whole(self.path / "model")
        Stored(self.source).check_weights()

    def config(self) -> Any:
        """That of the model, without its weights."""
        return Stored(self.source).config()

    def tokenizer(self) -> Any:
        return reload.load_tokenizer(self.path / "model", self.manifest["artifact"])

    def parameters(self, task: Task) -> int:
        return int(self.manifest["parameters"]["total"])

    def key(self) -> str:
        """A hash of the model's files, and of what they stand on."""
        manifest = self.manifest
        return cache.key_of(files=verify.file_digests(self.path / "model"), base=manifest["verification"]["base_sha256"], artifact=manifest["artifact"])

    def open(self, task: Task, bits: int | None, precision: str, device: torch.device) -> Any:
        """The model in eval mode as it was saved, or with linear modules in `bits`."""
        artifact = copy.deepcopy(self.manifest["artifact"])
        if bits:
            artifact["load_kwargs"] |= {"quantization_config": quantised.settings(bits, precision, None)}
        return opened.load(self.path / "model", artifact, device)

    @property
    def few_bits(self) -> bool:
        """Whether it is stored in them, or loaded so."""
        artifact = self.manifest["artifact"]
        return "quantise" in artifact or "quantization_config" in artifact["load_kwargs"] or hasattr(self.config(), "quantization_config")


class Stored(NamedTuple):
    """A teacher that is a language model of transformers."""

    source: Source

    def check_weights(self) -> None:
        """Raise DiskError where a file of a directory is broken."""
        check_whole(Path(self.source.name))

    def config(self) -> Any:
        """That of the model, without its weights."""
        with hub_errors(self.source, NO_CODE):
            return transformers.AutoConfig.from_pretrained(self.source.name, **self.source.kwargs)

    def tokenizer(self) -> Any:
        try:
            return model.load_tokenizer(Model(name=self.source.name), self.source, None, ())
        except RecipeError as error:
            raise RecipeError(f"objective.teacher: {self.source.name} has no tokenizer that could be compared with the student's") from error

    def parameters(self, task: Task) -> int:
        return sum(map(num_values, model.skeleton(self.config(), task).parameters()))

    def key(self) -> str:
        """A hash of the files of a directory; of the hub the commit."""
        files = verify.file_digests(Path(self.source.name)) if self.source.local else None
        return cache.key_of(name=None if files else self.source.name, commit=None if files else self.commit(), files=files)

    def commit(self) -> str | None:
        """Which one of the hub it is; None of a directory."""
        return None if self.source.local else getattr(self.config(), "_commit_hash", None)

    def open(self, task: Task, bits: int | None, precision: str, device: torch.device) -> Any:
        """The model in eval mode, in the dtype that it is stored in, or with linear modules in `bits`."""
        few = as_objects({"quantization_config": quantised.settings(bits, precision, None)}) | {"device_map": {"": device}} if bits else {}
        with hub_errors(self.source, NO_CODE):
            found, info = getattr(transformers, task.auto_class).from_pretrained(
                self.source.name, dtype="auto", use_safetensors=True, output_loading_info=True, **self.source.kwargs, **few
            )
        if missing := sorted(info["missing_keys"]):
            raise RecipeError(f"objective.teacher: {self.source.name} lacks {', '.join(missing)}, which would be random; train it for {task.kind} first")
        steady_quantised(found)
        model.mend(found)
        return (found if bits else found.to(device)).eval()

    @property
    def few_bits(self) -> bool:
        """Whether it is stored in them."""
        return hasattr(self.config(), "quantization_config")


Origin: TypeAlias = Run | Stored


def check_bits(origin: Origin, bits: int) -> None:
    """Refuse few bits for a teacher that has them, or cannot have them."""
    quantised.check_installed(bits)
    reasons = {
        "is in few bits as it is": origin.few_bits,
        "turns what its layers compute into the type of their weights": origin.config().model_type in model.TURNS_STATES_INTO_BYTES,
        "is loaded by ftkit alone, which puts no base into few bits": isinstance(origin, Run) and origin.manifest["artifact"]["loads_with"] == "ftkit",
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise RecipeError(f"objective.teacher_bits: the teacher {reason}; leave it out")


def find(objective: Distill) -> Origin:
    """The teacher that an objective names; RecipeError for what is on this disk and is none."""
    path, told = Path(objective.teacher), f"objective.teacher: {objective.teacher}"
    if rundir.is_run(path):
        if objective.teacher_revision:
            raise RecipeError(f"objective.teacher_revision: {objective.teacher} is a run on this disk, which has none; leave it out")
        return Run(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RecipeError(f"{told} is a directory without manifest.json and config.json, so no teacher; name a finished run of ftkit, or a language model")
        if objective.teacher_revision:
            raise RecipeError(f"objective.teacher_revision: {objective.teacher} is a directory on this disk, which has none; leave it out")
        return Stored(Source(str(path)))
    if path.is_absolute() or path.exists():
        raise RecipeError(f"{told} {'is a file' if path.exists() else 'does not exist'}; name a finished run of ftkit, or a language model")
    return Stored(Source(objective.teacher, objective.teacher_revision))
