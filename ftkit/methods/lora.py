"""LoRA (arXiv 2106.09685): low-rank updates beside frozen linear modules, through PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ftkit.errors import RecipeError
from ftkit.methods import Artifact, MethodSpec
from ftkit.methods.modules import choose_targets, endings, matching, shortest_endings, size_of
from ftkit.methods.tokens import trainable_token_indices
from ftkit.recipe.spec import Default, Name, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class LoRA(MethodSpec):
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
    recompute_dropout: bool = option(
        True, "apply dropout again in the backward pass and the same to layers of one input, instead of keeping dropped-out copies; false: PEFT's own modules"
    )
    init: Literal["default", "pissa", "olora"] = option(
        "default",
        "default: updates start at zero; pissa: from the principal components of the weights (arXiv 2404.02948); "
        "olora: from their QR decomposition (arXiv 2406.01775)",
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = option(None, "layers with updates, counted from 0; all if empty")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = option({}, "other ranks: a name ending or regular expression of modules, and their r")
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = option({}, "other scales: a name ending or regular expression of modules, and their alpha")
    trainable_token_indices: list[Annotated[int, Field(ge=0)] | Name] = option(
        [], "tokens whose embeddings learn too, and only theirs, such as those of tools: as the vocabulary writes them, or their ids"
    )
    lr_ratio: float = option(1.0, "learning rate of the updates' second matrix over that of their first; LoRA+ takes 16 (arXiv 2402.12354)", gt=0)

    frozen_base: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(
            1e-3, "MiniLM on cola and sst2, of 1e-3, 3e-3 and 1e-2 (scripts/methods); a Llama 4096 wide took 2e-4 (arXiv 2305.14314)", width=384
        ),
    }

    @model_validator(mode="after")
    def _compatible(self) -> LoRA:
        if self.dora and self.init != "default":
            raise ValueError(f"dora and init: {self.init} both change how the frozen weight counts; choose one")
        return self

    @property
    def converts(self) -> bool:  # type: ignore[override]
        return self.init != "default"

    def needs(self, new_head: bool) -> set[str]:
        needed = {"float weights": self.init != "default", "untransposed": self.init == "olora", "layers": bool(self.layers)}
        return {"linear", *(trait for trait, is_needed in needed.items() if is_needed)}

    def lr_factor(self, base: Base) -> Callable[[str], float]:
        return lambda name: self.lr_ratio if ".lora_B." in name else 1.0

    def miniature(self, width: int) -> Self:
        ranks = {pattern: min(r, width) for pattern, r in self.rank_pattern.items()}
        tokens = [32 + number for number in range(min(len(self.trainable_token_indices), 8))]  # which every tokenizer has, none of them special
        return self.model_copy(update={"r": min(self.r, width), "rank_pattern": ranks, "trainable_token_indices": tokens})

    def apply(self, base: Base) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        from ftkit.token_rows import compute_apart
        from ftkit.updates import add_in_place

        chosen = choose_targets(base, self.targets, self.layers)
        settings = peft_settings(base, chosen)
        if self.init == "olora" and settings["fan_in_fan_out"]:
            raise RecipeError(f"method.init: olora takes linear modules as they are, and {type(base.model).__name__} keeps them transposed; use init: pissa")
        self._check_ranks(base, chosen)
        decomposed = self.init != "default" and base.model.device.type != "meta"  # which has no weights to decompose
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=shortest_endings(chosen, base.model),
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            use_dora=self.dora,
            use_rslora=self.rslora,
            init_lora_weights=True if self.init == "default" or not decomposed else self.init,
            trainable_token_indices=trainable_token_indices(base, self.trainable_token_indices, base.added),
            **settings,
        )
        model = get_peft_model(base.model, config)
        compute_apart(model)
        if self.recompute_dropout:
            add_in_place(model)
        if decomposed:
            base.initial = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
        return model

    def _check_ranks(self, base: Base, chosen: list[str]) -> None:
        """Refuse patterns that match no module with updates, and ranks that a matrix cannot have.

        That r is more than some narrow module has among many does no harm, unless its weights are decomposed.
        """
        most = {name: min(size_of(base.model.get_submodule(name))) for name in chosen}
        for pattern in self.alpha_pattern:
            self._matched(pattern, chosen, "method.alpha_pattern")
        ranks = dict.fromkeys(chosen, self.r)
        for pattern, r in reversed(self.rank_pattern.items()):  # the first one counts, as for PEFT
            matched = self._matched(pattern, chosen, "method.rank_pattern")
            ranks |= dict.fromkeys(matched, r)
            for name in matched:
                if r > most[name]:
                    raise RecipeError(f"method.rank_pattern: {pattern!r}: a rank of {r} is more than the {most[name]} that {name} can have")
        if self.r > max(most.values()):
            raise RecipeError(f"method.r: {self.r} is more than the modules with updates can have, which is {max(most.values())} at most")
        if self.init != "default" and (narrow := [name for name in chosen if ranks[name] > most[name]]):
            raise RecipeError(f"method.init: {self.init}: {narrow[0]} has no more than {most[narrow[0]]} components; lower method.r, or name other targets")

    def _matched(self, pattern: str, chosen: list[str], field: str) -> list[str]:
        if found := matching(pattern, chosen, field):
            return found
        raise RecipeError(f"{field}: {pattern!r} matches no module with updates; there are {endings(chosen)}")

    def save(self, model: Any, base: Base, directory: Path) -> Artifact:
        """PEFT's format; decomposed weights become a plain LoRA of twice the rank, which needs no decomposition to load."""
        if self.init != "default":
            _save_converted(model, base, directory)
            return _artifact(base)
        return save_adapter(model, base, directory)


def peft_settings(base: Base, chosen: list[str]) -> dict[str, Any]:
    """What every adapter's config of PEFT says of its base and of the modules that it changes."""
    from transformers.pytorch_utils import Conv1D

    transposed = isinstance(base.model.get_submodule(chosen[0]), Conv1D)  # GPT-2 keeps its weights so
    return {"fan_in_fan_out": transposed, **adapter_settings(base)}


def adapter_settings(base: Base) -> dict[str, Any]:
    """What every config of PEFT says of its base."""
    return {
        "modules_to_save": base.new_modules or None,
        "task_type": base.task.peft_type,
        "revision": base.source.revision if base.source and base.stored else None,
    }


def save_adapter(model: Any, base: Base, directory: Path) -> Artifact:
    """What PEFT added to a model, and new heads, in PEFT's format."""
    model.create_or_update_model_card = lambda output_dir: None  # a blank form; the run directory has a filled-in card
    model.save_pretrained(directory, save_embedding_layers=False)
    return _artifact(base)


def _artifact(base: Base) -> Artifact:
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
    config.rank_pattern = {pattern: 2 * r for pattern, r in config.rank_pattern.items()}
    config.alpha_pattern = {pattern: alpha * growth for pattern, alpha in config.alpha_pattern.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(directory)
