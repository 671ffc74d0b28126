"""Dropout that is drawn again in the backward pass: PEFT's own numbers to the bit, without its copies."""

import pytest
import torch
import transformers

from ftkit.methods.lora import LoRA
from ftkit.model import Base, Source
from ftkit.tasks.causal_lm import CausalLM

LLAMA = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "gpt2": transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
IDS = torch.arange(3 * 40).view(3, 40) % 97


def adapted(name: str, **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
    method = LoRA(dropout=0.3, **fields)
    adapter = method.apply(Base(model, None, Source("somewhere"), CausalLM(), [], set()))
    for key, parameter in adapter.named_parameters():
        if "lora_B" in key:  # they start at zero, and no gradient would reach what is before them
            torch.nn.init.normal_(parameter)
    return adapter.train()


def stepped(model: torch.nn.Module, checkpointing: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes of activations that were kept for them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), gradients, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_peft_to_the_bit_and_take_less_memory(name, checkpointing):
    ours, theirs = adapted(name), adapted(name, recompute_dropout=False)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    (loss, gradients, kept), (expected_loss, expected, kept_there) = stepped(ours, checkpointing), stepped(theirs, checkpointing)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[key], gradient) for key, gradient in expected.items())
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    if not checkpointing:
        inputs = sum(module.in_features for key, module in ours.named_modules() if key.endswith("lora_A.default"))
        assert kept_there - kept >= inputs * IDS.numel() * 4  # a mask and a copy became the input itself, which some of them share


def test_no_dropout_in_evaluation():
    model = adapted("llama").eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert torch.equal(model(input_ids=IDS).logits, adapted("llama", recompute_dropout=False).eval()(input_ids=IDS).logits)


def test_what_dora_takes_from_the_dropped_out_input_stays():
    (loss, gradients, _), (expected_loss, expected, _) = stepped(adapted("llama", dora=True)), stepped(adapted("llama", dora=True, recompute_dropout=False))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[key], gradient) for key, gradient in expected.items())


def test_a_lora_of_full_weights_keeps_less_than_full_fine_tuning():
    torch.manual_seed(0)
    *_, kept_in_full = stepped(transformers.AutoModelForCausalLM.from_config(MODELS["llama"]).train())
    *_, kept = stepped(adapted("llama"))
    assert kept < kept_in_full
