"""The shape of a recipe: every key, its type, its default and where the default comes from.

Nothing here may import torch or transformers: `ftkit check` and `ftkit schema` read this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Spec(BaseModel):
    """A frozen value with named fields; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class Default(NamedTuple):
    """A default that a task or a method brings for a key elsewhere in the recipe."""

    value: Any
    source: str
    width: int | None = None  # of a learning rate: how wide the model was that it was found with; wider ones take lower rates


def option(default: Any, doc: str, source: str | None = None, **constraints: Any) -> Any:
    """A field with its one-line documentation and the source of its default."""
    extra: Any = {"source": source} if source else None
    return Field(default, description=doc, json_schema_extra=extra, **constraints)


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]

SET_NAME = r"^(?!(train|test|base)$)[A-Za-z0-9][A-Za-z0-9_.-]*$"


def _named(name: str) -> str:
    """Refuse names that its files cannot be called by, and those of sets that every run may have."""
    if not re.fullmatch(SET_NAME, name):
        raise ValueError("needs another name: letters, digits, `_`, `.` and `-`, a letter or digit first; train, test and base are taken")
    return name


SetName = Annotated[str, AfterValidator(_named), Field(json_schema_extra={"pattern": SET_NAME})]
Sets = Annotated[dict[SetName, Name], Field(min_length=1, json_schema_extra={"additionalProperties": False})]


UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
SIZE = rf"^\d+(\.\d+)? ?({'|'.join(UNITS)})$"


def _measured(size: str) -> str:
    if not re.fullmatch(SIZE, size):
        raise PydanticCustomError("size_type", "not a size")
    return size


Size = Annotated[str, AfterValidator(_measured), Field(json_schema_extra={"pattern": SIZE})]


def num_bytes(size: str) -> int:
    """`1.5 GB` -> 1500000000."""
    number, unit = size.rstrip("".join(UNITS)), size.lstrip("0123456789. ")
    return int(float(number) * UNITS[unit])


class TrainedTokenizer(Spec):
    """A tokenizer trained on text before the model sees any."""

    train: Name | Names = Field(description="text files to train on; `data` means the rows of data.train")
    kind: Literal["bpe", "wordpiece", "unigram"] = option("bpe", "algorithm", "GPT-2: byte-level BPE never meets an unknown token")
    vocab_size: int = option(8192, "tokens, special ones included", ge=64)


class AddedTokens(Spec):
    """Tokens that a stored model does not know yet."""

    tokens: Names | None = option(None, "the tokens")
    file: Name | None = option(None, "a text file with one a line, such as `ftkit vocab` writes")
    init: Literal["subwords", "mean", "noise"] = option(
        "subwords",
        "what their embeddings begin as: the mean of those of the tokens that stood for them before, the mean of all, or that with noise as wide as all are",
        "IndoBERTweet (arXiv 2109.04607): the best of those it tried",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> AddedTokens:
        if (self.tokens is None) == (self.file is None):
            raise ValueError("say which tokens are added: exactly one of tokens and file")
        return self


class Model(Spec):
    """Which weights the run starts from."""

    name: Name | None = option(None, "hub id, local directory, or run directory")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    tokenizer: Name | TrainedTokenizer | None = option(None, "another tokenizer: name, or {train: FILES, kind, vocab_size}")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of frozen weights; what trains is kept in float32", "mixed precision keeps fp32 master weights (arXiv 1710.03740)"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = option(None, "attention implementation; the model's own choice if empty")
    init: Literal["pretrained", "random"] = option("pretrained", "start from stored weights, or from random ones of the same shape")
    config: dict[str, Any] = option({}, "overrides of the model's config; with init: random it may be the whole config")
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = option(
        None, "keep these layers of a stored model, counted from 0, with its embeddings, pooler and head; all if empty", "DistilBERT (arXiv 1910.01108, 3)"
    )
    convert: Literal["distilbert"] | None = option(None, "make of a stored BERT a DistilBERT, which has no second kind of text and no pooler")
    add_tokens: AddedTokens | None = option(None, "new tokens, which begin as something known, and learn: {tokens, file, init}")
    trust_remote_code: bool = option(False, "run Python code from the model's repository; needs a pinned revision (40 hex digits)")

    @model_validator(mode="after")
    def _complete(self) -> Model:
        if self.name is None and not (self.init == "random" and "model_type" in self.config):
            raise ValueError("give model.name, or init: random with config: {model_type: ...}")
        if self.add_tokens and (self.init == "random" or isinstance(self.tokenizer, TrainedTokenizer)):
            raise ValueError("add_tokens is for a stored model; with init: random the tokenizer can be trained with all tokens that are wanted")
        if self.cut and self.init == "random":
            raise ValueError("layers and convert are for a stored model; with init: random give the config of the student in model.config")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError("layers: one of them is there twice")
        if self.trust_remote_code and not (self.revision and len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef")):
            raise ValueError("trust_remote_code needs revision: a full commit of 40 hex digits, so that the code cannot change later")
        return self

    @property
    def cut(self) -> bool:
        """Whether the model is a part of the stored one."""
        return self.layers is not None or self.convert is not None


class Data(Spec):
    """Which rows are trained on and measured."""

    train: Name | Names = Field(description="csv, tsv, jsonl, json, parquet, txt, a directory, or a hub id org/name[:config][@revision]")
    validation: Name | Annotated[float, Field(gt=0, lt=1)] | Sets | None = option(
        None, "file, fraction of train, or a map of names to files; empty: the hub's own validation split, else none"
    )
    test: Name | None = option(None, "file measured once, after training")
    format: Literal["csv", "tsv", "jsonl", "json", "parquet", "txt", "lines", "conll", "conllu"] | None = option(
        None, "format of the files; by ending if empty. txt: the task says whether a row is a line or a file; lines: always a line"
    )
    columns: dict[str, str] = option({}, "what the task calls a column: what the file calls it; detected if unambiguous")
    max_length: int | None = option(None, "tokens in a row at most; the smaller of the model's positions and the task's default if empty", ge=4)
    truncation: Literal["right", "left", "drop", "error"] = option("right", "what happens to a longer row; always counted and reported")
    limit: int | None = option(None, "use a random sample (by seed) of this many training rows", ge=1)
    on_bad_rows: Literal["error", "skip"] = option("error", "stop at rows that cannot be used, or leave them out and count them")
    streaming: bool = option(False, "keep training rows and their tokens on disk, for sets larger than memory; the run is the same")


class EarlyStopping(Spec):
    """Stop when a validation metric no longer improves; the best checkpoint becomes the model."""

    metric: str = option("loss", "validation metric to watch")
    patience: int = option(3, "evaluations without improvement before the run stops", ge=1)
    min_delta: float = option(0.0, "smallest change that counts as an improvement", ge=0)


class Train(Spec):
    """How the weights learn."""

    epochs: float | None = option(3.0, "passes over the training rows", "BERT: 2-4 (arXiv 1810.04805 A.3)", gt=0)
    steps: int | None = option(None, "optimizer steps, instead of epochs", ge=1)
    batch_size: int | None = option(32, "rows one optimizer step sees, over all processes", "BERT: 16 or 32 (arXiv 1810.04805 A.3)", ge=1)
    batch_tokens: int | None = option(None, "real tokens one optimizer step sees at most, instead of batch_size rows", ge=1)
    accumulate: int = option(1, "parts a batch is computed in on one process, to save memory; the result is the same", ge=1)
    learning_rate: float = option(2e-5, "peak learning rate", "BERT: 2e-5 to 5e-5 (arXiv 1810.04805 A.3)", gt=0)
    schedule: Literal["linear", "cosine", "constant", "wsd"] = option("linear", "learning rate over the run, after warm-up", "BERT (arXiv 1810.04805 A.2)")
    warmup: float = option(
        0.1, "share of the steps (below 1) or number of steps that the learning rate rises", "10 % stabilises fine-tuning (arXiv 2006.04884)", ge=0
    )
    weight_decay: float = option(0.01, "decoupled weight decay, not on biases and norms", "BERT (arXiv 1810.04805 A.2)", ge=0)
    max_grad_norm: float | None = option(1.0, "clip the global gradient norm; null: never", "BERT's optimization.py", gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "sgd"] = option("adamw", "adamw is PyTorch's fused AdamW", "arXiv 1711.05101")
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "auto", "arithmetic of the forward pass; auto: bf16 where the hardware has it; tf32: float32 with products of 10-bit fractions, on newer GPUs"
    )
    layout: Literal["auto", "padded", "bucketed", "flat"] = option(
        "auto", "how rows become batches; flat: real tokens only, no padding; auto: flat where the model can, else bucketed by length"
    )
    neftune: float | None = option(None, "noise on the token embeddings in training: NEFTune's alpha, such as 5 (arXiv 2310.05914); none if empty", gt=0)
    gradient_checkpointing: bool | Size = option(
        False,
        "recompute activations in the backward pass: less memory, about a third slower; 2GB: of as few layers as keeps what they hold below that",
        "arXiv 1604.06174",
    )
    skip_unused_embeddings: bool = option(
        True, "gradients and optimizer state only for the token embeddings that occur in the training rows, where they are few; the result is the same"
    )
    keep_memory: bool = option(True, "on a CPU, memory that a step frees is kept for the next one; false: given back to the system and asked for again")
    round_batches: bool = option(
        True,
        "fill flat batches up to round numbers of tokens in bfloat16 on a CPU, whose kernels are made for each number, and on a GPU, where"
        " they are chosen for each; the result is the same",
    )
    fast_dropout: bool = option(True, "draw dropout from 16 random bits an element on a CPU, its share rounded to 1/65536; false: by torch's own code")
    fast_attention: bool = option(
        True,
        "attention of flat batches in bfloat16 on a CPU by products of bfloat16 matrices, its softmax in float32, and of long rows on a GPU"
        " by cuDNN; false: in float32, and by FlashAttention",
    )
    liger: bool | Literal["auto"] = option("auto", "Liger's kernels on a GPU; auto: where they are installed and made for the architecture", "arXiv 2410.10989")
    compile: bool = option(False, "compile layers with torch.compile: faster steps on GPUs, for a minute or more before the first ones")
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = option("auto", "processes to start here; auto: one a GPU, one on a CPU")
    parallel: Literal["ddp", "fsdp"] = option("ddp", "how several processes share the work; fsdp is experimental and needs GPUs")
    eval_every: int | None = option(None, "steps between evaluations; every epoch if empty", ge=1)
    save_every: int | None = option(None, "steps between checkpoints; every epoch if empty", ge=1)
    keep: int = option(2, "newest checkpoints kept besides the best one: should the last be damaged, there is one before it", ge=1)
    early_stopping: EarlyStopping | None = option(None, "stop early, and keep the best checkpoint")
    log_every: int = option(10, "steps between log lines", ge=1)
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = option([], "also log there")
    seed: int = option(42, "seed of every random choice", ge=0)

    @model_validator(mode="after")
    def _one_of_each(self) -> Train:
        for one, other in (("epochs", "steps"), ("batch_size", "batch_tokens")):
            values = getattr(self, one), getattr(self, other)
            if values == (None, None):
                raise ValueError(f"give train.{one} or train.{other}")
            if None not in values:
                if {one, other} <= self.model_fields_set:
                    raise ValueError(f"give train.{one} or train.{other}, not both")
                default = one if other in self.model_fields_set else other
                object.__setattr__(self, default, None)  # a default that what is given stands in for
        return self


class Generation(Spec):
    """How text is generated."""

    max_new_tokens: int = option(256, "tokens generated at most", ge=1)
    temperature: float = option(0.0, "0 is greedy", ge=0)
    top_p: float = option(1.0, "nucleus sampling (arXiv 1904.09751)", gt=0, le=1)
    num_beams: int = option(1, "beam search", ge=1)
    samples: int = option(0, "rows of the first set whose answers are kept, as the model gives them before training and after", ge=0)


class Eval(Spec):
    """How the model is measured."""

    batch_size: int = option(64, "rows a forward pass", ge=1)
    metrics: list[str] | None = option(
        None, "metrics to report; if empty, all that the task has but those of text that the model writes (bleu, stop_rate, ...), measured after training"
    )
    generation: Generation = option({}, "settings of generated text", validate_default=True)


DEFAULT_KINDS: Mapping[str, Default] = {
    "method": Default("full", "every weight learns, as in BERT (arXiv 1810.04805)"),
    "objective": Default("supervised", "the data holds the answers"),
}

FROM_SCRATCH: Mapping[str, Default] = {  # with model.init: random, over the defaults of task and method
    "train.learning_rate": Default(
        5e-4, "GPT-2 from scratch in huggingface.co/learn/nlp-course/chapter7/6; GPT-3 125M took 6e-4 (arXiv 2005.14165, table 2.1)"
    ),
}


T = TypeVar("T")
M = TypeVar("M")
O = TypeVar("O")


class Recipe(Spec, Generic[T, M, O]):
    """One run: what `ftkit train` does, as a frozen value."""

    model: Model = Field(description="which weights the run starts from")
    task: T = Field(description="what the data means")
    data: Data = Field(description="which rows are trained on and measured")
    method: M = Field(description="which weights learn")
    objective: O = Field(description="what is minimised")
    train: Train = option({}, "how the weights learn", validate_default=True)
    eval: Eval = option({}, "how the model is measured", validate_default=True)
    output: Name = Field(description="run directory; runs/<recipe's file name> if empty")
