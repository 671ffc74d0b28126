"""Rows laid end to end give what they give alone, in every architecture that allows it, and others are found out."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AlbertConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    StableLmConfig,
    T5Config,
    UMT5Config,
)

from ftkit import attention, plain_attention, recompute
from ftkit.attention import NAME, Flat, Unsupported
from ftkit.data import batches
from ftkit.data.batches import segments

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
ENCODERS = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL),  # counts positions itself, from after the padding token
    "albert": AlbertConfig(**SMALL, embedding_size=16),
    "electra": ElectraConfig(**SMALL, embedding_size=16),
    "distilbert": DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=100, max_position_embeddings=64),  # takes no positions
    "modernbert": ModernBertConfig(**SMALL, local_attention=4, global_attn_every_n_layers=2, pad_token_id=0),
}
DECODERS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64, pad_token_id=0),
    "gpt-neox": GPTNeoXConfig(**SMALL, pad_token_id=0),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=5),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=2),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "phi3": Phi3Config(**GROUPED),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "opt": OPTConfig(**{**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0}),
    "bert-decoder": BertConfig(**SMALL, is_decoder=True),
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
LENGTHS = (11, 7, 7, 3)  # of rows; longer and shorter than the sliding windows, two alike
OTHERS = {  # refused before a forward pass, or in it
    "deberta": (DebertaV2Config(**SMALL), "its attention is its own"),
    "mpnet": (MPNetConfig(**SMALL), "its attention is its own"),
    "gemma2": (Gemma2Config(**GROUPED, head_dim=8), "its attention wants softcap"),
    "stablelm": (StableLmConfig(**GROUPED), "its layers do not pass on to attention which tokens belong together"),
}


def built(cls, config):
    """A model with weights large enough that every token counts, in eval mode, computing attention by its own code."""
    torch.manual_seed(0)
    model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    ids, mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    rng = torch.Generator().manual_seed(1)
    for row, length in enumerate(LENGTHS):
        ids[row, :length], mask[row, :length] = torch.randint(3, 100, (length,), generator=rng), 1
    return ids, mask


def alone(model, ids, **kwargs):
    """The first output of each row by itself."""
    return [model(input_ids=ids[row : row + 1, :length], **kwargs)[0][0] for row, length in enumerate(LENGTHS)]


def flat(model, ids, mask, widened=False, fast_dropout=True, fast_attention=True, filled=False, **kwargs):
    """The same of the batch, without padding; the model stays flat, for the backward pass."""
    pad = getattr(model.config, "pad_token_id", 0) or 0
    found = batches._filled_up(segments(mask.numpy())) if filled else segments(mask.numpy())
    with Flat(model, fast_dropout, fast_attention).rows(batches._widened(found) if widened else found):
        output = model(input_ids=torch.where(mask > 0, ids, pad), attention_mask=mask, **kwargs)[0]
    return [row[:length] if row.dim() == 2 else row for row, length in zip(output, LENGTHS, strict=True)]


def difference(found, expected):
    scale = max(value.abs().max() for value in expected)
    return max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) / scale


def assert_alike(model, *ways):
    """Two ways to compute the logits of the same items, [n, C], give the same, and the same gradients."""
    logits, gradients = [], []
    for compute in ways:
        model.zero_grad()
        logits.append(compute())
        logits[-1].log_softmax(-1)[:, 0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert difference(*logits[::-1]) < 1e-5
    assert difference(*gradients[::-1]) < 1e-5


@pytest.fixture(params=[0, 50, 2000], ids=["of-one-length", "a-few-padded", "one-group"])
def call(request, monkeypatch):
    """What a call of attention is said to cost: rows attend in three, two and one groups."""
    monkeypatch.setattr(batches, "CALL", request.param)
    return request.param


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_classes_are_those_of_each_row_alone(name, call, batch):
    config = (ENCODERS | DECODERS)[name]
    if type(config) not in transformers.AutoModelForSequenceClassification._model_mapping:
        pytest.skip("has no such head")
    model = built(transformers.AutoModelForSequenceClassification, config)
    assert_alike(model, lambda: torch.stack(alone(model, batch[0])), lambda: torch.stack(flat(model, *batch)))


@pytest.mark.parametrize("name", DECODERS)
def test_next_tokens_are_those_of_each_row_alone(name, call, batch):
    model = built(transformers.AutoModelForCausalLM, DECODERS[name])
    assert_alike(model, lambda: torch.cat(alone(model, batch[0], use_cache=False)), lambda: torch.cat(flat(model, *batch, use_cache=False)))


@pytest.fixture
def planned(monkeypatch):
    """Rows of the batch are long enough for cuDNN's attention, in whose place torch's own is here; returns the lengths that it gets."""
    for name, value in {"LONG": 8, "PLANNED": 5, "PLANNED_COST": 0.1, "_has_planner": lambda query: True}.items():
        monkeypatch.setattr(attention, name, value)
    lengths, own = [], attention.F.scaled_dot_product_attention

    def seen(query, *args, **kwargs):
        lengths.append(query.shape[2])
        return own(query, *args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", seen)
    return lengths


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_long_rows_side_by_side_give_what_they_give_alone(name, filled, planned, batch):
    """In layers without a sliding window; the others attend as ever."""
    model = built(transformers.AutoModelForCausalLM, DECODERS[name])
    assert batches._missing(sum(LENGTHS)) == 4
    assert_alike(model, lambda: torch.cat(alone(model, batch[0], use_cache=False)), lambda: torch.cat(flat(model, *batch, filled=filled, use_cache=False)))
    windowed = getattr(model.config, "sliding_window", None) is not None
    assert planned.count(15) == (0 if name == "mistral" else 1 if windowed else 2), "a call a layer, of 11 tokens padded to 15"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bert-decoder"])
def test_long_rows_without_padding_give_what_they_give_alone(name, planned, batch):
    model = built(transformers.AutoModelForCausalLM, DECODERS[name])
    rows = torch.cat((batch[0][:1], batch[0][:1].flip(1)))
    own = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    with Flat(model).rows(None):
        found = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
    assert difference(found, own) < 1e-5
    assert 15 in planned
    planned.clear()
    with Flat(model, fast_attention=False).rows(None):
        model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
    assert 15 not in planned


def test_short_rows_and_rows_of_unlike_lengths_are_not_laid_side_by_side(planned, batch, monkeypatch):
    monkeypatch.setattr(attention, "PLANNED_COST", 0.6)
    model = built(transformers.AutoModelForCausalLM, DECODERS["llama"])
    flat(model, *batch, use_cache=False)
    assert 15 not in planned


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("kind", [T5Config, UMT5Config])
def test_tags_of_the_encoder_of_t5_with_its_position_bias(kind, widened, call, batch, monkeypatch):
    """The bias is as large as the longest row, not as all of them together."""
    model, seen, attended = built(transformers.AutoModelForTokenClassification, kind(**T5)), [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **kwargs: seen.append(kwargs["position_bias"].shape) or attended(*args, **kwargs))
    assert_alike(model, lambda: torch.cat(alone(model, batch[0])), lambda: torch.cat(flat(model, *batch, widened)))
    assert min(seen)[2] == max(seen)[2] == max(map(len, batch[0]))


DROPPING = {
    "bert": BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5),
    "modernbert": ModernBertConfig(**SMALL, attention_dropout=0.5, local_attention=6, global_attn_every_n_layers=2, pad_token_id=0),
    "mistral": MistralConfig(**GROUPED, attention_dropout=0.5, sliding_window=4),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.5, pad_token_id=0),
}


@pytest.mark.parametrize("name", DROPPING)
def test_attention_with_dropout_is_the_same_but_for_what_is_dropped(name, call, batch, monkeypatch):
    """Its own code, with a dropout that drops nothing, beside the model's without."""
    shares = []
    monkeypatch.setattr(plain_attention, "num_lost", lambda share: shares.append(share) or 0)
    model = built(transformers.AutoModelForSequenceClassification, DROPPING[name])
    for name, module in model.named_modules():
        if name.endswith("out_drop"):  # ModernBERT drops with the same share after attention, too
            module.p = 0.0
    assert_alike(model, lambda: torch.stack(alone(model, batch[0])), lambda: torch.stack(flat(model.train(), *batch)))
    assert set(shares) == {0.5}


@pytest.mark.parametrize("fast", [True, False])
def test_attention_with_dropout_in_bfloat16_is_of_bfloat16_products_unless_switched_off(fast, batch, monkeypatch):
    seen, attended = set(), plain_attention.attend
    monkeypatch.setattr(plain_attention, "attend", lambda *args: seen.update(states.dtype for states in args[:3]) or attended(*args))
    model = built(transformers.AutoModelForSequenceClassification, DROPPING["bert"]).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = torch.stack(flat(model, *batch, widened=True, fast_attention=fast))
    output.sum().backward()
    assert seen == {torch.bfloat16 if fast else torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_may_be_left_to_torch(name, call, batch, monkeypatch):
    """A share so small that it drops nothing."""
    monkeypatch.setattr(plain_attention, "attend", None)
    config = deepcopy(DROPPING[name])
    for key, share in vars(config).items():
        if share == 0.5:
            setattr(config, key, 1e-12)
    model = built(transformers.AutoModelForSequenceClassification, config)
    assert_alike(model, lambda: torch.stack(alone(model, batch[0])), lambda: torch.stack(flat(model.train(), *batch, fast_dropout=False)))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_recomputes_the_same(name, batch):
    config = (ENCODERS | DECODERS)[name]
    model = built(transformers.AutoModelForSequenceClassification, config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, mask = batch
    found, layers = [], Flat(model)
    for checkpointing in (False, True):
        if checkpointing:
            recompute.everywhere(model)
        model.zero_grad()
        with layers.rows(segments(mask.numpy())):
            logits = model(input_ids=ids, attention_mask=mask).logits
        logits.log_softmax(-1)[:, 0].sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert difference(found[1], found[0]) < 1e-6


class Read(TorchDispatchMode):
    """Counts how often a number is read off a tensor, for which a program waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_nothing_waits_for_what_is_in_a_mask(name, padded, batch):
    config = (ENCODERS | DECODERS)[name]
    model = built(transformers.AutoModel, config)
    ids, mask = batch if padded else (batch[0][:1], None)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with Flat(model).rows(segments(mask.numpy()) if padded else None), Read() as read:
            found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = slice(None) if mask is None else mask > 0
    assert difference([found[real]], [expected[real]]) < 1e-5
    assert read.count == 0


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_laid_flat_says_why(name, batch):
    config, reason = OTHERS[name]
    model = built(transformers.AutoModelForSequenceClassification, config)
    with pytest.raises(Unsupported, match=reason):
        flat(model, *batch)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"), ({"sliding_window": 4}, "window of which attention is not told")],
)
def test_layers_with_windows_that_attention_is_not_told_of_are_refused(setting, reason, batch):
    model = built(transformers.AutoModelForCausalLM, LlamaConfig(**GROUPED))
    vars(model.config).update(setting)
    with pytest.raises(Unsupported, match=reason):
        flat(model, *batch, use_cache=False)


def test_only_real_tokens_pass_the_layers(batch):
    model = built(transformers.AutoModelForSequenceClassification, ENCODERS["bert"])
    seen = []
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    with torch.no_grad():
        flat(model, *batch)
    assert seen == [(1, sum(LENGTHS), 32)]


def test_removed_it_leaves_the_model_as_it_was(batch):
    ids, mask = batch
    model = built(transformers.AutoModelForSequenceClassification, ENCODERS["bert"])
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        layers = Flat(model)
        with layers.rows(segments(mask.numpy())):
            model(input_ids=ids, attention_mask=mask)
        assert model.config._attn_implementation == NAME
        padded = model(input_ids=ids, attention_mask=mask)[0]  # without rows() it computes as ever
        layers.remove()
        assert model.config._attn_implementation == before
        assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], expected)
    assert (padded - expected).abs().max() < 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rows_attend_in_one_call_where_padding_costs_less_than_another(monkeypatch):
    monkeypatch.setattr(batches, "CALL", 50)
    assert batches.grouped([5, 5, 6, 9, 20, 20]) == [(3, 6), (1, 9), (2, 20)]  # 2 * (36 - 25) = 22 more pairs; 3 * (81 - 36) = 135
    assert batches.grouped([20, 20, 9, 6, 5, 5]) == [(2, 20), (2, 9), (2, 5)]
    monkeypatch.setattr(batches, "CALL", 0)
    assert batches.grouped([3, 3, 4]) == [(2, 3), (1, 4)]


def test_segments_say_where_the_real_tokens_are():
    mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    found = segments(mask)
    assert found.lengths == [3, 1, 2]
    assert found.index.tolist() == [0, 1, 2, 3, 6, 7]
    assert found.bounds.tolist() == [0, 3, 4, 6]
    values = torch.arange(9.0).view(3, 3)
    assert found.gather(values).tolist() == [[0, 1, 2, 3, 6, 7]]
    assert torch.equal(found.scatter(found.gather(values)), values * torch.from_numpy(mask))


def test_filled_up_segments_give_back_what_was_gathered():
    mask = np.arange(40) < np.array([40, 17, 33])[:, None]
    given, lengths = segments(mask.astype(int)), [40, 17, 33]
    found = batches._filled_up(given)
    assert (found.filler, found.lengths, len(found.index)) == (6, [6, *lengths], 96)
    assert found.bounds.tolist() == [0, 6, 46, 63, 96]
    assert sum(count for count, _ in found.groups) == 4
    values = torch.arange(120.0).view(3, 40)
    flat = found.gather(values)
    assert torch.equal(found.scatter(flat), values * torch.from_numpy(mask))
    assert torch.equal(found.without_filler(flat), given.gather(values))
    assert torch.equal(found.with_filler(given.gather(values)), flat)
    assert [length for _, length in batches._widened(found).groups] == [16, 32, 48, 48][-len(found.groups) :]
    assert batches._filled_up(segments(np.ones((2, 32), int))).filler == 0
    assert batches._filled_up(segments(np.ones((1, 5), int))).filler == 0  # more than there are
    assert {count + batches._missing(count) for count in (97, 128)} == {128}
    assert 5000 + batches._missing(5000) == 5120


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["bert", "modernbert", "mistral", "llama"])
def test_in_bfloat16_attention_is_as_exact_as_torchs_own(name, fast, batch, monkeypatch):
    """Outputs and gradients are as near to those of float32 as those of torch's kernels for bfloat16, or nearer."""
    seen, attended = [], plain_attention.attend
    monkeypatch.setattr(plain_attention, "attend", lambda *args: seen.append({states.dtype for states in args[:3]}) or attended(*args))
    model = built(transformers.AutoModel, {**ENCODERS, **DECODERS}[name])

    def gradients(compute):
        model.zero_grad()
        torch.stack(compute()).float().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def own():
        model.set_attn_implementation("sdpa")
        return [row.mean() for row in alone(model, batch[0])]

    exact = gradients(own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = gradients(own), gradients(lambda: [row.mean() for row in flat(model, *batch, widened=fast, fast_attention=fast)])
    assert difference(ours, exact) < 1.5 * difference(theirs, exact) < 0.1
    assert (seen and all(types == {torch.bfloat16} for types in seen)) if fast else not seen


@pytest.mark.parametrize("name", ["bert", "modernbert", "mistral", "llama"])
def test_in_bfloat16_no_row_feels_another(name, call, batch):
    ids, mask = batch
    model = built(transformers.AutoModel, {**ENCODERS, **DECODERS}[name])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = flat(model, ids, mask, widened=True)
        for row in range(len(LENGTHS)):
            others = ids.flip(1).where(torch.arange(len(ids))[:, None] != row, ids)
            assert torch.equal(flat(model, others, mask, widened=True)[row], found[row])
