"""Classifiers that read their answer at the end of a text: rows in a batch beside rows alone, as their own code answers these."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from ftkit import ends

END, PAD = 2, 1
ROWS = [[5, 6, 7, END], [8, END, 9, 10, 11, END], [12, END], [6, END, END, 7, END], [13, 14, END, 15, END]]
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()}
CONFIGS = {"t5": T5, "mt5": T5, "bart": {"d_model": 16, "init_std": 0.2} | BART, "mbart": {"d_model": 16, "init_std": 0.2} | BART}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[request.param](**CONFIGS[request.param], vocab_size=20, eos_token_id=END, pad_token_id=PAD)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def padded():
    length = max(map(len, ROWS))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in ROWS])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ROWS])


def gradients(model, logits):
    found = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def test_rows_with_ends_in_them_are_answered_as_alone(model):
    ids, mask = padded()
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS])
    with pytest.raises(ValueError, match="same number of <eos>"):  # once this fails, ends.py can go
        model(input_ids=ids, attention_mask=mask)
    ends.mend(model)
    together = model(ids, mask).logits
    torch.testing.assert_close(together, alone)
    assert len(together.unique(dim=0)) == len(ROWS)
    for found, expected in zip(gradients(model, together), gradients(model, alone), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_rows_with_one_end_go_through_its_own_code(model):
    ids = torch.tensor([[5, 6, END], [7, 8, END]])
    plain = model(input_ids=ids, output_hidden_states=True)
    ends.mend(model)
    assert torch.equal(model(input_ids=ids, output_hidden_states=True).decoder_hidden_states[-1], plain.decoder_hidden_states[-1])


def test_below_an_adapter_too(model):
    ids, mask = padded()
    learner = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["classification_head"])).eval()
    alone = torch.cat([learner(input_ids=torch.tensor([row])).logits for row in ROWS])
    ends.mend(learner)
    torch.testing.assert_close(learner(input_ids=ids, attention_mask=mask).logits, alone)
