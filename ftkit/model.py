"""From what a recipe says of a model to the model and its tokenizer: checking, loading, counting."""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ftkit import big_bird, ends, reformer, students, vocabulary
from ftkit.errors import MissingDependency, RecipeError, first_line
from ftkit.few_bits import as_objects, num_values
from ftkit.methods.modules import added, base_prefix, linear_modules, two_stacks
from ftkit.sources import Source, hub_errors, locate, pinned
from ftkit.tasks.language_model import decoder_inputs

if TYPE_CHECKING:
    from ftkit.methods import Method
    from ftkit.recipe.spec import Model, TrainedTokenizer
    from ftkit.tasks import Task

# Families whose positions start after the padding token: two of max_position_embeddings cannot be used.
OFFSET_POSITIONS = {"camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
DECODER_TOKENS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # that T5's class of configs does not know of itself
# Families that give states the type of the weights they meet, bytes in few bits, and do not keep these in float32 as T5 does (transformers 5.23).
TURNS_STATES_INTO_BYTES = {"longt5"}
MAX_TOKENIZER_LENGTH = 1_000_000  # transformers says "no limit" with 1e30


@dataclass
class Base:
    """A loaded model before any method touched it, and what a method must know about it."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    source: Source | None  # None: random weights that exist nowhere on disk
    task: Task
    head: list[str]  # names of the modules above the base model, outermost first
    new: set[str] = field(default_factory=set)  # names of parameters that no checkpoint gave a value
    load_kwargs: dict[str, Any] = field(default_factory=dict)  # JSON-able: what the method added to from_pretrained
    initial: dict[str, torch.Tensor] = field(default_factory=dict)  # what a method's save needs of the state that its apply made
    added: list[int] = field(default_factory=list)  # tokens that the stored weights do not know
    cut: bool = False  # a part of the stored weights

    @property
    def stored(self) -> bool:
        """Whether these weights lie somewhere as they are: not random ones, not those with an adapter merged, tokens added, or layers left out."""
        return self.source is not None and self.source.adapter is None and not self.added and not self.cut

    @property
    def new_modules(self) -> list[str]:
        """The modules that must always learn and always be saved: new heads, and whatever else started random."""
        if self.source is None:  # everything is random; only what the task calls new is a head
            return list(self.head) if self.task.new_head else []
        owners = {name.rpartition(".")[0] for name in self.new}
        heads = self.head if self.task.new_head else []
        return [*heads, *sorted(owner for owner in owners if not any(owner == h or owner.startswith(f"{h}.") for h in heads))]

    def freeze(self) -> transformers.PreTrainedModel:
        """The model, of which nothing learns but what starts random."""
        self.model.requires_grad_(False)
        for name in self.new_modules:
            self.model.get_submodule(name).requires_grad_(True)
        return self.model

    def inner(self) -> nn.Module:
        """The base model below the head; the model itself where that keeps its layers beside the head, as T5 does."""
        return self.model.base_model

    def below_head(self) -> Iterator[nn.Parameter]:
        """The parameters of the base model; among them is the head's where the two share it."""
        heads, prefix = tuple(f"{name}." for name in self.head), base_prefix(self.model)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name.startswith(prefix) and not name.startswith(heads):
                yield parameter


def quiet_libraries() -> None:
    """Let the libraries' own bars and hints be silent: ftkit says what matters, once."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns after every fork
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft 0.21 on transformers 5.23
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)  # accelerate 1.15 on torch 2.13
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def load_config(model: Model, source: Source | None, tokenizer: Any = None) -> transformers.PreTrainedConfig:
    """The model's config with the recipe's overrides; an unknown override is refused with the nearest known key.

    A tokenizer trained for this run decides the vocabulary size and the special tokens.
    """
    overrides = dict(model.config)
    if source is None:
        kind = overrides.pop("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise RecipeError(f"model.config.model_type: unknown {kind!r}{_nearest(kind, list(transformers.CONFIG_MAPPING))}")
        config = transformers.CONFIG_MAPPING[kind]()
    else:
        with hub_errors(source):
            config = _adapter(source).base_config if source.adapter else transformers.AutoConfig.from_pretrained(source.name, **source.kwargs)
    with _config_errors():
        for key, value in overrides.items():
            if key not in config.to_dict() and key not in config.attribute_map and not (config.is_encoder_decoder and key in DECODER_TOKENS):
                raise RecipeError(f"model.config: {type(config).__name__} has no {key!r}{_nearest(key, list(config.to_dict()))}")
            setattr(config, key, value)
        if source is None:  # made anew, so that what a config derives from other settings (head_dim, key and value heads) follows them
            config = type(config)(**overrides)
    if model.init == "random" and config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # as the stored configs of T5 say, and its class does not
    if model.init == "random" and tokenizer is not None:
        config.vocab_size = max(len(tokenizer), overrides.get("vocab_size", 0))
        adopt_tokens(config, tokenizer, overrides)
    if model.config:
        with _config_errors():  # its own checks speak now, not when the trained model is saved
            config.validate()
    return students.config_of(config, model)


def adopt_tokens(config: transformers.PreTrainedConfig, tokenizer: Any, given: Container[str] = ()) -> None:
    """Let the config name the special tokens of this tokenizer.

    What a decoder begins and ends with are the same of them as before, T5's padding or BART's end of a text, unless the recipe has `given` it.
    """
    roles = ["bos_token_id", "eos_token_id", "pad_token_id", *(["sep_token_id"] if hasattr(config, "sep_token_id") else [])]
    before = {getattr(config, role, None): role for role in roles}
    for role in roles:
        setattr(config, role, getattr(tokenizer, role))
    for key in DECODER_TOKENS if config.is_encoder_decoder else ():
        value = getattr(config, key, None)
        if value is not None and key not in given:
            same = getattr(tokenizer, before[value]) if value in before else None
            setattr(config, key, tokenizer.pad_token_id if same is None and key == "decoder_start_token_id" else same)


def architecture(model: Model, task: Task) -> tuple[Source | None, transformers.PreTrainedConfig]:
    """Where the weights of a recipe are, at the commit that they have now, and their config; refused without a head for the task."""
    source = locate(model)
    config = load_config(model, source)
    model_class(config, task)
    return pinned(source, config), config


@contextmanager
def _config_errors() -> Iterator[None]:
    """Turn what a config says of its settings into our errors."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:
        raise RecipeError(f"model.config: {error.__cause__ or first_line(error)}") from error


def load_tokenizer(model: Model, source: Source | None, train: TrainedTokenizer | None, texts: Iterable[str]) -> Any:
    """The tokenizer of the recipe: trained on `texts`, named, or the model's own; it always has a padding token."""
    if train is not None:
        from ftkit.tokenizer import train_tokenizer

        return train_tokenizer(train, texts, ending=load_config(model, source).is_encoder_decoder)
    if isinstance(model.tokenizer, str):
        source = Source(model.tokenizer, None)
    elif source and source.adapter and (Path(source.adapter) / "tokenizer_config.json").is_file():
        source = Source(source.adapter)
    if source is None:
        raise RecipeError("a model from nothing needs model.tokenizer: a name, or {train: data, vocab_size: 8192}")
    with hub_errors(source):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.name, **source.kwargs)
        except (ValueError, TypeError, KeyError) as error:
            raise RecipeError(f"{source.name} has no tokenizer that can be loaded ({first_line(error)}); name one in model.tokenizer") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise RecipeError(f"{source.name} has no tokenizer files; name a tokenizer in model.tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.add_tokens:
        vocabulary.add(tokenizer, model.add_tokens)
    return tokenizer


def max_positions(config: transformers.PreTrainedConfig, tokenizer: Any = None) -> int | None:
    """Tokens in a row that the model has positions for, or fewer if its tokenizer is made for fewer; None if there is no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < 1:  # XLNet says so that it has no limit
        positions = None
    if positions is not None and config.model_type in OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    if config.model_type == reformer.KIND:
        positions = reformer.max_positions(config)
    if tokenizer is not None and tokenizer.model_max_length < MAX_TOKENIZER_LENGTH:
        positions = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    return positions


def model_class(config: transformers.PreTrainedConfig, task: Task) -> Any:
    """The class with the task's head for this architecture; refused with the heads there are."""
    reformer.check(config, task)
    auto = getattr(transformers, task.auto_class)
    if task.auto_class == "AutoModel" and config.is_encoder_decoder:
        raise RecipeError(f"task {task.kind}: {config.model_type} has two stacks of layers; name an encoder or a decoder alone")
    if type(config) in auto._model_mapping or task.auto_class in (getattr(config, "auto_map", None) or {}):  # its own code has the head
        return auto
    others = [name for name in dir(transformers) if name.startswith("AutoModelFor") and hasattr(getattr(transformers, name), "_model_mapping")]
    heads = [name.removeprefix("AutoModelFor") for name in others if type(config) in getattr(transformers, name)._model_mapping]
    raise RecipeError(
        f"task {task.kind}: {config.model_type} has no head for it ({task.auto_class} does not know {type(config).__name__}); "
        f"it has {', '.join(heads) or 'none'}"
    )


def without_pooler(config: transformers.PreTrainedConfig, task: Task) -> dict[str, Any]:
    """What a model without a head is built with: nothing that is read goes through its pooler, which would never learn and may start random."""
    cls: Any = transformers.AutoModel._model_mapping.get(type(config), None) if task.auto_class == "AutoModel" else None
    return {"add_pooling_layer": False} if cls and "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}


def renamed_stack(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """What `from_pretrained` must be told where a class calls the layers below its head otherwise than checkpoints of the architecture do.

    Up to transformers 5.23, LlamaForQuestionAnswering and those of some other decoders look for `transformer.` in place of `model.`: all would start random.
    """
    ours = model.base_model_prefix
    stored = getattr(transformers.AutoModel._model_mapping.get(type(model.config), None), "base_model_prefix", ours)
    return {} if stored == ours else {"key_mapping": {f"^{stored}.": f"{ours}."}}


def forget_loading_steps(model: Any) -> None:
    """Let `save_pretrained` write weights as they are.

    Up to transformers 5.23 a checkpoint that was stored in few bits keeps bitsandbytes' loading steps, which cannot be
    reversed: saving its model, dequantised or not, raises NotImplementedError.  And what `renamed_stack` told it would
    be reversed, into names that the model itself does not look for.
    """

    def lasts(step: Any) -> bool:
        operations = getattr(step, "operations", [])
        return step.target_patterns != [f"{model.base_model_prefix}."] and not any("bitsandbytes" in type(each).__module__ for each in operations)

    if steps := getattr(model, "_weight_conversions", None):
        model._weight_conversions = list(filter(lasts, steps))


def skeleton(config: transformers.PreTrainedConfig, task: Task, attention: str | None = None, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """The model without weights, on the meta device: names and shapes only.

    Refuses an encoder that would see the very tokens it is to predict, and attention that the architecture has not.
    """
    options = {"attn_implementation": attention} if attention else {}
    try:
        with torch.device("meta"):
            model = model_class(config, task).from_config(config, trust_remote_code=trust_remote_code, **options, **without_pooler(config, task))
    except (ValueError, ImportError) as error:
        if attention is None:
            raise
        raise (MissingDependency if isinstance(error, ImportError) else RecipeError)(f"model.attention: {attention}: {first_line(error)}") from error
    if lack := getattr(task, "lacks", lambda model: None)(model):
        raise RecipeError(f"task {task.kind}: {type(model).__name__} has {lack}")
    if task.auto_class == "AutoModelForCausalLM" and not getattr(model.config, "is_decoder", True) and not _says_causal(model):
        raise _sees_answers(model, task)
    if task.auto_class == "AutoModelForMaskedLM" and config.is_encoder_decoder:
        raise RecipeError(
            f"task {task.kind}: {type(model).__name__} writes text with a decoder and fills no masks in place; name an encoder, or use task: seq2seq"
        )
    if task.auto_class == "AutoModelForSeq2SeqLM" and not _can_begin(model):
        raise RecipeError(
            f"task {task.kind}: the config of {type(model).__name__} does not say which token its decoder begins with; "
            "give it in model.config: {decoder_start_token_id: N}, such as that of padding for T5"
        )
    mend(model)
    return model


def mend(model: Any) -> None:
    """Let architectures do what runs need, where their own code does not."""
    reformer.mend(model)
    big_bird.mend(model)
    ends.mend(model)


def _can_begin(model: transformers.PreTrainedModel) -> bool:
    """Whether the model's own code finds out what its decoder reads first."""
    try:
        decoder_inputs(model, torch.tensor([[2, 1]]))
    except (ValueError, AttributeError, TypeError):  # the token is none, or the config knows no such setting
        return False
    return True


def _says_causal(model: nn.Module) -> bool:
    """Whether each attention says that it hides the tokens after each one; some architectures' do not say."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(said)


def _sees_answers(model: nn.Module, task: Task) -> RecipeError:
    return RecipeError(
        f"task {task.kind}: {type(model).__name__} looks at the tokens after each one, so there is nothing to predict; "
        "set model.config: {is_decoder: true} to hide them, or name a model that was trained to continue text"
    )


def check_causal(model: transformers.PreTrainedModel, task: Task) -> None:
    """Refuse a language model that sees the very tokens it is to predict, by trying where its modules do not say."""
    if task.auto_class != "AutoModelForCausalLM" or _says_causal(model):
        return
    ids = torch.arange(2, 8, device=model.device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():
        one, other = (model(input_ids=each, use_cache=False).logits[:, :-1] for each in (ids, torch.cat((ids[:, :-1], ids[:, :1]), 1)))
    model.train(was_training)
    if (one - other).abs().max() > 1e-2 * one.abs().max():
        raise _sees_answers(model, task)


def head_of(model: transformers.PreTrainedModel) -> list[str]:
    """Names of the modules with parameters above the base model; where there is no base model, beside its two stacks, or of the one that gives logits."""
    children = [(name, module) for name, module in model.named_children() if next(module.parameters(), None) is not None]
    if base_prefix(model):
        return [name for name, _ in children if name != model.base_model_prefix]
    if two_stacks(model):
        below = (model.get_encoder(), model.get_decoder(), model.get_input_embeddings())
        return [name for name, module in children if module not in below]
    return [name for name, module in children if module is model.get_output_embeddings()]


def plan(model: Model, source: Source | None, config: Any, tokenizer: Any, task: Task, method: Method, precision: str = "auto") -> Base:
    """The base without weights, on the meta device, after everything that can be refused before weights are read.

    Completes `config` with what the task and the tokenizer say.
    """
    for key, value in task.config_kwargs().items():
        setattr(config, key, value)
    _pad_alike(config.get_text_config(), tokenizer)
    # growing a model changes its config, of which the stored weights must know nothing
    plain = skeleton(copy.deepcopy(config) if model.add_tokens else config, task, model.attention, model.trust_remote_code)
    head = head_of(plain)
    if not base_prefix(plain) and not head and task.auto_class != "AutoModel":
        raise RecipeError(f"{type(plain).__name__} does not tell its head from its base; it cannot be fine-tuned here")
    added = vocabulary.grow(plain, tokenizer, model.add_tokens) if model.add_tokens else []
    embeddings: Any = plain.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens but the model has embeddings for {embeddings.num_embeddings}: they do not belong together"
        )
    if config.is_encoder_decoder and task.auto_class == "AutoModelForSequenceClassification":
        _check_ends(plain, tokenizer)
    extra = method.load_kwargs(head, precision)
    base = Base(plain, tokenizer, None if model.init == "random" else source, task, head, load_kwargs=extra, added=added, cut=model.cut)
    _check_bits(model, base, method)
    return base


def _check_ends(plain: transformers.PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer whose texts do not end, for a model that reads its answer there, or whose padding looks like ends."""
    end = plain.config.eos_token_id
    told = f"{type(plain).__name__} reads its answer at the end of a text, token {end}"
    if end not in tokenizer("a")["input_ids"]:
        raise RecipeError(f"{told}, which the tokenizer does not end texts with; name another one in model.tokenizer")
    if end == tokenizer.pad_token_id:
        raise RecipeError(f"{told}, and the tokenizer pads with it, too; give it another pad_token, or name another one in model.tokenizer")


def _check_bits(model: Model, base: Base, method: Method) -> None:
    """Refuse few bits where there is nothing to store in them, and methods that cannot work beside a base that is stored so."""
    asked = f"method {method.kind} loads stored weights in few bits"
    stored = getattr(base.model.config, "quantization_config", None)
    if stored and base.source:
        kind = stored["quant_method"] if isinstance(stored, dict) else stored.quant_method
        told = f"method {method.kind}: {model.name} is stored quantised already ({getattr(kind, 'value', kind)})"
        if base.load_kwargs:
            raise RecipeError(f"{told}, which cannot be done twice; leave method.bits out, or use method: lora in place of qlora")
        if "float weights" in method.needs(base.task.new_head):
            raise RecipeError(f"{told}, and its weights can neither learn nor be decomposed; use method: lora, with init: default")
    if not base.load_kwargs:
        return
    if base.source is None:
        raise RecipeError(f"{asked}; with init: random there are none (train them first, then name that run)")
    if base.added:
        raise RecipeError(f"{asked}, where no tokens can be added; train these first (model.add_tokens), then name that run")
    if base.cut:
        raise RecipeError(f"{asked}, where nothing can be left out; train the student first (model.layers, model.convert), then name that run")
    if base.source.adapter:
        raise RecipeError(f"{asked}, and {model.name} holds an adapter: merge it first: ftkit merge-adapter {model.name} -o DIR")
    if base.model.config.model_type in TURNS_STATES_INTO_BYTES:
        raise RecipeError(
            f"{asked}, and the feed-forward layers of {type(base.model).__name__} turn what they compute into the type of these; use method: lora"
        )
    if not linear_modules(base):
        raise RecipeError(f"{asked}, which only linear modules can be, and {type(base.model).__name__} has none; leave method.bits out")


def _pad_alike(config: Any, tokenizer: Any) -> None:
    """Let the model know padding by the token that the tokenizer pads with.

    A decoder under a classification head reads its answer at the last token that is no padding; where the two
    differ, what it says of a row depends on the rows beside it.
    """
    if config.model_type in OFFSET_POSITIONS and config.pad_token_id not in (None, tokenizer.pad_token_id):
        raise RecipeError(
            f"the tokenizer pads with token {tokenizer.pad_token_id}, but {config.model_type} counts positions from its own padding token, "
            f"{config.pad_token_id}: they do not belong together"
        )
    config.pad_token_id = tokenizer.pad_token_id


def load(
    model: Model,
    source: Source | None,
    config: Any,
    tokenizer: Any,
    task: Task,
    method: Method,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    precision: str = "auto",
) -> Base:
    """The base model with the task's head, in `dtype`, without any method applied.

    New parameters are drawn from `seed`.  Weights are read from safetensors only.
    """
    stored_padding = config.get_text_config().pad_token_id
    planned = plan(model, source, config, tokenizer, task, method, precision)
    cls, head, extra = model_class(config, task), planned.head, planned.load_kwargs
    options = without_pooler(config, task) | ({"attn_implementation": model.attention} if model.attention else {})
    torch.manual_seed(seed)
    if model.init == "random":
        built = cls.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code, **options)
        _let_padding_learn(built, tokenizer)
        mend(built)
        return Base(built, tokenizer, None, task, head)
    assert source is not None
    if model.cut:
        plain = model.model_copy(update={"layers": None, "convert": None})
        whole = load(plain, source, load_config(plain, source, tokenizer), tokenizer, task, method, dtype, seed, device, precision)
        return _part(model, whole, planned, cls.from_config(planned.model.config, dtype=dtype, trust_remote_code=model.trust_remote_code, **options))
    placement = {"device_map": {"": device}} if extra else {}
    extra = extra | renamed_stack(planned.model)
    with hub_errors(source):
        start = {"state_dict": _merged_weights(source, device)} if source.adapter else source.kwargs
        maker: Any = type(planned.model) if source.adapter else cls  # Auto classes want a name
        loaded, info = maker.from_pretrained(
            None if source.adapter else source.name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=task.new_head,
            output_loading_info=True,
            **start,
            **options,
            **placement,
            **as_objects(extra),
        )
    if source.adapter:
        loaded.name_or_path = loaded.config._name_or_path = ""  # nowhere else are these weights: an adapter on them must not name another base
    missing = set(info["missing_keys"])
    resized = {entry[0] for entry in info["mismatched_keys"]}
    if wrong := sorted(name for name in resized if not any(name.startswith(f"{h}.") for h in head)):
        raise RecipeError(f"{source.name}: the config gives {', '.join(wrong)} another shape than the stored weights have")
    stored_base = [name for name in loaded.state_dict() if name.startswith(base_prefix(loaded)) and name not in missing]
    if not stored_base:
        raise RecipeError(f"{source.name} holds no weights of {type(loaded).__name__}: every parameter of the base would be random")
    if resized:  # a head for other labels is stored there: whoever loads this base must leave it out, too
        extra = extra | {"ignore_mismatched_sizes": True}
    if config.get_text_config() is config and stored_padding != config.pad_token_id:
        extra = extra | {"pad_token_id": config.pad_token_id}
    _let_padding_learn(loaded, tokenizer)
    if loaded.can_generate():
        _mend(loaded.generation_config)
    if model.add_tokens:
        before = load_tokenizer(model.model_copy(update={"add_tokens": None}), source, None, ())
        vocabulary.grow(loaded, tokenizer, model.add_tokens)
        vocabulary.initialise(loaded, tokenizer, before, model.add_tokens, seed)
        loaded.name_or_path = loaded.config._name_or_path = ""
    mend(loaded)
    base = Base(loaded, tokenizer, source, task, head, missing | resized, extra, added=planned.added)
    if method.frozen_base:
        _check_new_head(base, method)
    return base


def _part(model: Model, whole: Base, planned: Base, student: transformers.PreTrainedModel) -> Base:
    """The part of a loaded model that was planned, as this student, which is random so far."""
    names = students.take(student, whole.model, model)
    if student.can_generate():
        student.generation_config = whole.model.generation_config
    student.name_or_path = student.config._name_or_path = ""  # nowhere else are these weights
    _let_padding_learn(student, whole.tokenizer)
    mend(student)
    random = {names[name] for name in whole.new if name in names} | (student.state_dict().keys() - set(names.values()))
    return replace(whole, model=student, head=planned.head, new=random, cut=True)


def _check_new_head(base: Base, method: Method) -> None:
    """Refuse to learn a head that the stored weights lack beside frozen embeddings that it shares, as heads that fill masks do."""
    frozen = {id(parameter) for parameter in base.below_head()}
    for name in base.new_modules:
        if name.partition(".")[0] in base.head and any(id(parameter) in frozen for parameter in base.model.get_submodule(name).parameters()):
            raise RecipeError(
                f"task {base.task.kind}: {base.source and base.source.name} has no head for it; the new one shares its weights with the embeddings, "
                f"which method {method.kind} freezes; use method: full, or name weights that have the head"
            )


def check_added(base: Base, method: Method) -> None:
    """Refuse added tokens of which nothing would be learned; after `Method.apply`."""
    embedding: Any = base.model.get_input_embeddings()
    if base.added and not any(parameter.requires_grad for parameter in embedding.parameters()):
        raise RecipeError(
            f"model.add_tokens: method {method.kind} freezes the embeddings, so nothing would be learned of the new tokens; "
            "use method: full, lora, or partial with embeddings: true"
        )


def _adapter(source: Source) -> Any:
    """The adapter that is merged into the weights of a source."""
    from ftkit import merge

    assert source.adapter is not None
    return merge.find(Path(source.adapter))


def _merged_weights(source: Source, device: torch.device) -> dict[str, torch.Tensor]:
    """Those of a source with its adapter, compared with the two side by side."""
    from ftkit import merge

    adapter = _adapter(source)
    merge.check_fits(adapter)
    _, rows = merge.tokenizer_and_rows(adapter)
    merged, _ = merge.merged_alone(adapter, "stored", "float32", rows, str(device), lambda text: None)
    return {name: tensor.cpu() for name, tensor in merged.state_dict().items()}


def _let_padding_learn(model: Any, tokenizer: Any) -> None:
    """A token that pads and also ends texts has an embedding like any other; torch gives that of `padding_idx` no gradient."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        model.get_input_embeddings().padding_idx = None


def _mend(generation: transformers.GenerationConfig) -> None:
    """Drop sampling settings where nothing is sampled: transformers ignores them in use, and refuses to save them."""
    if not generation.do_sample:
        plain = transformers.GenerationConfig()
        for name in ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if hasattr(generation, name):
                setattr(generation, name, getattr(plain, name))


def parameters_by_group(model: nn.Module, head: list[str]) -> dict[str, dict[str, int]]:
    """Trainable and total parameters of embeddings, layers, head and what a method added, counted once each.

    4-bit tensors are packed, two values a byte: they count as the values they hold.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps the head it replaced; it computes nothing
            continue
        if added(name):
            group = "adapter"
        elif id(parameter) in embeddings:
            group = "embeddings"
        elif any(f".{part}." in f".{name}" for part in head):
            group = "head"
        else:
            group = "layers"
        count = num_values(parameter)
        entry = groups.setdefault(group, {"trainable": 0, "total": 0})
        entry["total"] += count
        entry["trainable"] += count if parameter.requires_grad else 0
    return groups


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
