"""The loss of a chunk at a time is the loss of all logits, and so is every gradient, whatever a model does after its output head."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F

from ftkit import chunks
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
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
def sizes(monkeypatch):
    """Chunks of four positions; what the output head gave, call by call, goes into the list."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 4 * VOCABULARY)
    monkeypatch.setattr(chunks, "MOST", 1)
    return []


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
def test_loss_and_gradients_are_those_of_all_logits(name, batch, sizes):
    model = built(name)
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    check_same(model, batch)
    assert len(batch.supervised) == 18
    assert sizes[1:] == [4, 4, 4, 4, 2]  # after the model's own forward pass; positions in a chunk


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_under_an_adapter(targets, batch, sizes):
    model = get_peft_model(built("llama"), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0))
    check_same(model, batch)


def test_chunks_are_larger_where_the_gradient_of_the_head_is_large_anyway(batch, monkeypatch):
    monkeypatch.setitem(chunks.LOGITS, "cpu", 4 * VOCABULARY)
    model = built("llama")
    items, hidden = TASK.items(model, batch), model.config.hidden_size
    assert chunks.chunk_size(items) == chunks.chunk_size(items, [model.model.norm.weight]) == 4
    assert chunks.chunk_size(items, [model.lm_head.weight]) == min(hidden, 4 * chunks.MOST)


def test_scores_come_in_chunks_and_without_gradients(batch, sizes):
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


def test_the_model_is_left_as_it_was(batch, sizes):
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


def test_in_ddp_every_gradient_is_reduced(batch, sizes, tmp_path):
    """DDP waits for all gradients of a pass; one that came past its hooks would stay as it is."""
    model = built("llama-tied")
    _, wanted = expected(model, batch)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(Trainee(model, model.model, TASK, Supervised()))
        reduced = []
        wrapped.register_comm_hook(None, lambda state, bucket: reduced.extend(bucket.parameters()) or allreduce_hook(None, bucket))
        for _ in range(2):  # DDP complains in the second pass of what was missing in the first
            model.zero_grad()
            (wrapped(batch) / batch.weights.sum()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(reduced) == 2 * len(wanted)
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).abs().max() <= 1e-6, name
