"""The loss of a chunk at a time is the loss of all logits, and so is every gradient, whatever a model does after its output head."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from ftkit import chunks, slices
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features, Items
from ftkit.errors import RecipeError
from ftkit.loop import Trainee
from ftkit.objectives.supervised import Supervised
from ftkit.tasks.causal_lm import CausalLM

VOCABULARY = 101
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama-tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=0.5),
    "granite": transformers.GraniteConfig(**GROUPED, logits_scaling=4.0),
    "cohere": transformers.CohereConfig(**GROUPED, logit_scale=0.25),
    "opt": transformers.OPTConfig(**{**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0, "dropout": 0.0}),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=2),
    "bert": transformers.BertConfig(**SMALL, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),  # a transform before the vocabulary
}
TASK = CausalLM()


def built(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).train()


@pytest.fixture(scope="module")
def batch():
    rng = torch.Generator().manual_seed(1)
    rows = []
    for length in (11, 3, 7):
        ids = torch.randint(3, VOCABULARY, (length + 1,), generator=rng).tolist()
        rows.append([Features(ids[:-1], ids[1:], [0.0] + [0.5 + i % 2 for i in range(length - 1)])])
    return collate(FeatureSet.of(rows), range(3), 0)


@pytest.fixture
def small(monkeypatch):
    """Chunks of four positions and slices of thirty tokens."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 4 * VOCABULARY)
    monkeypatch.setitem(chunks.MOST, "cpu", 4 * VOCABULARY)
    monkeypatch.setattr(slices, "CLASSES", 30)
    monkeypatch.setattr(chunks, "sliced", lambda items, objective: items.layer)


@pytest.fixture(params=["items", "classes"])
def way(request, small, monkeypatch):
    """Chunks of items, or slices of classes."""
    if request.param == "items":
        monkeypatch.setattr(chunks, "sliced", lambda items, objective: None)
    return request.param


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def expected(model, batch):
    """Loss and gradients by the model's own forward pass."""
    model.zero_grad()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    loss = (losses * batch.weights.flatten()).sum()
    (loss / batch.weights.sum()).backward()
    return loss, gradients(model)


def check_same(model, batch):
    loss, wanted = expected(model, batch)
    model.zero_grad()
    found = chunks.loss(TASK.items(model, batch), Supervised(), list(model.parameters()))
    (found / batch.weights.sum()).backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    ours = gradients(model)
    assert ours.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (ours[name] - gradient).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_all_logits(name, batch, way):
    model, sizes = built(name), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append((output.shape[:-1].numel(), output.shape[-1])))
    check_same(model, batch)
    assert len(batch.supervised) == 18
    sizes = sizes[3:]  # after the model's own forward pass and two trials with one position
    assert sizes == ([(count, VOCABULARY) for count in (4, 4, 4, 4, 2)] if way == "items" else 2 * [(18, 30), (18, 30), (18, 30), (18, 11)])


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "bert"])
def test_smoothed_labels(name, batch, way):
    model, objective = built(name), Supervised(label_smoothing=0.2)
    items = TASK.items(model, batch)
    whole = objective.loss(items.scores())
    whole.backward()
    wanted = gradients(model)
    model.zero_grad()
    found = chunks.loss(TASK.items(model, batch), objective, list(model.parameters()))
    found.backward()
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
    ours = gradients(model)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert all((ours[name] - gradient).abs().max() <= 1e-6 * largest for name, gradient in wanted.items())


def test_the_layer_of_the_tokens_is_found(batch):
    model = built("bert")
    assert TASK.items(model, batch).layer is model.get_output_embeddings()


class Normalised(transformers.LlamaForCausalLM):
    """Of the logits none is that of one row alone."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits.log_softmax(-1)
        return found


class Shifted(transformers.LlamaForCausalLM):
    """A number for each token is added."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits + torch.arange(VOCABULARY)
        return found


@pytest.mark.parametrize("kind", [Normalised, Shifted])
def test_where_a_logit_takes_more_than_its_row_the_classes_stay_together(kind, batch, small):
    model = kind(CONFIGS["llama"]).train()
    assert TASK.items(model, batch).layer is None
    check_same(model, batch)


def test_a_layer_that_is_not_plain_is_left_alone(batch):
    model = get_peft_model(built("llama"), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert TASK.items(model, batch).layer is None
    model = get_peft_model(built("llama-tied"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM"))
    assert TASK.items(model, batch).layer is None


def test_in_bfloat16_slices_are_as_near_to_float32_as_all_logits_are(batch, small):
    model = built("llama")
    _, exact = expected(model, batch)
    away = []
    for in_chunks in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = chunks.loss(TASK.items(model, batch), Supervised(in_chunks=in_chunks), list(model.parameters()))
        (found / batch.weights.sum()).backward()
        away.append(sum((gradient - exact[name]).norm().item() for name, gradient in gradients(model).items()))
    assert 0 < away[0] < 1.2 * away[1]


def test_items_without_targets_in_a_slice_have_a_loss(batch, small):
    """Every slice is passed, also those that hold no target; and an item of weight 0 gives nothing."""
    model = built("llama")
    items = TASK.items(model, batch)
    items.targets = torch.full_like(items.targets, VOCABULARY - 1)
    items.weights = torch.zeros_like(items.weights)
    items.weights[3] = 2
    found = chunks.loss(items, Supervised(), list(model.parameters()))
    found.backward()
    assert found.item() == pytest.approx(2 * F.cross_entropy(items.head(items.states[3:4]), items.targets[3:4]).item(), rel=1e-6)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_under_an_adapter(targets, batch, way):
    model = get_peft_model(built("llama"), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0))
    check_same(model, batch)


def test_chunks_are_larger_where_the_gradient_of_the_head_is_large_anyway(batch, monkeypatch):
    monkeypatch.setitem(chunks.LOGITS, "cpu", 4 * VOCABULARY)
    model = built("llama")
    items, hidden = TASK.items(model, batch), model.config.hidden_size
    assert chunks.chunk_size(items) == chunks.chunk_size(items, [model.model.norm.weight]) == 4
    assert chunks.chunk_size(items, [model.lm_head.weight]) == hidden
    monkeypatch.setitem(chunks.MOST, "cpu", 16 * VOCABULARY)
    assert chunks.chunk_size(items, [model.lm_head.weight]) == 16


def test_larger_chunks_are_round(batch, monkeypatch):
    monkeypatch.setitem(chunks.LOGITS, "cpu", 100 * VOCABULARY)
    assert chunks.chunk_size(TASK.items(built("llama"), batch)) == 96


@pytest.mark.parametrize(
    ("vocabulary", "bf16", "smoothing", "expected"),
    [(2**15, True, 0.1, True), (2**15, False, 0.1, False), (2**14, True, 0.1, False), (2**15, True, None, False)],
)
def test_slices_are_for_many_classes_in_bfloat16(vocabulary, bf16, smoothing, expected):
    layer = torch.nn.Linear(2, vocabulary)
    items = Items(torch.zeros(1, 2), layer, vocabulary, torch.zeros(1), torch.zeros(1), torch.zeros(1), layer=layer)
    objective = Supervised().model_copy(update={"label_smoothing": smoothing})
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert chunks.sliced(items, objective) is (layer if expected else None)
    items.layer = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert chunks.sliced(items, objective) is None


def test_scores_come_in_chunks_and_without_gradients(batch, small):
    model = built("llama").eval()
    with torch.no_grad():
        items = TASK.items(model, batch)
        parts = list(chunks.scores(items))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    assert [len(part.targets) for part in parts] == [4, 4, 4, 4, 2]
    assert (torch.cat([part.logits for part in parts]) - logits[batch.weights > 0]).abs().max() < 1e-6
    records = TASK.records(iter(parts))
    assert [(record["feature"], record["tokens"]) for record in records] == [(0, 10), (1, 2), (2, 6)]
    whole = TASK.records([items.scores()])
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in whole], rel=1e-6)


def test_the_model_is_left_as_it_was(batch, small):
    model = built("llama")
    before = set(vars(model.model))
    items = TASK.items(model, batch)
    with pytest.raises(RuntimeError):
        items.head(torch.zeros(2, 7))  # of the wrong width
    assert set(vars(model.model)) == before


def test_a_model_whose_head_cannot_be_told_from_its_base_is_refused(batch):
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(self.model.embed_tokens(input_ids)))

    with pytest.raises(RecipeError, match="Odd does not call its base model"):
        TASK.items(Odd(CONFIGS["llama"]), batch)


def test_in_ddp_every_gradient_is_reduced(batch, way, tmp_path):
    """DDP waits for all gradients of a pass; one that came past its hooks would stay as it is."""
    model = built("llama-tied")
    _, wanted = expected(model, batch)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(Trainee(model, model.model, TASK, Supervised()))
        reduced = []

        def as_it_is(_, bucket):  # of one process; a callback of gloo's could deadlock with the end of the group, which waits for its threads
            reduced.extend(bucket.parameters())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, as_it_is)
        for _ in range(2):  # DDP complains in the second pass of what was missing in the first
            model.zero_grad()
            (wrapped(batch) / batch.weights.sum()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(reduced) == 2 * len(wanted)
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).abs().max() <= 1e-6, name
