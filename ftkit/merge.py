"""Merge an adapter into its base, and prove that the merged model answers as the adapter did."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftkit import adapters, device, reload, rundir, verify
from ftkit.errors import DiskError, RecipeError, VerificationFailed
from ftkit.model import forget_loading_steps, load_tokenizer, max_positions, quiet_libraries
from ftkit.recipe.spec import Model
from ftkit.sources import Source, check_whole, hub_errors
from ftkit.tasks import pooling

HEADS = {  # PEFT's task_type -> the Auto class that has the head
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# What merging may change, relative to the largest output.  W + s B A is rounded once a weight where the adapter's
# two products were rounded apart: in float32 that stays below 1e-5 of the outputs, here with a factor of ten;
# float16 and bfloat16 round each weight to 11 and 8 bits, and the roundings of a few dozen layers add up.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
TOLERANCE_8BIT = 5e-2  # an 8-bit layer also rounds its inputs to 127 steps, which the merged one no longer does
BUILT_WITH = ("trust_remote_code", "add_pooling_layer")
WEIGHT_KWARGS = ("dtype", "quantization_config", "ignore_mismatched_sizes", "key_mapping", *BUILT_WITH)  # of from_pretrained that are not the config's
DRAFT = ".draft"  # inside the output, until the merged model is verified
ROWS, LONGEST = 8, 48  # inputs that are compared, and tokens in the longest


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk and how it loads."""

    directory: Path
    artifact: dict[str, Any]  # as in a run's manifest
    base_sha256: str | None  # of the tensors that it was trained on, where that is known
    config: PeftConfig | None  # None: ftkit's own format
    base_config: transformers.PreTrainedConfig

    @property
    def source(self) -> Source:
        return _source(self.directory, self.artifact)

    @property
    def quantization(self) -> dict[str, Any]:
        """bitsandbytes' settings, those of the stored base included; empty for float weights."""
        stored = getattr(self.base_config, "quantization_config", None) or {}
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        return self.artifact["load_kwargs"].get("quantization_config") or stored


def merge(
    target: str | Path,
    output: str | Path,
    base: Literal["stored", "original"] = "stored",
    dtype: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the merged model of a run or PEFT adapter as a plain transformers directory, compared and verified.

    `stored` merges into the weights that the adapter was trained beside (4- and 8-bit ones dequantised), `original`
    into the checkpoint that these were quantised from.  `dtype` is that of the base if empty.

    Raises RecipeError for what cannot be merged or does not belong together, before any weight is loaded where that
    can be seen; VerificationFailed if the merged model answers otherwise.  Neither leaves anything in `output`.
    """
    quiet_libraries()
    output = Path(output)
    check_empty(output)
    adapter = find(Path(target))
    check_mergeable(adapter, base)
    check_fits(adapter)
    written = stored_as(adapter, dtype)
    here = str(device.pick())
    tokenizer, rows = tokenizer_and_rows(adapter)
    merged, facts = merged_alone(adapter, base, written, rows, here, note)
    summary = {
        "output": str(output),
        "adapter": str(adapter.directory),
        "base": adapter.source.name,
        "revision": adapter.source.revision,
        "merged_into": base,
        "dtype": written,
        **facts,
        "rows": len(rows),
    }
    what = f"""The adapter {adapter.directory} merged into {_base_words(adapter)} ({base} weights), in {written}, by ftkit.
On {len(rows)} inputs the merged model and the adapter differ by {facts["max_difference"]:.3g} at most."""
    return summary | {"verification": publish(merged, adapter, tokenizer, rows, written, what, output)}


def stored_as(adapter: Adapter, dtype: str | None) -> str:
    """The type that merged weights are stored in: that of the base, if none is asked for."""
    written = dtype or adapter.artifact["load_kwargs"]["dtype"]
    if written not in TOLERANCE:
        raise RecipeError(f"dtype: {written!r} is none of {', '.join(TOLERANCE)}")
    return written


def tokenizer_and_rows(adapter: Adapter) -> tuple[Any, list[reload.Row]]:
    """The tokenizer, and inputs that are compared."""
    tokenizer = load_tokenizer(Model(name=str(adapter.directory)), _tokenizer_source(adapter), None, [])
    return tokenizer, sample(tokenizer, max_positions(adapter.base_config, tokenizer))


def merged_alone(
    adapter: Adapter, base: str, written: str, rows: Sequence[reload.Row], here: str, note: Callable[[str], None]
) -> tuple[transformers.PreTrainedModel, dict[str, float]]:
    """The merged model in memory, and by how much its answers differ from the adapter's.

    Raises VerificationFailed if that is more than rounding.
    """
    trained = _load_trained(adapter, here)
    as_trained = reload.answers(trained, rows)
    del trained
    device.free_memory()
    model = _with_adapter(adapter, load_float(adapter, base, here)).eval()
    reference = as_trained if base == "stored" else reload.answers(model, rows)
    merged = _merge(model, note) if adapter.config else model
    verify.as_loaded(merged, dtype := getattr(torch, written))
    for buffer in merged.buffers():
        buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data
    if (adapter.directory / "generation_config.json").is_file():  # with the tokens that end a turn as it was learned
        merged.generation_config = transformers.GenerationConfig.from_pretrained(adapter.directory)
    del model
    as_merged = reload.answers(merged, rows)
    difference, tolerance = _compare(adapter, base, written, reference, as_merged)
    note(f"merged and adapter outputs differ by {difference:.3g} at most (tolerance {tolerance:.3g})")
    from_trained, _ = verify.compare(as_trained, as_merged, tolerance)
    if base == "original":
        note(f"outputs differ by {from_trained:.3g} at most from those on the stored base that the adapter was trained on")
    return merged, {"max_difference": difference, "tolerance": tolerance, "difference_to_trained": from_trained}


def publish(
    merged: transformers.PreTrainedModel, adapter: Adapter, tokenizer: Any, rows: Sequence[reload.Row], written: str, what: str, output: Path
) -> dict[str, Any]:
    """Write a merged model and prove that a fresh process loads it; `what` it is, for its card.  Nothing is left where that fails."""
    kwargs = {"dtype": written, **_built_with(adapter.artifact)}
    artifact = {"loads_with": "transformers", "auto_class": adapter.artifact["auto_class"], "load_kwargs": kwargs}
    draft = output / DRAFT
    try:
        shutil.rmtree(draft, ignore_errors=True)
        forget_loading_steps(merged)
        merged.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        pooling.copy_layout(adapter.directory, draft)
        rundir.write_text(draft / "README.md", _card(output.name, what, artifact))
        expected = verify.capture(merged, tokenizer, rows, draft, artifact)
        del merged
        device.free_memory()
        verification = verify.check(draft, artifact, expected)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):  # last, since nothing loads without it
            path.rename(output / path.name)
        draft.rmdir()
    except BaseException as error:
        _clear(output)
        if isinstance(error, OSError):
            raise DiskError(f"cannot write {output}: {error.strerror or error}") from error
        raise
    return verification


def find(target: Path) -> Adapter:
    """The adapter of a run directory, or in a directory of PEFT's."""
    if not target.is_dir():
        raise RecipeError(f"there is no directory {target}")
    inside = target.name == "model" and rundir.is_run(target.parent)
    run = target.parent if inside else target if rundir.is_run(target) else None
    directory = run / "model" if run else target
    check_whole(directory)
    if adapters.is_own(directory):
        artifact = adapters.settings(directory)
        return Adapter(directory, artifact, artifact["base_sha256"], None, _read_base_config(directory, artifact))
    if not (directory / "adapter_config.json").is_file():
        if (directory / "config.json").is_file():
            raise RecipeError(f"{target}: nothing to merge: {'this run saved' if run else 'it holds'} a whole model")
        raise RecipeError(f"{target} holds no adapter: there is no adapter_config.json")
    if not (directory / "adapter_model.safetensors").is_file():
        raise RecipeError(f"{directory} has no adapter_model.safetensors; pickled weights (.bin) are not read: convert them with peft first")
    config = _read_peft_config(directory)
    manifest = rundir.finished(run) if run else {}
    artifact = manifest.get("artifact") or _foreign_artifact(directory, config)
    base_config = _read_base_config(directory, artifact)
    if not run:
        artifact["load_kwargs"] = _foreign_load_kwargs(directory, artifact, base_config)
        base_config = _read_base_config(directory, artifact)
    return Adapter(directory, artifact, manifest.get("verification", {}).get("base_sha256"), config, base_config)


def _read_peft_config(directory: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(directory))
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{directory / 'adapter_config.json'} cannot be read: {error}") from error


def _foreign_artifact(directory: Path, config: PeftConfig) -> dict[str, Any]:
    """How an adapter loads that ftkit did not make, as far as its own config tells."""
    name = config.base_model_name_or_path
    if not name:
        raise RecipeError(f"{directory / 'adapter_config.json'} names no base model (base_model_name_or_path)")
    mapping = config.auto_mapping or {}
    auto_class = HEADS.get(str(getattr(config.task_type, "value", config.task_type)), mapping.get("base_model_class"))
    if auto_class is None or not hasattr(transformers, auto_class):
        raise RecipeError(f"{directory / 'adapter_config.json'} does not tell which head the base has: set its task_type to one of {', '.join(HEADS)}")
    return {"loads_with": "peft", "auto_class": auto_class, "base": name, "revision": config.revision, "load_kwargs": {}}


def _read_base_config(directory: Path, artifact: Mapping[str, Any]) -> transformers.PreTrainedConfig:
    source = _source(directory, artifact)
    name = source.name
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise RecipeError(f"{directory}: its base model {name} is not here, and that is no name on the hub")
    changes = {key: value for key, value in reload.load_kwargs(artifact).items() if key not in WEIGHT_KWARGS}
    with hub_errors(source):
        return transformers.AutoConfig.from_pretrained(source.name, **source.kwargs, **changes)


def _source(directory: Path, artifact: Mapping[str, Any]) -> Source:
    return Source(reload.base_name(directory, artifact), artifact.get("revision"), artifact["load_kwargs"].get("trust_remote_code", False))


def _foreign_load_kwargs(directory: Path, artifact: Mapping[str, Any], base_config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The dtype of the base, and as many labels as the adapter's own head has."""
    kwargs: dict[str, Any] = {"dtype": str(base_config.dtype or torch.float32).removeprefix("torch.")}
    stored = _stored_shapes(directory)
    for name, tensor in _skeleton(artifact, base_config).state_dict().items():
        saved = stored.get(f"base_model.model.{name}")
        if saved and saved != tuple(tensor.shape) and saved[1:] == tuple(tensor.shape)[1:] and tensor.shape[0] == base_config.num_labels:
            kwargs |= {"num_labels": saved[0], "ignore_mismatched_sizes": True}  # the base may have a head of its own
    return kwargs


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _skeleton(artifact: Mapping[str, Any], config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The base without weights, on the meta device."""
    cls = getattr(transformers, artifact["auto_class"])
    with torch.device("meta"):
        try:
            return cls.from_config(config, **{"trust_remote_code": False} | _built_with(artifact)) if hasattr(cls, "from_config") else cls(config)
        except ValueError as error:
            raise RecipeError(f"{config.model_type} has no head for {artifact['auto_class']}") from error


def _built_with(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """What the model of an artifact is built with, whatever its weights."""
    return {name: value for name, value in artifact["load_kwargs"].items() if name in BUILT_WITH}


def check_empty(output: Path) -> None:
    if output.is_file():
        raise RecipeError(f"-o {output} is a file")
    if output.is_dir() and any(path.name != DRAFT for path in output.iterdir()):  # a merge that was killed may have left one
        raise RecipeError(f"-o {output} is not empty; choose another directory")


def check_mergeable(adapter: Adapter, base: str) -> None:
    if adapter.config is None and not (method := adapters.method_of(adapter.directory)).mergeable:
        raise RecipeError(
            f"{adapter.directory}: method {method.kind} adds to its base and changes none of its weights, so there is nothing to merge; ftkit.load loads both"
        )
    kind = adapter.config and PeftType(adapter.config.peft_type)
    if kind and not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "merge_and_unload"):
        raise RecipeError(
            f"{adapter.directory}: a {kind.value} adapter cannot be merged: it adds inputs or modules and changes no weights; load it with peft beside its base"
        )
    method = adapter.quantization.get("quant_method", "bitsandbytes")
    if getattr(method, "value", method) != "bitsandbytes":
        raise RecipeError(f"{adapter.source.name} is stored quantised with {method}, which cannot be turned back into float weights here")
    if base == "original" and adapter.quantization and "quantization_config" not in adapter.artifact["load_kwargs"]:
        raise RecipeError(f"{adapter.source.name} is stored quantised, and does not tell what it was made from; only base: stored can be merged")


def check_fits(adapter: Adapter) -> None:
    """Refuse an adapter whose tensors are not those that its config puts into this base."""
    skeleton = _skeleton(adapter.artifact, adapter.base_config)
    if adapter.config is None:
        adapters.put_on(skeleton, adapter.directory, adapters.weights(adapter.directory))
        return
    places = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    config = copy.deepcopy(adapter.config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others would compute on weights that are not there
    unfit = f"{adapter.directory} does not belong to {adapter.source.name}"
    try:
        wrapped = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise RecipeError(f"{unfit}: {error}") from error
    plan = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    places |= {name: tuple(tensor.shape) for name, tensor in (wrapped.state_dict() | plan).items()}
    stored = _stored_shapes(adapter.directory)
    if missing := sorted(plan.keys() - stored.keys()):
        raise RecipeError(f"{unfit}: the adapter lacks {missing[0]}")
    for name, shape in stored.items():
        if shape != places.get(name):
            raise RecipeError(
                f"{unfit}: the adapter has {name} of shape {shape}, the base {f'takes {places[name]}' if name in places else 'has no place for it'}"
            )


def _tokenizer_source(adapter: Adapter) -> Source:
    """The adapter's own tokenizer if it has one, else that of the base."""
    return Source(str(adapter.directory)) if (adapter.directory / "tokenizer_config.json").is_file() else adapter.source


def sample(tokenizer: Any, longest: int | None) -> list[reload.Row]:
    """Inputs of 3 to 48 tokens and more, drawn from the vocabulary by a fixed seed, with the tokenizer's own special tokens around."""
    rng = np.random.default_rng(0)
    words = np.array(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    lengths = np.linspace(3, min(LONGEST, (longest or LONGEST) // 2), ROWS).astype(int)
    rows: list[reload.Row] = []
    for length in lengths:
        encoded = tokenizer(tokenizer.decode(rng.choice(words, length)), truncation=longest is not None, max_length=longest)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        rows.append({name: torch.tensor(encoded[name]) for name in names})
    return rows


def _load_trained(adapter: Adapter, here: str) -> Any:
    """Base and adapter as they were trained; refuses a base whose tensors are not those of the training."""
    with hub_errors(adapter.source):
        model = reload.load(adapter.directory, adapter.artifact, here)
    if adapter.config and adapter.base_sha256 and verify.base_sha256(reload.digests(model)) != adapter.base_sha256:  # the other kind looks itself
        raise RecipeError(f"{adapter.source.name} has changed: it is not the base that {adapter.directory} was trained on")
    return model


def _with_adapter(adapter: Adapter, model: Any) -> Any:
    """The base with the adapter put on it."""
    if adapter.config is None:
        return adapters.put_on(model, adapter.directory, adapters.weights(adapter.directory))
    return PeftModel.from_pretrained(model, adapter.directory)


def load_float(adapter: Adapter, base: str, here: str) -> Any:
    """The base in float weights, ready to be merged into."""
    kwargs = dict(adapter.artifact["load_kwargs"])
    if base == "original":
        kwargs.pop("quantization_config", None)
    model = reload.load_base(adapter.directory, adapter.artifact | {"load_kwargs": kwargs}, here)
    if getattr(model, "is_quantized", False):
        # Merging into 4 bits would round the update away: on MiniLM, outputs were off by 0.07 where classes lie 0.2 apart.
        model = model.dequantize()
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        _restore_conv1d(model)
    return model


def _restore_conv1d(model: Any) -> None:
    """Let GPT-2's Conv1D hold their weights [in, out] again: bitsandbytes turned them into linear modules, [out, in]."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, module in plain.named_modules():
        if isinstance(module, Conv1D) and isinstance(linear := model.get_submodule(name), nn.Linear):
            module.weight = nn.Parameter(linear.weight.detach().T.contiguous())
            module.bias = linear.bias
            model.set_submodule(name, module)


def _merge(model: Any, note: Callable[[str], None]) -> Any:
    """The base model with the adapter in its weights."""
    base = model.base_model.model
    source, head = base.get_input_embeddings(), base.get_output_embeddings()
    changed = any(isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper) for layer in (source, head))
    if changed and head is not None and _original(source).weight is _original(head).weight:
        _original(head).weight = nn.Parameter(_original(head).weight.detach().clone())
        base.config.tie_word_embeddings = False
        note("the adapter changed one of two embeddings that share their weights: the merged model stores both")
    try:
        if model.peft_config[model.active_adapter].peft_type == PeftType.LORA:
            return model.merge_and_unload(safe_merge=True)
        model.merge_adapter(safe_merge=True)
    except ValueError as error:
        raise VerificationFailed(f"the adapter cannot be merged: {error}") from error
    # PEFT's own unloading of other kinds knows heads of one matrix only, up to 0.21: RobertaClassificationHead "has no attribute 'weight'"
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save[model.active_adapter])
        elif isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    del base.peft_config
    return base


def _original(layer: Any) -> Any:
    """The layer that PEFT wrapped."""
    if isinstance(layer, ModulesToSaveWrapper):
        return layer.original_module
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _compare(adapter: Adapter, base: str, written: str, reference: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Largest difference and tolerance; raises VerificationFailed if merged and adapter outputs differ by more."""
    loaded = adapter.artifact["load_kwargs"]["dtype"]
    relative = max(TOLERANCE[loaded], TOLERANCE[written])
    if base == "stored" and adapter.quantization.get("load_in_4bit"):
        compute = str(adapter.quantization.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
        relative = max(relative, TOLERANCE[compute])
    elif base == "stored" and adapter.quantization:
        relative = max(relative, TOLERANCE_8BIT)
    limit = relative * verify.scale(reference)
    largest, problems = verify.compare(reference, merged, limit)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise VerificationFailed(f"the merged model does not answer as {adapter.directory} does; nothing was written:\n{lines}")
    return largest, limit


def _base_words(adapter: Adapter) -> str:
    return f"{adapter.source.name}{'@' + adapter.source.revision if adapter.source.revision else ''}"


def _card(name: str, what: str, artifact: Mapping[str, Any]) -> str:
    auto, dtype = artifact["auto_class"], artifact["load_kwargs"]["dtype"]
    return f"""# {name}

{what}

```python
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained(DIRECTORY, dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
```
"""


def _clear(output: Path) -> None:
    for path in output.iterdir() if output.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
