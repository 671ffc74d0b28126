"""Load a saved model the way its users will, and say what it holds and answers.

    python -P reload.py REQUEST

reads REQUEST/request.json and rows.safetensors and writes REQUEST/facts.json and answers.safetensors.
Nothing of ftkit is imported here: what loads in this process loads with the named library alone.
`verify.py` calls the same functions on the model in memory, so that both sides compute alike.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

POSITIONS = 16  # of a row's outputs are compared, the last ones: in a language model they depend on all before

Row = Mapping[str, torch.Tensor]  # keyword arguments of the model's forward: int64 [L]


def load(directory: Path, artifact: Mapping[str, Any], device: str) -> Any:
    """The model in `directory`, with exactly what `artifact` (of a run's manifest) says."""
    if artifact["loads_with"] == "transformers":
        return _from_pretrained(str(directory), artifact, None, device).eval()
    if artifact["loads_with"] == "ftkit":
        from ftkit import adapters

        return adapters.load(directory, device)
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(directory, artifact, device), directory).eval()


def load_companion(directory: Path, artifact: Mapping[str, Any], device: str) -> Any:
    """The model that learned beside the one in `directory`, if there is one that a library loads; else None."""
    companion = artifact.get("companion")
    return companion and _from_pretrained(str(directory / companion["directory"]), companion, None, device)


def load_base(directory: Path, artifact: Mapping[str, Any], device: str) -> Any:
    """The model that the adapter in `directory` belongs on."""
    return _from_pretrained(base_name(directory, artifact), artifact, artifact.get("revision"), device)


def base_name(directory: Path, artifact: Mapping[str, Any]) -> str:
    """A hub id or a directory: what the artifact calls the base may be relative to `directory`."""
    beside = directory / artifact["base"]
    return str(beside) if (beside / "config.json").is_file() else artifact["base"]


def load_kwargs(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `from_pretrained`; JSON has turned the integer keys of id2label into text."""
    kwargs = dict(artifact["load_kwargs"])
    if "id2label" in kwargs:
        kwargs["id2label"] = {int(index): label for index, label in kwargs["id2label"].items()}
    return kwargs


def load_tokenizer(directory: Path, artifact: Mapping[str, Any]) -> Any:
    """The tokenizer in `directory`."""
    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=artifact["load_kwargs"].get("trust_remote_code", False))


def _from_pretrained(name: str, artifact: Mapping[str, Any], revision: str | None, device: str) -> Any:
    kwargs = load_kwargs(artifact)
    if "quantization_config" in kwargs:
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(**kwargs["quantization_config"])
        kwargs["device_map"] = {"": device}
    if revision:
        kwargs["revision"] = revision
    model = getattr(transformers, artifact["auto_class"]).from_pretrained(name, use_safetensors=True, **kwargs)
    for module in model.modules():
        # On avx512_bf16 CPUs an eval-mode forward of bitsandbytes <= 0.50 repacks 4-bit weights in place, and what
        # the model answers changes with it (bitsandbytes issue 2078).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model if getattr(model, "is_quantized", False) else model.to(device)


def sparse(model: Any) -> Any:
    """The module of BigBird that goes over to full attention, for good, with the first row that is short; None in other models.

    Not of decoders, whose blocks would see later tokens.
    """
    module = next((module for module in model.modules() if hasattr(module, "set_attention_type")), None)
    return None if module is None or module.config.is_decoder else module


@torch.no_grad()
def answers(model: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Every output of the model for each row by itself (no padding), float32, at the last positions."""
    found = {}
    for number, row in enumerate(rows):
        inputs = {name: values[None].to(model.device) for name, values in row.items()}
        if model.config.is_encoder_decoder and model.can_generate():  # classifiers read the row once more by themselves
            inputs["decoder_input_ids"] = inputs["input_ids"]
        if (module := sparse(model)) is not None:
            module.set_attention_type(module.config.attention_type)  # each row as the first one
        for name, value in model(**inputs).items():
            if isinstance(value, torch.Tensor):
                kept = value[:, -POSITIONS:] if value.dim() == 3 else value
                found[f"row {number}: {name}"] = kept.float().cpu().contiguous()
    return found


def companion_answers(model: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Those of the model beside another; none where there is none."""
    return {} if model is None else {f"companion: {name}": value for name, value in answers(model.eval(), rows).items()}


@torch.no_grad()
def embeddings(model: Any, rows: Sequence[Row], directory: Path) -> dict[str, torch.Tensor]:
    """That of each row by itself, as the files of sentence-transformers beside the model say, float32; none where there are no such files."""
    if not (directory / "modules.json").is_file():
        return {}
    steps = {step["type"].rpartition(".")[2]: directory / step["path"] for step in json.loads((directory / "modules.json").read_text(encoding="utf-8"))}
    pooling = json.loads((steps["Pooling"] / "config.json").read_text(encoding="utf-8"))
    found = {}
    for number, row in enumerate(rows):
        states = model(**{name: values[None].to(model.device) for name, values in row.items()}).last_hidden_state[0].float()
        pooled = states.mean(0) if pooling["pooling_mode_mean_tokens"] else states[0 if pooling["pooling_mode_cls_token"] else -1]
        found[f"row {number}: embedding"] = (torch.nn.functional.normalize(pooled, dim=-1) if "Normalize" in steps else pooled).cpu()
    return found


def digests(model: Any) -> dict[str, str]:
    """sha256 of every tensor by name; not of the heads that PEFT replaced, which compute nothing.

    Where PEFT leaves the base as it is, beside a prompt, names are those of the base.
    """
    found = {name: _sha256(tensor) for name, tensor in model.state_dict().items() if ".original_module." not in name}
    if not getattr(model, "_is_prompt_learning", False):
        return found
    return {name.removeprefix("base_model.").replace(".modules_to_save.default.", "."): digest for name, digest in found.items()}


def _sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def facts(model: Any, tokenizer: Any, texts: Sequence[str], artifact: Mapping[str, Any]) -> dict[str, Any]:
    """What must survive a save beside the weights, JSON-able: labels, and all that the tokenizer does."""
    settings = getattr(model, "generation_config", None) if artifact["loads_with"] != "peft" else None  # PEFT leaves the base's
    return {
        "end tokens": settings and settings.eos_token_id,
        "labels": {str(index): label for index, label in (model.config.id2label or {}).items()},
        "token ids": [tokenizer(text)["input_ids"] for text in texts],
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat template": tokenizer.chat_template,
    }


def main(request: Path) -> None:
    asked = json.loads((request / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])  # another number of threads adds in another order
    torch.set_float32_matmul_precision(asked["float32_matmul_precision"])
    tensors = load_file(request / "rows.safetensors")
    rows = [{name.partition(".")[2]: tensors[name] for name in tensors if name.startswith(f"{i}.")} for i in range(asked["rows"])]
    model = load(Path(asked["directory"]), asked["artifact"], asked["device"])
    tokenizer = load_tokenizer(Path(asked["directory"]), asked["artifact"])
    found = facts(model, tokenizer, asked["texts"], asked["artifact"]) | {"digests": digests(model)}
    companion = load_companion(Path(asked["directory"]), asked["artifact"], asked["device"])
    said = answers(model, rows) | companion_answers(companion, rows) | embeddings(model, rows, Path(asked["directory"]))
    save_file(said, request / "answers.safetensors")
    (request / "facts.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
