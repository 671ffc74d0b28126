"""What is predicted in texts, completions and chats, and that the output head sees nothing else."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row, RowError
from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import Generation, TrainedTokenizer
from ftkit.tasks import chat, language_model
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tokenizer import train_tokenizer

TASK = CausalLM()
SENTENCES = ["The library opens at nine.", "Where do I return a book?", "You can return it at the front desk."] * 5
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma2": transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5),
    "phi3": transformers.Phi3Config(**SIZES, num_key_value_heads=2),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.3),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "gpt2": transformers.GPT2Config(**GPT2, **STILL),
    "gpt-neox": transformers.GPTNeoXConfig(**SIZES),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "bloom": transformers.BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "roberta": transformers.RobertaConfig(**SIZES, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TrainedTokenizer(train="data", vocab_size=310), SENTENCES)


@pytest.fixture(scope="module")
def opening(tokenizer, tmp_path_factory):
    """The same tokenizer as one that begins texts with a token."""
    from tokenizers import processors

    directory = tmp_path_factory.mktemp("opening")
    tokenizer.save_pretrained(directory)
    copy = transformers.AutoTokenizer.from_pretrained(directory)
    copy.add_special_tokens({"bos_token": "<|bos|>"})
    copy._tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", copy.bos_token_id)])
    return copy


def model_of(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)


def row(**values):
    return Row(values, "data.jsonl", 7)


def encode(tokenizer, max_length=64, truncation="right", **values):
    return TASK.encode(row(**values), tokenizer, Limits(max_length, truncation))


def tokens(features):
    """The tokens of a feature, and those that it learns."""
    assert features.targets[:-1] == features.input_ids[1:]
    assert len(features.input_ids) == len(features.targets) == len(features.weights)
    return [*features.input_ids, features.targets[-1]], [t for t, w in zip(features.targets, features.weights, strict=True) if w]


def batch_of(features):
    """Right-padded, as the batcher lays it out; features are numbered from 10."""
    laid_out = collate(FeatureSet.of([[each] for each in features]), np.arange(len(features)), 0)
    return replace(laid_out, row_ids=laid_out.row_ids + 10)


@pytest.fixture(scope="module")
def features(tokenizer):
    pairs = [("Where do I", " return a book?"), ("The library", " opens at nine."), ("You", " can")]
    return [encode(tokenizer, prompt=prompt, completion=completion)[0] for prompt, completion in pairs]


# Rows


def test_text_is_learned_whole_and_ends(tokenizer):
    [features] = encode(tokenizer, text="Where do I return a book?")
    whole, learned = tokens(features)
    assert tokenizer.decode(whole) == "Where do I return a book?<|eos|>"
    assert learned == whole[1:]


def test_text_that_already_ends_is_not_ended_twice(tokenizer):
    [features] = encode(tokenizer, text="Where?<|eos|>")
    assert tokens(features)[0].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize("max_length", [4, 5, 7, 64])
def test_windows_predict_each_token_but_the_first_once(tokenizer, max_length, truncation):
    text = " ".join(SENTENCES[:3])
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    windows = encode(tokenizer, max_length, truncation, text=text)
    assert [t for window in windows for t in tokens(window)[1]] == whole[1:]
    assert all(len(window.input_ids) <= max_length and window.truncated == 0 for window in windows)


def test_long_texts_can_be_dropped_or_refused(tokenizer):
    assert encode(tokenizer, 4, "drop", text=SENTENCES[0]) == []
    with pytest.raises(RowError, match=r"\d+ tokens, more than data.max_length: 4"):
        encode(tokenizer, 4, "error", text=SENTENCES[0])
    assert len(encode(tokenizer, 64, "drop", text=SENTENCES[0])) == len(encode(tokenizer, 64, "error", text=SENTENCES[0])) == 1


def test_text_opens_as_the_tokenizer_opens_it(tokenizer, opening):
    assert tokens(encode(tokenizer, text="nine")[0])[0] == [*tokenizer("nine")["input_ids"], tokenizer.eos_token_id]
    for text in ("nine", "<|bos|>nine"):
        whole, _ = tokens(encode(opening, text=text)[0])
        assert whole == [*opening("nine")["input_ids"], opening.eos_token_id]
        assert whole.count(opening.bos_token_id) == 1
    windows = encode(opening, 4, text=SENTENCES[0])
    assert [window.input_ids.count(opening.bos_token_id) for window in windows] == [1] + [0] * (len(windows) - 1)


def test_completions_are_learned_and_prompts_are_not(opening):
    [features] = encode(opening, prompt="at nine", completion=" at nine")
    whole, learned = tokens(features)
    assert opening.decode(whole) == "<|bos|>at nine at nine<|eos|>"
    assert opening.decode(learned) == " at nine<|eos|>"


def test_a_prompt_is_tokenised_as_generation_sees_it(tokenizer):
    """`"at n" + "ine"` is not the tokens of `at nine`: generation starts from those of `at n`."""
    [features] = encode(tokenizer, prompt="at n", completion="ine")
    prompt = tokenizer("at n")["input_ids"]
    assert features.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(tokens(features)[1]) == "ine<|eos|>"


@pytest.mark.parametrize(
    ("values", "reason"), [({"prompt": "", "completion": "x"}, "prompt is empty"), ({"prompt": "x", "completion": ""}, "completion is empty")]
)
def test_empty_parts(tokenizer, values, reason):
    with pytest.raises(RowError, match=reason):
        encode(tokenizer, **values)


def test_long_completions_are_cut_where_truncation_says(opening):
    prompt, completion = "Where do I return a book? ", "You can return it at the front desk."
    whole, learned = tokens(encode(opening, prompt=prompt, completion=completion)[0])
    limit = len(learned) + 2
    excess = len(whole) - 1 - limit
    [right] = encode(opening, limit, "right", prompt=prompt, completion=completion)
    [left] = encode(opening, limit, "left", prompt=prompt, completion=completion)
    assert tokens(right)[0] == whole[:-excess]
    assert tokens(left)[0] == [opening.bos_token_id, *whole[1 + excess :]]
    assert tokens(left)[1] == learned
    assert right.truncated == left.truncated == excess
    assert len(right.input_ids) == len(left.input_ids) == limit


def test_a_row_whose_answer_is_cut_away_has_no_weight(tokenizer):
    [features] = encode(tokenizer, 4, "right", prompt=SENTENCES[0], completion="x")
    assert sum(features.weights) == 0
    assert features.truncated > 0


TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where do I return a book?"},
    {"role": "assistant", "content": "At the front desk."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "At nine."},
]


def test_chats_learn_their_answers(tokenizer):
    [features] = encode(tokenizer, 256, messages=TWO_TURNS)
    whole, learned = tokens(features)
    assert tokenizer.decode(learned) == "At the front desk.<|im_end|>At nine.<|im_end|>"
    assert whole[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (features.truncated, features.untrained_answers) == (0, 0)


def test_left_truncation_drops_the_oldest_exchange(tokenizer):
    full = tokens(encode(tokenizer, 256, messages=TWO_TURNS)[0])[0]
    expected = tokens(encode(tokenizer, 256, messages=[TWO_TURNS[0], *TWO_TURNS[3:]])[0])[0]
    [features] = encode(tokenizer, len(full) - 2, "left", messages=TWO_TURNS)
    assert tokens(features)[0] == expected
    assert features.truncated == len(full) - len(expected)
    [features] = encode(tokenizer, len(expected) - 4, "left", messages=TWO_TURNS)
    assert tokens(features)[0] == expected[3:]
    assert features.truncated == len(full) - len(expected) + 3


def test_a_tokenizer_is_asked_once_what_it_does_to_every_row(tokenizer, monkeypatch):
    """With 6,000 added tokens, as Gemma 3 has, listing the special ones takes longer than all the rest of a row."""
    calls, special_tokens = [], chat.special_tokens
    monkeypatch.setattr(chat, "special_tokens", lambda tokenizer: calls.append(tokenizer) or special_tokens(tokenizer))
    task = CausalLM()
    for values in ({"messages": TWO_TURNS}, {"messages": TWO_TURNS[1:]}, {"text": "nine"}):
        task.encode(row(**values), tokenizer, Limits(256, "right"))
    assert calls == [tokenizer]
    assert task == CausalLM()


def test_tokenizers_that_cannot_end_a_text(tokenizer):
    bert = train_tokenizer(TrainedTokenizer(train="data", kind="wordpiece", vocab_size=64), SENTENCES)
    with pytest.raises(RecipeError, match=r"no end-of-text token \(eos_token\)"):
        TASK.check(bert)
    with pytest.raises(RecipeError, match="no chat template"):
        encode(bert, messages=TWO_TURNS)
    TASK.check(tokenizer)


# The forward pass


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_models_own_logits_at_the_supervised_positions(name, features):
    model, batch = model_of(name).train(), batch_of(features)
    index = batch.weights.flatten().nonzero().squeeze(1)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.flatten(0, 1)[index]
    targets = batch.targets.flatten()[index]
    F.cross_entropy(logits, targets, reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    TASK.items(model, batch)  # the first time, the head is tried with one position
    seen = []
    probe = model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    scores = TASK.items(model, batch).scores()
    probe.remove()
    F.cross_entropy(scores.logits, scores.targets, reduction="sum").backward()
    assert seen == [(1, len(index), 320)]
    assert (scores.logits - logits).abs().max() < 1e-6
    assert torch.equal(scores.targets, targets)
    assert torch.equal(scores.rows, torch.cat([torch.full((int(sum(f.weights)),), 10 + i) for i, f in enumerate(features)]))
    for key, parameter in model.named_parameters():
        assert (parameter.grad - expected[key]).abs().max() <= 1e-6 * max(1, expected[key].abs().max())
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_scores_through_peft(targets, features):
    model = get_peft_model(model_of("llama"), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False))
    batch = batch_of(features)
    scores = TASK.items(model, batch).scores()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    assert (scores.logits - logits[batch.weights > 0]).abs().max() < 1e-6


def test_a_model_that_does_not_call_its_head_gives_all_logits_to_choose_from(features):
    class Bare(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    torch.manual_seed(0)
    bare, batch = Bare(CONFIGS["llama"]), batch_of(features)
    assert (TASK.items(bare, batch).scores().logits - TASK.items(model_of("llama"), batch).scores().logits).abs().max() < 1e-6


def test_the_hook_goes_even_if_the_forward_pass_fails(features):
    model, batch = model_of("llama"), batch_of(features)
    batch.input_ids += 1000
    with pytest.raises(IndexError):
        TASK.items(model, batch).scores()
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_batch_without_supervision_gives_zero_gradients_to_every_parameter(name, features):
    model, batch = model_of(name), batch_of([replace(each, weights=[0.0] * len(each.weights)) for each in features])
    scores = TASK.items(model, batch).scores()
    assert scores.logits.shape == (0, 320)
    scores.logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# Metrics


def test_metrics_are_weighted_by_tokens(features):
    model = model_of("llama").eval()
    metrics = TASK.metrics([], None)
    with torch.inference_mode():
        for part in (features[:1], features[1:]):
            metrics.update(TASK.items(model, batch_of(part)).scores())
        whole = TASK.items(model, batch_of(features)).scores()
    loss = F.cross_entropy(whole.logits, whole.targets).item()
    found = metrics.compute()
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx((whole.logits.argmax(-1) == whole.targets).float().mean().item())
    assert found["loss_count"] == sum(sum(f.weights) for f in features)
    assert all(value.dtype == torch.float64 for value in metrics.sums.values())
    records = TASK.records([whole])
    assert [record["feature"] for record in records] == [10, 11, 12]
    assert [record["tokens"] for record in records] == [sum(f.weights) for f in features]
    assert sum(record["loss"] * record["tokens"] for record in records) == pytest.approx(loss * found["loss_count"], rel=1e-5)


def test_a_perplexity_beyond_all_numbers_is_the_largest_number():
    """JSON has no infinity."""
    metrics = TASK.metrics([], None)
    metrics.sums |= {"loss": torch.tensor(7200.0, dtype=torch.float64), "count": torch.tensor(10.0, dtype=torch.float64)}
    assert metrics.compute()["perplexity"] == sys.float_info.max


def test_metrics_of_nothing_say_so(features):
    batch = batch_of(features)
    batch.weights.zero_()
    metrics = TASK.metrics([], None)
    metrics.update(TASK.items(model_of("llama"), batch).scores())
    found = metrics.compute()
    assert found["loss_count"] == 0
    assert math.isnan(found["loss"])


# Generation


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A Llama that knows its two answers by heart, and the rows that it learned them from."""
    model = model_of("llama").train()
    chats = [
        [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "At the front desk."}],
        [{"role": "user", "content": "When does it open?"}, {"role": "assistant", "content": "At nine."}],
    ]
    batch = batch_of([encode(tokenizer, messages=messages)[0] for messages in chats])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        scores = TASK.items(model, batch).scores()
        loss = F.cross_entropy(scores.logits, scores.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    return model, [row(messages=messages) for messages in chats]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 0.01, "top_p": 0.9}])
def test_taught_answers_are_given_and_end(taught, tokenizer, options):
    model, rows = taught
    answers = TASK.predict(model, tokenizer, rows, Limits(64, "right"), Generation(max_new_tokens=16, **options))
    assert answers == [{"text": "At the front desk.", "finished": True}, {"text": "At nine.", "finished": True}]
    assert model.training


def test_an_adapter_answers_too(taught, tokenizer):
    model, rows = taught
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    try:
        answers = TASK.predict(adapted, tokenizer, rows, Limits(64, "right"), Generation(max_new_tokens=16))
    finally:
        adapted.unload()
    assert [answer["text"] for answer in answers] == ["At the front desk.", "At nine."]


def test_answers_come_in_the_order_of_the_rows_whatever_stands_beside_them(taught, tokenizer, monkeypatch):
    model, rows = taught
    rows = [rows[1], row(messages=rows[0].values["messages"][:1]), row(prompt="nine"), rows[1], row(text="The library opens")]
    alone = [TASK.predict(model, tokenizer, [one], Limits(64, "right"), Generation(max_new_tokens=8))[0] for one in rows]
    assert [answer["text"] for answer in alone[:2]] == ["At nine.", "At the front desk."]
    assert TASK.predict(model, tokenizer, rows, Limits(64, "right"), Generation(max_new_tokens=8)) == alone
    monkeypatch.setattr("ftkit.tasks.causal_lm.GENERATED_ROWS", 2)
    assert TASK.predict(model, tokenizer, rows, Limits(64, "right"), Generation(max_new_tokens=8)) == alone


@pytest.mark.parametrize(("name", "room"), [("gpt2", 34), ("llama", 34), ("roberta", 33), ("bloom", 50)])
def test_generation_stays_within_the_positions_of_the_model(name, room, tokenizer):
    """RoBERTa has one position less than it has embeddings for, BLOOM has no limit."""
    rows = [row(text=" ".join(SENTENCES)), row(text="nine")]
    long, short = TASK.predict(model_of(name), tokenizer, rows, Limits(50, "right"), Generation(max_new_tokens=30))
    assert long["truncated"] == len(tokenizer(rows[0].values["text"])["input_ids"]) - room
    assert set(short) == {"text", "finished"}
    assert isinstance(long["text"], str)


@pytest.fixture
def asked(monkeypatch):
    """What is generated from: (prompts, max_new_tokens) of each batch."""
    calls = []

    def generate(model, prompts, stops, tokenizer, generation, streamer=None):
        calls.append((prompts, generation.max_new_tokens))
        return [[5] * generation.max_new_tokens for _ in prompts]

    monkeypatch.setattr("ftkit.tasks.causal_lm._generate", generate)
    return calls


def test_the_positions_are_the_models_own(tokenizer, asked, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 16)  # bounds only the default of data.max_length
    [answer] = TASK.predict(model_of("llama"), tokenizer, [row(text="nine")], Limits(40, "right"), Generation(max_new_tokens=20))
    assert "max_new_tokens" not in answer


@pytest.mark.parametrize("texts", [["nine"], ["nine", " ".join(SENTENCES)]])
def test_what_an_answer_may_take_does_not_depend_on_its_neighbours(tokenizer, asked, texts):
    answers = TASK.predict(model_of("llama"), tokenizer, [row(text=text) for text in texts], Limits(64, "right"), Generation(max_new_tokens=64))
    length = len(tokenizer("nine")["input_ids"])
    assert [(len(prompts[0]), allowed) for prompts, allowed in asked] == [(length, 64 - length), (32, 32)][: len(texts)]
    assert [answer["max_new_tokens"] for answer in answers] == [64 - length, 32][: len(texts)], "less than asked for is told"


def test_a_long_prompt_leaves_room_for_its_answer_and_keeps_its_beginning_of_text(opening, asked):
    text = " ".join(SENTENCES)
    [answer] = TASK.predict(model_of("llama"), opening, [row(text=text)], Limits(64, "right"), Generation(max_new_tokens=20))
    whole = opening(text)["input_ids"]
    assert asked == [([[opening.bos_token_id, *whole[-43:]]], 20)]
    assert answer["truncated"] == len(whole) - 44
    assert "max_new_tokens" not in answer


class Unstreamed:
    def put(self, value): ...

    def end(self): ...


def test_a_long_chat_forgets_its_oldest_exchanges_in_a_file_as_in_the_terminal(tokenizer, asked):
    messages = [TWO_TURNS[0], *TWO_TURNS[1:3] * 4, TWO_TURNS[3]]
    model, generation = model_of("llama"), Generation(max_new_tokens=4)
    expected = chat.prompt_ids([TWO_TURNS[0], *TWO_TURNS[1:4]], tokenizer)
    whole = chat.prompt_ids(messages, tokenizer)
    limits = Limits(len(expected) + 3, "right")
    model.config.max_position_embeddings = 256
    try:
        answers = TASK.predict(model, tokenizer, [row(messages=messages), row(messages=[*messages, TWO_TURNS[4]])], limits, generation)
        TASK.reply(model, tokenizer, messages, limits, generation, Unstreamed())
    finally:
        model.config.max_position_embeddings = 64
    assert [prompt for prompts, _ in asked for prompt in prompts] == [expected] * 3
    assert [answer["truncated"] for answer in answers] == [len(whole) - len(expected)] * 2


def test_cut_answers_are_not_finished(taught, tokenizer):
    model, rows = taught
    [answer] = TASK.predict(model, tokenizer, rows[:1], Limits(64, "right"), Generation(max_new_tokens=2))
    assert not answer["finished"]
    assert "At the front desk.".startswith(answer["text"])


def test_prompts_that_cannot_be_answered(tokenizer):
    model = model_of("llama")
    with pytest.raises(
        DataError, match=r"data.jsonl:7: the prompt has \d+ tokens, more than the 4 that data.max_length: 4 and eval.generation.max_new_tokens: 256 "
    ):
        TASK.predict(model, tokenizer, [row(text=SENTENCES[0])], Limits(4, "error"), Generation())
    with pytest.raises(DataError, match=r"data.jsonl:7: no message to answer"):
        TASK.predict(model, tokenizer, [row(messages=[{"role": "assistant", "content": "Hi"}])], Limits(64, "right"), Generation())


def test_the_generation_config_that_is_saved_stops_chats(taught, tokenizer):
    model, rows = taught
    model.generation_config.eos_token_id = chat.stop_token_ids(tokenizer)
    prompt = torch.tensor([chat.prompt_ids(rows[0].values["messages"], tokenizer)])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(written) == "At the front desk.<|im_end|>"


def test_compiled_layers_write_uncompiled():
    """Each length of a cache would be compiled anew."""
    import torch._dynamo

    stances = []
    model = SimpleNamespace(generate=lambda **given: stances.append(torch._dynamo.eval_frame._stance.stance))
    language_model.generate(model, None)
    assert (stances, torch._dynamo.eval_frame._stance.stance) == (["force_eager"], "default")
