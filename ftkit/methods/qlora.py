"""QLoRA (arXiv 2305.14314): LoRA beside a base stored in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from ftkit.errors import MissingDependency
from ftkit.methods.lora import LoRA
from ftkit.recipe.spec import option


class QLoRA(LoRA):
    """LoRA on a base whose linear modules are stored in 4 or 8 bits."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    bits: Literal[4, 8] = option(4, "bits a weight", "QLoRA (arXiv 2305.14314)")
    quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit data type", "QLoRA: NF4 errs less than FP4 on normal weights (arXiv 2305.14314)")
    double_quant: bool = option(True, "quantise the quantisation constants too: 4.127 bits a weight in place of 4.5", "QLoRA (arXiv 2305.14314)")

    @model_validator(mode="after")
    def _float_weights(self) -> QLoRA:
        if self.init != "default":
            raise ValueError(f"init: {self.init} needs float weights; a quantised base takes init: default")
        return self

    def load_kwargs(self, head: list[str], precision: str) -> dict[str, Any]:
        """bitsandbytes' settings; heads and poolers stay in float, since they learn or are tiny."""
        from importlib.util import find_spec

        from ftkit import device

        if find_spec("bitsandbytes") is None:
            raise MissingDependency("method qlora needs bitsandbytes, which is not installed: pip install bitsandbytes")
        skip = [*head, "pooler"]
        if self.bits == 8:
            return {"quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": skip}}
        compute = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32", "fp32": "float32"}[device.precision(precision, device.pick())]
        return {
            "quantization_config": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.quant_type,
                "bnb_4bit_use_double_quant": self.double_quant,
                "bnb_4bit_compute_dtype": compute,
                "llm_int8_skip_modules": skip,
            }
        }
