"""Virtual tokens are what embeddings in front of a row are, wherever a row lies in a batch."""

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch.nn import functional as F

from ftkit import model as models
from ftkit import prompts
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
from ftkit.errors import RecipeError
from ftkit.loop import Trainee
from ftkit.methods.modules import embedding_of
from ftkit.methods.p_tuning import PTuning
from ftkit.methods.prompt import PromptTuning
from ftkit.model import Base, head_of
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Generation, Model
from ftkit.reparametrised import LSTM, MLP
from ftkit.tasks.causal_lm import CausalLM, _generate
from ftkit.tasks.text_classification import TextClassification

N = 3
ROWS = [[5, 9, 11, 7, 30, 2], [8, 6, 40], [12, 13, 14, 15]]


def base_of(checkpoint: str, task) -> Base:
    spec = Model(name=checkpoint)
    source = models.locate(spec)
    tokenizer = models.load_tokenizer(spec, source, None, ())
    return models.load(spec, source, models.load_config(spec, source), tokenizer, task, PromptTuning(), torch.float32, 0, torch.device("cpu"))


@pytest.fixture
def llama(checkpoint):
    """A language model and the same with a prompt of N tokens, drawn wide so that it matters."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
    prompted = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(prompts.add(prompted, N).weight, std=0.5)
    return plain, prompted


def values_of(prompted) -> torch.Tensor:
    return prompts.of(prompted).prompt.weight


def test_a_call_answers_as_with_the_embeddings_in_front(llama):
    plain, prompted = llama
    ids = torch.tensor([ROWS[0]])
    embeds = torch.cat((values_of(prompted)[None], plain.get_input_embeddings()(ids)), 1)
    expected = plain(inputs_embeds=embeds).logits
    torch.testing.assert_close(prompted(input_ids=ids).logits, expected)
    torch.testing.assert_close(prompted(ids).logits, expected)
    assert not torch.allclose(expected[:, N:], plain(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(llama, side):
    _, prompted = llama
    longest = max(map(len, ROWS))

    def padded(row: list[int], value: int) -> list[int]:
        filler = [value] * (longest - len(row))
        return filler + row if side == "left" else row + filler

    ids = torch.tensor([padded(row, 0) for row in ROWS])
    mask = torch.tensor([padded([1] * len(row), 0) for row in ROWS])
    extended = prompts.of(prompted)._with_virtual(ids, {"attention_mask": mask})
    positions = (extended["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with prompts.of(prompted).given():
        together = prompted(**extended, position_ids=positions).logits
    for index, row in enumerate(ROWS):
        alone = prompted(input_ids=torch.tensor([row])).logits[0]
        found = together[index][extended["attention_mask"][index].bool()]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_given_positions_are_refused(llama):
    with pytest.raises(ValueError, match="position_ids: positions are counted with the virtual tokens"):
        llama[1](input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[0]]))


def test_rows_generate_together_what_they_generate_alone_and_with_cache_what_they_do_without(llama, tokenizers):
    plain, prompted = llama
    generation, tokenizer = Generation(max_new_tokens=5), tokenizers["bpe"]
    together = _generate(prompted, ROWS, [tokenizer.eos_token_id], tokenizer, generation)
    for row, found in zip(ROWS, together, strict=True):
        assert _generate(prompted, [row], [tokenizer.eos_token_id], tokenizer, generation)[0] == found
        assert all(token < plain.config.vocab_size for token in found)
    ids = ROWS[0]
    for token in together[0]:
        assert prompted(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
        ids = [*ids, token]
    beams = prompted.generate(input_ids=torch.tensor([ROWS[0]]), num_beams=2, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
    assert beams.sequences[0, : len(ROWS[0])].tolist() == ROWS[0]


def test_it_may_be_absent(llama):
    plain, prompted = llama
    ids = torch.tensor([ROWS[0]])
    virtual, expected = prompts.of(prompted), prompted(input_ids=ids).logits
    with prompts.absent(prompted):
        assert prompts.of(prompted) is None
        assert torch.equal(prompted(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert (
            prompted.generate(input_ids=ids, max_new_tokens=4, do_sample=False).tolist()
            == plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False).tolist()
        )
    assert prompts.of(prompted) is virtual
    assert torch.equal(prompted(input_ids=ids).logits, expected)


def test_a_batch_becomes_longer_in_front_and_supervises_the_same(llama):
    virtual = prompts.of(llama[1])
    features = FeatureSet.of([[Features(row, [*row[1:], 3], [0.0, *[1.0] * (len(row) - 1)])] for row in ROWS])
    batch = collate(features, torch.arange(3).numpy(), 0)
    longer = virtual.extended(batch)
    vocabulary = llama[0].config.vocab_size
    for old, new in ((batch.input_ids, longer.input_ids), (batch.targets, longer.targets), (batch.attention_mask, longer.attention_mask)):
        assert torch.equal(new[:, N:], old)
    assert longer.input_ids[:, :N].tolist() == [[vocabulary, vocabulary + 1, vocabulary + 2]] * 3
    assert torch.equal(longer.targets.flatten()[longer.supervised], batch.targets.flatten()[batch.supervised])
    assert torch.equal(longer.weights.flatten()[longer.supervised], batch.weights.flatten()[batch.supervised])
    assert longer.segments.lengths == [length + N for length in batch.segments.lengths]
    assert torch.equal(longer.segments.gather(longer.input_ids)[0], longer.input_ids[longer.attention_mask.bool()])


def test_targets_of_whole_rows_stay_where_they_are(llama):
    """Labels, or the places of an answer: two numbers a row are no two positions."""
    batch = collate(FeatureSet.of([[Features(ids, [1, 2], [1.0])] for ids in ROWS]), np.arange(3), 0)
    longer = prompts.of(llama[1]).extended(batch)
    assert longer.input_ids.shape[1] == batch.input_ids.shape[1] + N
    assert torch.equal(longer.targets, batch.targets)
    assert torch.equal(longer.weights, batch.weights)
    assert torch.equal(longer.supervised, batch.supervised)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_penalty_on_tokens_that_are_not_in_the_prompt_knows_those_of_the_vocabulary_only(llama, beams):
    _, prompted = llama
    ids = torch.tensor([ROWS[1], ROWS[2][:3]])
    settings = {"max_new_tokens": 2, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    made = prompted.generate(ids, encoder_repetition_penalty=1.5, output_logits=True, output_scores=True, return_dict_in_generate=True, **settings)
    logits = made.logits[0].log_softmax(-1) if beams > 1 else made.logits[0]
    expected = transformers.EncoderRepetitionPenaltyLogitsProcessor(1.5, ids.repeat_interleave(beams, 0))(None, logits)
    changed = (expected != logits).sum(1)
    assert changed.tolist() == [3] * 2 * beams
    torch.testing.assert_close((made.scores[0] != logits).sum(1), changed)
    torch.testing.assert_close(prompted.generate(ids[:1], encoder_repetition_penalty=1.5, **settings), made.sequences[:1])


def test_generating_infers_padding_as_transformers_does(llama):
    plain, prompted = llama
    for model in llama:
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    row, n = torch.tensor([ROWS[2]]), 5
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), row), 1)
    for model in llama:
        assert torch.equal(model.generate(padded, max_new_tokens=n)[:, -n:], model.generate(row, max_new_tokens=n)[:, -n:])
    assert len(prompted.generate(row, max_length=len(ROWS[2]) + 2, min_length=len(ROWS[2]) + 2)[0]) == len(ROWS[2]) + 2
    assert plain.config.vocab_size == prompts.of(prompted).vocabulary


def test_embeddings_in_place_of_tokens_are_refused(llama):
    embeds = torch.randn(1, 4, 32)
    for call in (llama[1], llama[1].generate):
        with pytest.raises(ValueError, match="inputs_embeds: the virtual tokens of the prompt are put in front of tokens only"):
            call(inputs_embeds=embeds)


def test_labels_move_with_the_tokens(llama):
    plain, prompted = llama
    ids = torch.tensor([ROWS[0]])
    embeds = torch.cat((values_of(prompted)[None], plain.get_input_embeddings()(ids)), 1)
    expected = plain(inputs_embeds=embeds, labels=torch.cat((torch.full((1, N), -100), ids), 1)).loss
    torch.testing.assert_close(prompted(input_ids=ids, labels=ids).loss, expected)


def test_a_batch_without_supervised_tokens_is_judged(llama):
    """As on a process that has no rows."""
    features = FeatureSet.of([[Features(row, [*row[1:], 3], [1.0] * len(row))] for row in ROWS])
    trainee = Trainee(llama[1], llama[1].model, CausalLM(), Supervised())
    empty = collate(features, torch.zeros(0, dtype=torch.int64).numpy(), 0)
    assert trainee(empty).item() == 0
    seen = []
    trainee(empty, lambda parts: seen.extend(len(part.targets) for part in parts))
    assert seen == [0]


def test_rows_with_several_labels_keep_their_targets(checkpoint):
    """Of which a row has a list, as of tokens."""
    task = TextClassification(problem="multi-label", labels=["a", "b"])
    base = base_of(checkpoint("bert"), task)
    learner = PromptTuning(num_virtual_tokens=N).apply(base)
    features = FeatureSet.of([[Features(row, [1.0, 0.0], [1.0])] for row in ROWS])
    seen = []
    Trainee(learner, base.inner(), task, Supervised())(collate(features, np.arange(len(ROWS)), 0), seen.extend)
    assert seen[0].targets.tolist() == [[1.0, 0.0]] * len(ROWS)
    assert seen[0].weights.tolist() == [1.0] * len(ROWS)


def embedded(base: Base, ids: list[int]) -> torch.Tensor:
    return embedding_of(base.model).weight[ids]


def learned(base: Base, method) -> torch.Tensor:
    return prompts.of(method.apply(base)).prompt()


class TestFirstValues:
    def test_random_ones_are_uniform(self, checkpoint):
        torch.manual_seed(0)
        values = learned(base_of(checkpoint("llama"), CausalLM()), PromptTuning(init="random", num_virtual_tokens=100))
        assert values.abs().max() <= 0.5
        assert values.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)

    def test_those_of_the_vocabulary_are_embeddings_of_words(self, checkpoint):
        base = base_of(checkpoint("bert"), TextClassification(labels=["garden", "harbour"]))
        values = learned(base, PromptTuning(num_virtual_tokens=8))
        places = torch.cdist(values, embedding_of(base.model).weight).argmin(1)
        assert torch.equal(values, embedded(base, places.tolist()))
        assert all(sum(map(str.isalpha, token)) > 1 and token[0] != "[" for token in base.tokenizer.convert_ids_to_tokens(places.tolist()))

    def test_those_of_a_text_are_repeated_or_cut(self, checkpoint):
        base = base_of(checkpoint("llama"), CausalLM())
        ids = base.tokenizer("boats near the", add_special_tokens=False)["input_ids"]
        values = learned(base, PromptTuning(init="text", init_text="boats near the", num_virtual_tokens=len(ids) + 1))
        assert torch.equal(values, embedded(base, [*ids, ids[0]]))

    def test_those_of_labels_come_first(self, checkpoint):
        base = base_of(checkpoint("bert"), TextClassification(labels=["garden", "harbour"]))
        values = learned(base, PromptTuning(init="labels", num_virtual_tokens=4))
        for place, name in enumerate(("garden", "harbour")):
            ids = base.tokenizer(name, add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(values[place], embedded(base, ids).mean(0))

    def test_there_must_be_labels_and_room_for_them(self, checkpoint):
        with pytest.raises(RecipeError, match=r"method.init: labels: task causal-lm has no classes"):
            PromptTuning(init="labels").apply(base_of(checkpoint("llama"), CausalLM()))
        many = TextClassification(labels=[f"class {number}" for number in range(5)])
        with pytest.raises(RecipeError, match=r"there are 5, more than method.num_virtual_tokens: 4; raise it"):
            PromptTuning(init="labels", num_virtual_tokens=4).apply(base_of(checkpoint("bert"), many))

    @pytest.mark.parametrize(
        ("make", "settings", "message"),
        [
            (PromptTuning, {"init": "text"}, "init: text needs init_text"),
            (PromptTuning, {"init_text": "boats"}, "init_text has no effect with init: vocabulary"),
            (PTuning, {"encoder_dropout": 0.1}, "encoder_dropout has no effect with encoder: mlp"),
        ],
    )
    def test_options_without_effect_are_refused(self, make, settings, message):
        with pytest.raises(ValidationError, match=message):
            make(**settings)


class TestEncoders:
    def test_the_mlp_is_that_of_peft(self):
        """peft.PromptEncoder with the same weights."""
        from peft import PromptEncoder, PromptEncoderConfig

        config = PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=8, encoder_hidden_size=6, num_transformer_submodules=1, num_attention_heads=1, num_layers=1
        )
        theirs = PromptEncoder(config)
        prompt = prompts.Prompt(5, 8, MLP(8, 6))
        prompt.encoder.load_state_dict(theirs.mlp_head.state_dict())
        prompt.weight.data = theirs.embedding.weight.data
        assert torch.equal(prompt(), theirs(torch.arange(5)))

    def test_the_lstm_is_that_of_peft(self):
        from peft import PromptEncoder, PromptEncoderConfig

        config = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=5,
            token_dim=8,
            encoder_hidden_size=6,
            encoder_reparameterization_type="LSTM",
            num_transformer_submodules=1,
            num_attention_heads=1,
            num_layers=1,
        )
        theirs = PromptEncoder(config)
        prompt = prompts.Prompt(5, 8, LSTM(8, 6, 0.0))
        prompt.encoder.lstm.load_state_dict(theirs.lstm_head.state_dict())
        prompt.encoder.mlp.load_state_dict(theirs.mlp_head.state_dict())
        prompt.weight.data = theirs.embedding.weight.data
        torch.testing.assert_close(prompt(), theirs(torch.arange(5)[None])[0])

    @pytest.mark.parametrize("encoder", ["mlp", "lstm"])
    def test_folding_keeps_what_it_gives(self, checkpoint, encoder):
        model = PTuning(num_virtual_tokens=4, encoder=encoder).apply(base_of(checkpoint("llama"), CausalLM()))
        before = model(input_ids=torch.tensor([ROWS[0]])).logits
        prompts.of(model).prompt.fold()
        torch.testing.assert_close(model(input_ids=torch.tensor([ROWS[0]])).logits, before)  # LSTMs without gradients have other kernels
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["model.embed_tokens.prompt.weight"]


def test_gradients_are_those_of_embeddings_in_front(llama):
    plain, prompted = llama
    for parameter in prompted.parameters():
        parameter.requires_grad_(False)
    values_of(prompted).requires_grad_(True)
    ids, reference = torch.tensor([ROWS[0]]), values_of(prompted).detach().clone().requires_grad_(True)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[0, N:-1], ids[0, 1:])

    loss(prompted(input_ids=ids).logits).backward()
    loss(plain(inputs_embeds=torch.cat((reference[None], plain.get_input_embeddings()(ids)), 1)).logits).backward()
    torch.testing.assert_close(values_of(prompted).grad, reference.grad)


def test_heads_of_encoder_decoders_see_their_end_of_text():
    """BART's classifier reads the end of text, which it finds by its id: PEFT cannot give it a prompt."""
    config = transformers.BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    torch.manual_seed(0)
    model = transformers.BartForSequenceClassification(config).eval()
    assert "classification_head" in head_of(model)
    before = model(input_ids=torch.tensor([[5, 6, 2]])).logits
    torch.nn.init.normal_(prompts.add(model, N).weight)
    after = model(input_ids=torch.tensor([[5, 6, 2]])).logits
    assert not torch.allclose(after, before)
    padded = model(input_ids=torch.tensor([[5, 6, 2, 1], [7, 8, 9, 2]]), attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])).logits
    torch.testing.assert_close(padded[:1], after)
