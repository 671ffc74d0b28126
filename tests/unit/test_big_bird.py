"""BigBird's attention by the length of each batch, beside models that see nothing else."""

import pytest
import torch
import transformers

from ftkit import big_bird, reload

LONG, SHORT, WORDS = 41, 8, 50  # tokens; blocks take more than 14


def built(mended: bool = True, cls=transformers.BigBirdForMaskedLM, **changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": WORDS, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = cls(transformers.BigBirdConfig(**sizes, block_size=2, num_random_blocks=1, max_position_embeddings=96, sep_token_id=3, **changes))
    if mended:
        big_bird.mend(model)
    return model.eval()


def tokens(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(5, WORDS, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, length: int) -> torch.Tensor:
    return model(input_ids=tokens(length)).logits


@pytest.mark.parametrize("mended", [True, False])
def test_a_long_row_after_a_short_one_is_computed_as_before(mended):
    """Once this fails for what is not mended, its own code does so, too."""
    model = built(mended)
    before, short, after = (logits(model, length) for length in (LONG, SHORT, LONG))
    assert torch.equal(before, after) == mended
    assert torch.equal(before, logits(built(mended=False), LONG))
    assert torch.equal(short, logits(built(mended=False), SHORT))
    assert not torch.allclose(before, logits(built(attention_type="original_full"), LONG), atol=1e-3)


def test_each_row_of_a_verification_is_as_the_first():
    model = built(mended=False)
    rows = [{"input_ids": tokens(length)[0]} for length in (SHORT, LONG)]
    together, alone = reload.answers(model, rows), reload.answers(built(mended=False), rows[1:])
    assert torch.equal(together["row 1: logits"], alone["row 0: logits"])


def test_going_over_draws_nothing_and_keeps_the_weights():
    """So that a resumed run, which has not gone over yet, draws as one that was not cut off."""
    model = built(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    before = dict(model.named_parameters())
    state = torch.get_rng_state()
    for length in (SHORT, LONG, SHORT, SHORT):
        model(input_ids=tokens(length))
    assert torch.equal(state, torch.get_rng_state())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {name: id(parameter) for name, parameter in before.items()}


def test_rows_in_blocks_learn():
    model = built().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, losses = tokens(LONG, 4), []
    for _ in range(40):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.bert.attention_type == "block_sparse"
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_decoders_are_left_alone():
    """Blocks would see later tokens; with full attention they do not."""
    model = built(cls=transformers.BigBirdForCausalLM, is_decoder=True)
    logits(model, SHORT)
    logits(model, LONG)
    assert model.bert.attention_type == "original_full"


def test_encoders_of_encoder_decoders_begin_anew_too():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": WORDS}
    torch.manual_seed(0)
    config = transformers.BigBirdPegasusConfig(**sizes, encoder_ffn_dim=64, decoder_ffn_dim=64, block_size=2, num_random_blocks=1, init_std=0.1)
    model = transformers.BigBirdPegasusForConditionalGeneration(config).eval()
    big_bird.mend(model)
    with torch.no_grad():
        before, _, after = (model.get_encoder()(input_ids=tokens(length)).last_hidden_state for length in (LONG, SHORT, LONG))
    assert torch.equal(before, after)
