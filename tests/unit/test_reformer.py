"""Reformer in training beside its own code, where that works, and beside itself in eval mode."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.reformer import modeling_reformer as own

from ftkit import attention, reformer
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Generation
from ftkit.tasks.language_model import generation_config
from ftkit.tasks.sentence_embedding import SentenceEmbedding

STILL = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0}
SEED, POSITIONS, CHUNK, WORDS = 5, 96, 8, 50


def config(**changes):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 64, "vocab_size": WORDS, "initializer_range": 0.1}
    chunks = {"local_attn_chunk_length": CHUNK, "lsh_attn_chunk_length": CHUNK, "num_buckets": 4, "hash_seed": SEED}
    axes = {"axial_pos_shape": [8, 12], "axial_pos_embds_dim": [8, 24], "max_position_embeddings": POSITIONS}
    return transformers.ReformerConfig(**{"attn_layers": ["local", "lsh"], **sizes, **chunks, **axes, **STILL, **changes})


def built(mended: bool = True, cls=own.ReformerModel, **changes):
    torch.manual_seed(0)
    model = cls(config(**changes))
    if mended:
        reformer.mend(model)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, WORDS, shape, generator=torch.Generator().manual_seed(1))


def states_of(model, ids, **inputs) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).last_hidden_state


def gradients(model, ids, mask, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Of a sum over real tokens, each state weighted by another number."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    states = states_of(model, ids, attention_mask=mask)
    (states * torch.linspace(-1, 1, states.numel()).view_as(states) * mask.unsqueeze(-1)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axial", [True, False])
@pytest.mark.parametrize("layers", [["local", "local"], ["lsh"], ["local", "lsh", "local"]])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_gradients_are_those_of_its_own_reversible_layers(layers, is_decoder, axial):
    """In rows of all positions, and with the one draw of rotations that both sides make alike."""
    ids, mask = tokens(2, POSITIONS), torch.ones(2, POSITIONS, dtype=torch.int64)
    mask[1, 30:] = 0
    theirs, ours = (gradients(built(mended, attn_layers=layers, is_decoder=is_decoder, axial_pos_embds=axial).train(), ids, mask) for mended in (False, True))
    assert theirs.keys() == ours.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    assert max((ours[name] - gradient).abs().max() for name, gradient in theirs.items()) <= 1e-5 * largest


def test_its_own_code_takes_other_rows_in_eval_mode_only():
    """Once this fails, `_padded` and `_positions` are not needed any more."""
    for length in (30, 32):
        with pytest.raises(ValueError, match=r"training, (sequence length|make sure)"):
            states_of(built(mended=False).train(), tokens(2, length))


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 30, POSITIONS])
def test_rows_of_any_length_train_and_get_the_states_of_eval_mode(length):
    model, ids = built(attn_layers=["local", "local"]), tokens(2, length)
    trained = states_of(model.train(), ids)
    with torch.no_grad():
        torch.testing.assert_close(trained, states_of(model.eval(), ids), rtol=0, atol=1e-6)
        torch.testing.assert_close(trained, states_of(built(mended=False, attn_layers=["local", "local"]).eval(), ids), rtol=0, atol=1e-6)
    assert model.training is False


def test_shorter_rows_get_the_position_encodings_and_the_dropout_of_whole_ones():
    module = built().embeddings.position_embeddings.train()
    module.dropout = 0.5
    torch.manual_seed(2)
    whole = type(module).forward(module, torch.arange(POSITIONS).expand(3, -1))
    torch.manual_seed(2)
    short = module(torch.arange(30).expand(3, -1))
    assert torch.equal(short, whole[:, :30])
    assert 0 < (short == 0).float().mean() < 1


@pytest.mark.parametrize("learning", ["encoder.layers.1.", "encoder.layers.0.feed_forward.output.", "encoder.layer_norm."])
def test_what_is_frozen_changes_no_gradient_of_what_learns(learning):
    """Its own code gives none above frozen embeddings, and stops at frozen layers in eval mode."""
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    model = built().train()
    model.encoder.layers[0].attention.eval()
    expected = gradients(model, ids, mask)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learning))
    model.embeddings.eval()
    found = gradients(model, ids, mask)
    assert found.keys() == {name for name in expected if name.startswith(learning)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM", "ModelWithLMHead"])
def test_every_head_learns_rows_of_several_chunks_by_heart(head):
    ids = tokens(4, 30)
    labels = {
        "ForSequenceClassification": {"labels": torch.tensor([0, 1, 0, 1])},
        "ForQuestionAnswering": {"start_positions": torch.tensor([3, 9, 17, 2]), "end_positions": torch.tensor([5, 9, 28, 4])},
    }.get(head, {"labels": ids})
    model = built(cls=getattr(own, f"Reformer{head}"), is_decoder=head == "ModelWithLMHead", hidden_dropout_prob=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        losses.append(model(input_ids=ids, **labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


# --- what is random ---------------------------------------------------------------------------------------


def test_a_seed_repeats_dropout_rotations_and_gradients():
    dropout = dict.fromkeys(STILL, 0.3)
    model, ids, mask = built(**dropout).train(), tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    first, again, other = (gradients(model, ids, mask, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(3)
    with torch.no_grad():  # as the first pass over rows that learn from each other
        states = states_of(model, ids)
    torch.manual_seed(3)
    assert torch.equal(states, states_of(model, ids))
    unmended = built(mended=False, **dropout).train()
    whole = tokens(2, POSITIONS), torch.ones(2, POSITIONS, dtype=torch.int64)
    first, again = (gradients(unmended, *whole, seed) for seed in (3, 3))
    assert not all(torch.equal(first[name], again[name]) for name in first), "its own code takes seeds by now"


def test_eval_mode_answers_as_its_own_code_and_draws_nothing():
    model, theirs, ids = built(), built(mended=False), tokens(2, 30)
    model.train(), model.eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        answers = [states_of(model, ids) for _ in range(2)]
        assert torch.equal(before, torch.get_rng_state())
        expected = states_of(theirs.eval(), ids)
    assert not torch.equal(before, torch.get_rng_state()), "its own code leaves generators alone by now"
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], expected)


def test_each_training_step_has_rotations_of_its_own():
    model, ids = built(attn_layers=["lsh"]).train(), tokens(2, 30)
    assert not torch.equal(states_of(model, ids), states_of(model, ids))
    model.encoder.layers[0].attention.eval()  # frozen
    assert torch.equal(states_of(model, ids), states_of(model, ids))


@pytest.mark.parametrize(
    ("changes", "length", "same"),
    [
        ({}, CHUNK, True),
        ({"is_decoder": True}, CHUNK - 2, True),
        ({"attn_layers": ["local", "local"], "is_decoder": True}, 20, True),
        ({"attn_layers": ["local", "local"]}, 20, False),
        ({"attn_layers": ["lsh"], "is_decoder": True}, 20, False),
    ],
)
def test_only_rows_of_several_chunks_depend_on_longer_ones_beside_them(changes, length, same):
    """Chunks are a ring: the first looks at the last, which is padding beside a longer row.  A decoder's local attention hides that."""
    model = built(mended=False, **changes).eval()
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, length:] = 0
    with torch.no_grad():
        alone = states_of(model, ids[:1, :length])
        beside = states_of(model, ids, attention_mask=mask)[:1, :length]
    assert ((alone - beside).abs().max() < 1e-5) == same


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 96),
        ({"max_position_embeddings": 90}, 88),
        ({"axial_pos_shape": [4, 5]}, 16),
        ({"axial_pos_embds": False, "axial_pos_shape": [4, 5]}, 96),
        ({"lsh_attn_chunk_length": 12}, 96),
        ({"lsh_attn_chunk_length": 20}, 80),
        ({"attn_layers": ["local"], "lsh_attn_chunk_length": 20}, 96),
        ({"lsh_attn_chunk_length": 64, "max_position_embeddings": 40}, 8),
    ],
)
def test_the_longest_row_leaves_positions_for_padding(changes, positions):
    assert reformer.max_positions(config(**changes)) == positions
    model = built(**changes)
    for mode in (True, False):
        assert states_of(model.train(mode), tokens(1, positions)).shape == (1, positions, 64)
    with pytest.raises((ValueError, RuntimeError)):
        states_of(model.eval(), tokens(1, positions + 1))


@pytest.mark.parametrize("length", [12, 30, 90])
def test_buckets_are_as_many_as_the_model_takes_for_the_longest_row(length):
    decided = reformer.undecided(config(num_buckets=None, hash_seed=None), length, 7)
    model = built(num_buckets=None).eval()
    states_of(model, tokens(1, length))
    assert decided == {"hash_seed": 7, "num_buckets": model.config.num_buckets}


@pytest.mark.parametrize(
    ("changes", "longest", "decided"),
    [
        ({}, 30, {}),
        ({"attn_layers": ["local"], "hash_seed": None, "num_buckets": None}, 30, {}),
        ({"hash_seed": None}, 30, {"hash_seed": 7}),
        ({"hash_seed": None, "num_buckets": None}, CHUNK, {"hash_seed": 7}),
    ],
)
def test_only_what_a_config_leaves_open_is_decided(changes, longest, decided):
    given = config(**changes)
    before = given.to_dict()
    assert reformer.undecided(given, longest, 7) == decided
    assert given.to_dict() == before


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        ("AutoModelForCausalLM", {}, r"is_decoder: true"),
        ("AutoModelForMaskedLM", {"is_decoder": True}, r"is_decoder: false"),
        ("AutoModelForSequenceClassification", {"is_decoder": True}, r"first token.*is_decoder: false"),
        ("AutoModel", {"axial_pos_embds_dim": [8, 8]}, r"\[8, 8\] must add up to hidden_size: 32"),
        ("AutoModel", {"attn_layers": ["local", "global"]}, r"attn_layers: \['local', 'global'\]: each layer is local or lsh"),
        ("AutoModel", {"num_buckets": 3}, r"num_buckets: 3: hashing takes even numbers"),
        ("AutoModel", {"num_buckets": [4, 3]}, r"num_buckets: \[4, 3\]"),
        ("AutoModelForCausalLM", {"is_decoder": True, "lsh_num_chunks_after": 1}, r"lsh_num_chunks_after: a decoder sees no later chunks"),
    ],
)
def test_what_it_cannot_be_built_or_learn_with_is_refused(head, changes, message):
    with pytest.raises(RecipeError, match=message):
        reformer.check(config(**changes), SimpleNamespace(auto_class=head, kind="some"))


def test_layers_that_are_not_there_are_refused():
    given = config()
    given.num_hidden_layers = 6
    with pytest.raises(RecipeError, match="attn_layers has 2 entries"):
        reformer.check(given, SimpleNamespace(auto_class="AutoModel", kind="some"))


def test_its_layers_are_not_run_one_after_the_other():
    """So frozen ones are computed anew, and they are not compiled."""
    assert attention.layers_of(built()) == []


# --- runs -------------------------------------------------------------------------------------------------


def test_rows_are_continued_as_each_by_itself(capsys):
    model = built(cls=own.ReformerModelWithLMHead, is_decoder=True).eval()
    prompts = [tokens(1, length)[0] for length in (3, 11, 20)]
    expected = []
    for prompt in prompts:
        ids = prompt.tolist()
        with torch.no_grad():
            for _ in range(6):
                ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        expected.append(ids[len(prompt) :])
    ids = torch.stack([torch.nn.functional.pad(prompt, (20 - len(prompt), 0)) for prompt in prompts])
    settings = generation_config(Generation(max_new_tokens=6), [WORDS], 0)
    generated = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), generation_config=settings, streamer=None)
    assert generated[:, :20].tolist() == ids.tolist()
    assert generated[:, 20:].tolist() == expected
    assert capsys.readouterr().out == ""


def test_samples_differ_from_token_to_token():
    """Its own code would seed torch before each of them."""
    model = built(cls=own.ReformerModelWithLMHead, is_decoder=True, initializer_range=1e-4).eval()  # all tokens are alike
    settings = generation_config(Generation(max_new_tokens=30, temperature=1.0), [WORDS], 0)
    ids = tokens(1, 20)
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=None)[0, 20:]
    assert len(set(written.tolist())) > 10


def test_the_bias_that_nothing_adds_is_stored_but_does_not_learn():
    model = built(cls=own.ReformerForMaskedLM)
    assert "lm_head.bias" in model.state_dict()
    assert "lm_head.bias" not in dict(model.named_parameters())
    model.train()(input_ids=tokens(2, 30), labels=tokens(2, 30)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_embedding_is_as_wide_as_both_streams_of_states(tmp_path):
    SentenceEmbedding().lay_out(tmp_path, config(), POSITIONS)
    width = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"]
    assert states_of(built(), tokens(1, 5)).shape[-1] == width == 64


def test_a_run_decides_and_says_so(ftkit, recipe, tmp_path, verify_here):
    done = ftkit("train", recipe("reformer", "single", {"neftune": 5.0}, method={"kind": "lora", "r": 4}), "--json")
    assert done.code == 0, done.err
    assert "model.config: hash_seed: 42, num_buckets: " in done.err
    assert "its attention is its own" in done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["artifact"]["load_kwargs"]["hash_seed"] == 42
    assert manifest["layout"] == "bucketed"
