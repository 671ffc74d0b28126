"""A frozen base whose linear modules are stored in few bits, through bitsandbytes, for every method that leaves them as they are."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from ftkit.errors import MissingDependency
from ftkit.methods import MethodSpec
from ftkit.recipe.spec import option


class Quantisable(MethodSpec):
    """A method that needs no float weights of its base but those that it adds or trains."""

    bits: Literal[4, 8] | None = option(None, "bits a weight of the base's linear modules, which are frozen; as they are stored if empty")
    quant_type: Literal["nf4", "fp4"] | None = option(
        None, "data type of 4 bits, nf4 if empty", "QLoRA: NF4 errs less than FP4 on normal weights (arXiv 2305.14314)"
    )
    double_quant: bool | None = option(
        None, "quantise the constants of 4 bits too: 4.127 bits a weight in place of 4.5; true if empty", "QLoRA (arXiv 2305.14314)"
    )

    @model_validator(mode="after")
    def _of_four_bits(self) -> Self:
        for name, default in {"quant_type": "nf4", "double_quant": True}.items():
            given = getattr(self, name)
            if given is None and self.bits == 4:
                object.__setattr__(self, name, default)
            elif given is not None and self.bits != 4:
                raise ValueError(f"{name} has no effect without bits: 4; leave it out")
        return self

    def needs(self, new_head: bool) -> set[str]:
        return super().needs(new_head) | ({"linear", "few bits"} if self.bits else set())

    def load_kwargs(self, head: list[str], precision: str) -> dict[str, Any]:
        """bitsandbytes' settings; heads and poolers stay in float, since they learn or are tiny."""
        if self.bits is None:
            return super().load_kwargs(head, precision)
        return {"quantization_config": settings(self.bits, precision, [*head, "pooler"], self.quant_type, self.double_quant)}


def check_installed(bits: int) -> None:
    """Refuse `bits` where bitsandbytes is not installed."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise MissingDependency(f"{bits} bits need bitsandbytes, which is not installed: pip install bitsandbytes")


def settings(bits: int, precision: str, skip: list[str] | None, quant_type: str | None = "nf4", double_quant: bool | None = True) -> dict[str, Any]:
    """bitsandbytes' for linear modules in `bits`, but those of `skip`, or the output layers that transformers finds; MissingDependency without it."""
    from ftkit import device

    check_installed(bits)
    if bits == 8:
        return {"load_in_8bit": True, "llm_int8_skip_modules": skip}
    compute = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32", "fp32": "float32"}[device.precision(precision, device.pick())]
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute,
        "llm_int8_skip_modules": skip,
    }
