"""LoRA (arXiv 2106.09685): low-rank updates beside frozen linear modules, through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from ftkit.methods import Artifact
from ftkit.methods.modules import choose_targets, shortest_endings
from ftkit.recipe.spec import Default, Spec, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class LoRA(Spec):
    """Low-rank updates of linear modules learn, and every new head; the base is frozen."""

    kind: Literal["lora"] = "lora"
    r: int = option(8, "rank of the updates", "LoRA, RoBERTa on GLUE (arXiv 2106.09685 D.1)", ge=1)
    alpha: int = option(16, "scale: updates count alpha / r times", "twice the rank, as in PEFT's examples", ge=1)
    dropout: float = option(0.05, "dropout on the input of the updates", "QLoRA, 33B and up (arXiv 2305.14314 B.2)", ge=0, lt=1)
    targets: str | list[str] = option(
        "all-linear",
        "modules to update: all-linear, attention, a regular expression, or a list of name endings",
        "QLoRA: all linear layers are needed (arXiv 2305.14314)",
    )
    dora: bool = option(False, "learn the magnitude of each weight row apart from its direction (arXiv 2402.09353)")
    rslora: bool = option(False, "scale by alpha / sqrt(r), stable at high rank (arXiv 2312.03732)")
    reuse: bool = option(True, "compute layers below the first one with updates once for each row, not in every epoch again; the result is the same")
    recompute_dropout: bool = option(True, "apply dropout again in the backward pass instead of keeping dropped-out copies; false: PEFT's own modules")
    init: Literal["default", "pissa"] = option(
        "default", "default: updates start at zero; pissa: from the principal components of the weights (arXiv 2404.02948)"
    )

    frozen_base: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(2e-4, "QLoRA, 7B-13B (arXiv 2305.14314 B.2); LoRA on GLUE uses 2e-4 to 5e-4"),
    }

    @model_validator(mode="after")
    def _compatible(self) -> LoRA:
        if self.dora and self.init == "pissa":
            raise ValueError("dora and init: pissa both change how the frozen weight counts; choose one")
        return self

    def load_kwargs(self, head: list[str], precision: str) -> dict[str, Any]:
        return {}

    def apply(self, base: Base) -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        from ftkit.updates import begin_with_entries

        chosen = choose_targets(base, self.targets)
        pissa = self.init == "pissa" and base.model.device.type != "meta"  # which has no weights to decompose
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=shortest_endings(chosen, base.model),
            fan_in_fan_out=isinstance(base.model.get_submodule(chosen[0]), Conv1D),  # GPT-2 keeps weights transposed
            use_dora=self.dora,
            use_rslora=self.rslora,
            init_lora_weights="pissa" if pissa else True,
            modules_to_save=base.new_modules or None,
            task_type=base.task.peft_type,
            revision=base.source.revision if base.source else None,
        )
        model = get_peft_model(base.model, config)
        if self.recompute_dropout:
            begin_with_entries(model)
        if pissa:
            base.initial = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
        return model

    def save(self, model: Any, base: Base, directory: Path) -> Artifact:
        """PEFT's format; PiSSA is converted to a plain LoRA of twice the rank, which needs no SVD to load."""
        if self.init == "pissa":
            _save_converted(model, base, directory)
        else:
            model.save_pretrained(directory, save_embedding_layers=False)
            (directory / "README.md").unlink()  # PEFT's blank form; the run directory has a filled-in card
        return Artifact("peft", {"dtype": str(base.model.dtype).removeprefix("torch."), **base.load_kwargs})


def _save_converted(model: Any, base: Base, directory: Path) -> None:
    """W_residual + s B A = W + s (B A - B0 A0): write [A; A0] and [B, -B0], rank 2 r, against the untouched base."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, initial in base.initial.items():
        key = name.replace(".default.", ".")
        learned, initial = state[key].cpu(), initial.cpu()  # apply ran before the model moved to its device
        state[key] = torch.cat((learned, initial), dim=0) if ".lora_A." in name else torch.cat((learned, -initial), dim=1)
    config = type(model.peft_config["default"])(**model.peft_config["default"].to_dict())
    growth = 2**0.5 if config.use_rslora else 2  # keeps the scale s at twice the rank
    config.r, config.lora_alpha, config.init_lora_weights, config.inference_mode = 2 * config.r, config.lora_alpha * growth, True, True
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(directory)
