"""What an encoder-decoder reads and writes, that its loss is transformers' own, and what it answers."""

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import processors

from ftkit import chunks, model, neftune
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row, RowError
from ftkit.embeddings import choose
from ftkit.errors import DataError, RecipeError
from ftkit.methods.full import Full
from ftkit.methods.modules import layers
from ftkit.methods.partial import Partial, _depths
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Generation, TrainedTokenizer
from ftkit.sources import Source, locate
from ftkit.tasks.seq2seq import EXAMPLES, Seq2Seq
from ftkit.tokenizer import train_tokenizer

TASK = Seq2Seq()
IGNORED = -100
TOKENS = {"pad_token_id": 0, "eos_token_id": 1}
T5 = {"vocab_size": 320, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0, **TOKENS}
BART = {
    "vocab_size": 320,
    "d_model": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "decoder_start_token_id": 1,
    "bos_token_id": 2,
    "forced_eos_token_id": None,
    **{f"{stack}_{size}": value for stack in ("encoder", "decoder") for size, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 64}.items()},
    **TOKENS,
}
CONFIGS = {
    "t5": transformers.T5Config(**T5),
    "t5-untied": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": transformers.MT5Config(**T5),
    "umt5": transformers.UMT5Config(**T5),
    "bart": transformers.BartConfig(**BART),
    "mbart": transformers.MBartConfig(**BART),
    "pegasus": transformers.PegasusConfig(**BART),
    "marian": transformers.MarianConfig(**BART, decoder_vocab_size=320),
}


def model_of(name: str):
    """Random weights of which none is special: an untied head is another one, and BART's bias on logits is not 0."""
    torch.manual_seed(0)
    made = transformers.AutoModelForSeq2SeqLM.from_config(CONFIGS[name])
    if name.endswith("untied"):
        made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.lm_head.weight) / 10)
    if hasattr(made, "final_logits_bias"):
        made.final_logits_bias.normal_()
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TrainedTokenizer(train="data", vocab_size=300), [text for pair in EXAMPLES for text in pair])


@pytest.fixture
def features(tokenizer):
    return FeatureSet.of([TASK.encode(row, tokenizer, Limits(64, "error")) for row in rows()])


def rows() -> list[Row]:
    return [Row({"source": source, "target": target}, "rows", number) for number, (source, target) in enumerate(EXAMPLES[:6], 1)]


def framed(tokenizer):
    """A tokenizer that puts a token before and after every text, as BART's."""
    copied = train_tokenizer(TrainedTokenizer(train="data", vocab_size=300), [text for pair in EXAMPLES for text in pair])
    ends = [("<|im_start|>", copied.convert_tokens_to_ids("<|im_start|>")), ("<|eos|>", copied.eos_token_id)]
    copied.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A <|eos|>", special_tokens=ends)
    return copied


# Rows


def test_a_target_ends_once(tokenizer):
    (plain,) = TASK.encode(rows()[0], tokenizer, Limits(64, "error"))
    assert plain.input_ids == tokenizer(EXAMPLES[0][0])["input_ids"]
    assert plain.targets == [*tokenizer(EXAMPLES[0][1])["input_ids"], tokenizer.eos_token_id]
    assert plain.weights == [1.0] * len(plain.targets)
    (as_bart,) = TASK.encode(rows()[0], framed(tokenizer), Limits(64, "error"))
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert as_bart.targets == [start, *plain.targets]
    assert as_bart.input_ids == [start, *plain.input_ids, tokenizer.eos_token_id]


def test_a_long_source_keeps_its_special_tokens_and_a_long_target_its_end(tokenizer):
    tokenizer = framed(tokenizer)
    start, eos = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id
    source, target = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in EXAMPLES[0])
    for side, kept in (("right", source[:4]), ("left", source[-4:])):
        (cut,) = Seq2Seq(max_target_length=5).encode(rows()[0], tokenizer, Limits(6, side))
        assert cut.input_ids == [start, *kept, eos]
        assert cut.targets == [start, *target[:3], eos]
        assert cut.truncated == len(source) - 4 + len(target) - 3
    assert tokenizer.truncation_side == "right"


@pytest.mark.parametrize(("task", "limit", "told"), [(TASK, 6, "data.max_length: 6"), (Seq2Seq(max_target_length=5), 64, "task.max_target_length: 5")])
def test_long_rows_are_dropped_or_refused(task, limit, told, tokenizer):
    assert task.encode(rows()[0], tokenizer, Limits(limit, "drop")) == []
    with pytest.raises(RowError, match=told):
        task.encode(rows()[0], tokenizer, Limits(limit, "error"))


def test_a_prefix_is_read_before_every_source(tokenizer):
    (features,) = Seq2Seq(prefix="tell: ").encode(rows()[0], tokenizer, Limits(64, "error"))
    assert features.input_ids == tokenizer(f"tell: {EXAMPLES[0][0]}")["input_ids"]


def test_tokenizers_without_an_end_or_with_languages_are_refused(tokenizer, tokenizers):
    TASK.check(tokenizer)
    with pytest.raises(RecipeError, match="eos_token"):
        TASK.check(tokenizers["wordpiece"])
    languages = framed(tokenizer)
    languages.tgt_lang = None
    with pytest.raises(RecipeError, match="language"):
        TASK.check(languages)


# Batches


def test_targets_are_padded_by_themselves(features):
    batch = collate(features, np.arange(len(features)), 0)
    sources, targets = (np.array([len(features.get(i)[name]) for i in range(len(features))]) for name in ("input_ids", "targets"))
    assert batch.input_ids.shape == (6, sources.max())
    assert batch.targets.shape == batch.weights.shape == (6, targets.max())
    assert batch.weights.sum(1).tolist() == targets.tolist()
    assert (batch.targets[batch.weights == 0] == 0).all()
    assert features.lengths.tolist() == (sources + targets).tolist()
    assert features.apart
    assert not features.per_row


def test_features_of_one_set_are_of_one_kind(tokenizer):
    (pair,) = TASK.encode(rows()[0], tokenizer, Limits(64, "error"))
    pair.apart = False
    with pytest.raises(AssertionError, match="in all features"):
        FeatureSet.of([TASK.encode(rows()[1], tokenizer, Limits(64, "error")), [pair]])


# The forward pass


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_transformers_own(name, features, monkeypatch):
    made, batch = model_of(name).train(), collate(features, np.arange(len(features)), 0)
    monkeypatch.setattr(chunks, "chunk_size", lambda items, learning=(): 7)
    ours = chunks.loss(TASK.items(made, batch), Supervised(), list(made.parameters())) / batch.weights.sum()
    ours.backward()
    learning = {key: parameter for key, parameter in made.named_parameters() if parameter.requires_grad}  # Marian's positions do not
    gradients = {key: parameter.grad.clone() for key, parameter in learning.items()}
    made.zero_grad()
    labels = batch.targets.masked_fill(batch.weights == 0, IGNORED)
    theirs = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    theirs.backward()
    assert abs(ours.item() - theirs.item()) <= 1e-6 * theirs.item()
    largest = max(parameter.grad.abs().max() for parameter in learning.values())
    for key, parameter in learning.items():
        assert (parameter.grad - gradients[key]).abs().max() <= 1e-6 * largest, key


def test_the_head_sees_the_tokens_of_targets_only(features):
    made, batch = model_of("t5"), collate(features, np.arange(len(features)), 0)
    TASK.items(made, batch)  # the first time, the task tries its way with one token
    seen = []
    made.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    items = TASK.items(made, batch)
    assert seen == []
    items.scores()
    assert seen == [(1, int(batch.weights.sum()), 320)]


@pytest.mark.parametrize(("name", "targets"), [("t5", ["q", "wo"]), ("bart", ["q_proj", "lm_head"])])
def test_scores_through_peft(name, targets, features):
    made = get_peft_model(model_of(name), LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM", init_lora_weights=False))
    batch = collate(features, np.arange(len(features)), 0)
    logits = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets).logits
    assert (TASK.items(made, batch).scores().logits - logits[batch.weights > 0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_process_without_rows_gives_zero_gradients_to_every_parameter(name, features):
    made, batch = model_of(name), collate(features, np.array([], np.int64), 0)
    chunks.loss(TASK.items(made, batch), Supervised(), list(made.parameters())).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in made.parameters())


def test_a_model_that_changes_states_between_its_stacks_is_refused(features):
    class Projecting(transformers.T5ForConditionalGeneration):
        def forward(self, encoder_outputs=None, decoder_input_ids=None, input_ids=None, use_cache=None):
            states = self.encoder(input_ids=input_ids).last_hidden_state * 2
            return self.decoder(input_ids=decoder_input_ids, encoder_hidden_states=states)

    with pytest.raises(RecipeError, match="Projecting does not hand the states"):
        TASK.items(Projecting(CONFIGS["t5"]), collate(features, np.arange(2), 0))


def test_a_model_that_reads_more_than_the_states_of_its_decoder_is_refused(features):
    sizes = {key: value for key, value in BART.items() if key not in ("d_model", "attention_dropout", "encoder_layers", "decoder_layers")}
    config = transformers.ProphetNetConfig(**sizes, hidden_size=32, num_encoder_layers=1, num_decoder_layers=1)
    with pytest.raises(RecipeError, match="makes its logits of more than the states of its decoder"):
        TASK.items(transformers.ProphetNetForConditionalGeneration(config), collate(features, np.arange(2), 0))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_half_precision_weights_give_half_precision_logits(name, features):
    batch = collate(features, np.arange(2), 0)
    whole, half = model_of(name), model_of(name).to(torch.bfloat16)
    expected, found = (TASK.items(made, batch).scores().logits for made in (whole, half))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 5e-2 * expected.abs().max()


def test_noise_is_on_what_the_encoder_reads(features):
    made, batch = model_of("t5"), collate(features, np.arange(len(features)), 0)
    plain = TASK.items(made, batch).scores().logits
    noise = neftune.Noise(made.get_encoder().get_input_embeddings(), 5.0)
    with noise.rows(batch):
        assert not torch.equal(TASK.items(made, batch).scores().logits, plain)


def test_all_token_embeddings_learn_in_place(features):
    assert choose(model_of("t5"), features, (0,)) is None
    alone = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=90_000, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False))
    assert choose(alone, features, (0,)) is None  # what a decoder writes it would look up, too


# Models


def base_of(name: str, **overrides) -> model.Base:
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | overrides)
    made = model.skeleton(config, TASK)
    return model.Base(made, None, Source("somewhere"), TASK, model.head_of(made))


def test_where_a_decoder_begins_must_be_known():
    with pytest.raises(RecipeError, match="decoder_start_token_id"):
        base_of("t5", decoder_start_token_id=None)


@pytest.mark.parametrize(("kind", "start", "forced"), [("t5", "pad_token_id", None), ("bart", "eos_token_id", "eos_token_id")])
def test_a_new_vocabulary_keeps_the_roles_of_tokens(kind, start, forced, tokenizer):
    from ftkit.recipe.spec import Model

    config = model.load_config(Model(init="random", config={"model_type": kind}), None, tokenizer)
    assert config.decoder_start_token_id == getattr(tokenizer, start)
    assert getattr(config, "forced_eos_token_id", None) == (forced and getattr(tokenizer, forced))
    given = model.load_config(Model(init="random", config={"model_type": kind, "decoder_start_token_id": 3}), None, tokenizer)
    assert given.decoder_start_token_id == 3


def test_layers_of_an_encoder_come_first():
    assert layers(base_of("t5", num_decoder_layers=3)) == [*(f"encoder.block.{i}" for i in range(2)), *(f"decoder.block.{i}" for i in range(3))]
    assert layers(base_of("bart")) == [f"model.{stack}.layers.{i}" for stack in ("encoder", "decoder") for i in range(2)]


@pytest.mark.parametrize(
    ("name", "above", "below"),
    [
        ("t5", ["decoder.final_layer_norm.weight"], ["shared.weight"]),
        ("pegasus", ["model.decoder.layer_norm.weight"], ["model.shared.weight", "model.decoder.embed_positions.weight"]),
        ("bart", [], ["model.shared.weight", "model.decoder.layernorm_embedding.weight", "model.decoder.embed_positions.weight"]),
    ],
)
def test_each_stack_has_its_own_top_and_bottom(name, above, below):
    depths = _depths(base_of(name))
    norm = {"t5": "encoder.final_layer_norm.weight", "pegasus": "model.encoder.layer_norm.weight"}.get(name)
    assert all(depths[parameter] == 1 for parameter in above)
    assert all(depths[parameter] == 5 for parameter in below)
    assert norm is None or depths[norm] == 3


@pytest.mark.parametrize(("count", "norms"), [(1, 1), (3, 2)])
def test_the_norm_above_learns_with_the_highest_layers_of_a_stack(count, norms):
    base = base_of("t5")
    learning = {name for name, parameter in Partial(last=count).apply(base).named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".layer.")[0] or name for name in learning} == {
        *layers(base)[-count:],
        *["decoder.final_layer_norm.weight", "encoder.final_layer_norm.weight"][:norms],
    }


def test_a_stored_base_without_a_head_gets_it_back(tmp_path, tokenizer):
    """facebook/bart-base is stored so."""
    model_of("bart").model.save_pretrained(tmp_path)
    from ftkit.recipe.spec import Model

    spec = Model(name=str(tmp_path))
    source = locate(spec)
    base = model.load(spec, source, model.load_config(spec, source), tokenizer, TASK, Full(), torch.float32, 0, torch.device("cpu"))
    assert base.new_modules == []


# Answers


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_answers_are_those_of_generate_alone(name, settings, tokenizer):
    made = model_of(name).eval()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20)  # else all tokens are about as likely
    answers = TASK.predict(made, tokenizer, rows(), Limits(64, "right"), Generation(max_new_tokens=6, **settings))
    for row, answer in zip(rows(), answers, strict=True):
        ids = made.generate(torch.tensor([tokenizer(row.values["source"])["input_ids"]]), max_new_tokens=6, do_sample=False, **settings)[0, 1:].tolist()
        assert answer["finished"] == (tokenizer.eos_token_id in ids)
        assert answer["text"] == tokenizer.decode(ids, skip_special_tokens=True)


class Writing(transformers.T5ForConditionalGeneration):
    """Writes token 7 until it has written `count`, then the end."""

    count = 2

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        places = kwargs["past_key_values"].get_seq_length() - 1
        output.logits = torch.zeros_like(output.logits).index_fill_(2, torch.tensor(7 if places < self.count else 1), 1.0)
        return output


def test_an_answer_says_whether_it_finished(tokenizer):
    made = Writing(CONFIGS["t5"])
    seven = tokenizer.decode([7, 7])
    for tokens, text, finished in ((2, seven, False), (3, seven, True)):
        (answer,) = TASK.predict(made, tokenizer, rows()[:1], Limits(64, "right"), Generation(max_new_tokens=tokens))
        assert answer == {"text": text, "finished": finished}
    made.generation_config.forced_eos_token_id = 1
    (answer,) = TASK.predict(made, tokenizer, rows()[:1], Limits(64, "right"), Generation(max_new_tokens=2))
    assert not answer["finished"]


def test_what_was_not_read_and_could_not_be_written_is_told(tokenizer):
    made = model_of("bart")
    (answer,) = TASK.predict(made, tokenizer, rows()[:1], Limits(5, "right"), Generation(max_new_tokens=100))
    assert answer["truncated"] == len(tokenizer(EXAMPLES[0][0])["input_ids"]) - 5
    assert answer["max_new_tokens"] == 64
    with pytest.raises(DataError, match="rows:1: a source of"):
        TASK.predict(made, tokenizer, rows()[:1], Limits(5, "error"), Generation(max_new_tokens=100))
