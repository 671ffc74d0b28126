"""Updates added in place, with dropout that is applied again in the backward pass: PEFT's numbers, without its copies."""

from types import SimpleNamespace

import bitsandbytes
import peft
import pytest
import torch
import transformers
from torch.nn import functional

from ftkit import updates
from ftkit.methods.lora import LoRA
from ftkit.model import Base
from ftkit.sources import Source
from ftkit.tasks.causal_lm import CausalLM
from ftkit.updates import _Update

LLAMA = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "gpt2": transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
IDS = torch.arange(3 * 40).view(3, 40) % 97


def adapted(name: str, shared: bool = True, **fields) -> torch.nn.Module:
    """With updates that are not zero; `shared`: layers of one input are computed together."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
    adapter = LoRA(**fields).apply(Base(model, None, Source("somewhere"), CausalLM(), [], set()))
    for key, parameter in adapter.named_parameters():
        if "lora_B" in key:  # they start at zero, and no gradient would reach what is before them
            torch.nn.init.normal_(parameter)
    if shared:
        with updates.sharing(adapter), torch.no_grad():
            adapter(input_ids=IDS)
    return adapter.train()


def stepped(model: torch.nn.Module, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes of activations that were kept for them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), gradients, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    scale = max(gradient.abs().max() for gradient in expected.values())
    return max((found[key] - gradient).abs().max().item() for key, gradient in expected.items()) / scale.item()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_without_dropout_the_gradients_are_those_of_peft(name, shared):
    ranks = {{"llama": "k_proj", "gpt2": "c_fc"}[name]: 3}
    ours, theirs = (adapted(name, shared, dropout=0.0, rank_pattern=ranks, recompute_dropout=recompute).double() for recompute in (True, False))
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    (loss, gradients, _), (expected_loss, expected, _) = stepped(ours), stepped(theirs)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert off(gradients, expected) < 1e-10


class ByAutograd:
    """An update by autograd alone, with the bits that ours draws."""

    @staticmethod
    def apply(x, result, bases, scales, lost, dtype, *weights):
        kept = updates.kept(updates.drawn(x), lost, x.dtype) * (updates.LEVELS / (updates.LEVELS - lost))
        layers = zip(bases, scales, weights[: len(bases)], weights[len(bases) :], strict=True)
        made = [functional.linear(functional.linear(x * kept, a), b) * scale for _, scale, a, b in layers]
        return [(functional.linear(x, base.weight, base.bias) if base else result) + more for base, more in zip(bases, made, strict=True)]


def inputs(model: torch.nn.Module, shared: bool = False) -> int:
    """How many numbers a token is, in all modules with updates; those that `shared` leaves out get the input of another one."""
    layers = [module for module in model.modules() if isinstance(module, updates.Updated)]
    left_out = {follower for layer in layers for follower in layer.followers} if shared else set()
    return sum(layer.in_features for layer in layers if layer not in left_out)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk", [1 << 18, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_with_dropout_the_gradients_are_those_of_the_masks_it_drew_and_less_is_kept(name, chunk, shared, monkeypatch):
    monkeypatch.setattr(updates, "CHUNK", chunk)
    ours, theirs = (adapted(name, shared, dropout=0.3, recompute_dropout=recompute).double() for recompute in (True, False))
    (loss, gradients, kept), (*_, kept_there) = stepped(ours), stepped(theirs)
    with monkeypatch.context() as patch:
        patch.setattr(updates, "_Update", ByAutograd)
        expected_loss, expected, _ = stepped(ours)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert off(gradients, expected) < 1e-10
    assert off(gradients, stepped(ours, seed=2)[1]) > 0.01
    # a mask of eight bytes an element and a copy became one of one byte and the input itself, which some of them share
    assert kept_there - kept >= (inputs(ours) * (8 + 8 - 8) - inputs(ours, shared)) * IDS.numel()


def layer(p: float, features: int = 1000) -> torch.nn.Module:
    """A linear module with an update, both of which give what they get."""
    config = peft.LoraConfig(r=features, lora_alpha=features, lora_dropout=p, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(features, features, bias=False)), config)
    updates.add_in_place(model)
    found = model.base_model.model[0]
    for weight in (found.base_layer.weight, found.lora_A["default"].weight, found.lora_B["default"].weight):
        torch.nn.init.eye_(weight)
    return found.train()


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_as_much_is_dropped_out_as_was_asked_for(p):
    module = layer(p)
    torch.manual_seed(0)
    once, again = ((module(torch.ones(600, 1000)) - 1).detach() for _ in range(2))
    lost = (once == 0).float()
    assert lost.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 600_000) ** 0.5)
    assert lost.mean(0).std().item() == pytest.approx((p * (1 - p) / 600) ** 0.5, rel=0.2)  # in each column alike
    assert lost.mean(1).std().item() == pytest.approx((p * (1 - p) / 1000) ** 0.5, rel=0.2)
    assert ((once == 0) & (again == 0)).float().mean().item() == pytest.approx(p * p, rel=0.05)
    assert once.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert torch.equal(module.eval()(torch.ones(2, 1000)), 2 * torch.ones(2, 1000))


@pytest.mark.parametrize("arithmetic", ["autocast", "base in bfloat16"])
def test_inputs_in_few_bits_are_not_copied(arithmetic):
    """PEFT casts them to float32 for each update and keeps that."""
    models = [adapted("llama", dropout=0.3, recompute_dropout=recompute) for recompute in (True, False)]
    found = []
    for model in models:
        for key, parameter in model.named_parameters():
            if "lora_" not in key:
                parameter.data = parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
            found.append(stepped(model))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=0.1)
    assert found[1][2] - found[0][2] >= inputs(models[0]) * IDS.numel() * (4 + 2 - 2 - 1)  # mask and copy, input and mask


def test_gradient_checkpointing_draws_the_same():
    plain, checkpointed = adapted("llama", dropout=0.3), adapted("llama", dropout=0.3)
    checkpointed.enable_input_require_grads()
    checkpointed.base_model.model.model.gradient_checkpointing_enable({"use_reentrant": False})
    (loss, gradients, _), (expected_loss, expected, _) = stepped(checkpointed), stepped(plain)
    assert loss == expected_loss
    assert off(gradients, expected) < 1e-6


def test_what_dora_takes_from_the_dropped_out_input_stays():
    (loss, gradients, _), (expected_loss, expected, _) = (stepped(adapted("llama", dora=True, recompute_dropout=recompute)) for recompute in (True, False))
    assert torch.equal(loss, expected_loss)
    assert off(gradients, expected) == 0


def test_a_lora_of_all_layers_keeps_less_than_full_fine_tuning():
    torch.manual_seed(0)
    *_, kept_in_full = stepped(transformers.AutoModelForCausalLM.from_config(MODELS["llama"]).train())
    *_, kept = stepped(adapted("llama"))
    assert kept < kept_in_full


def names(model: torch.nn.Module) -> dict[str, list[str]]:
    """The followers of the layers that have any, by the ends of their names, in one layer of the model."""
    ends = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return {ends[module]: [ends[follower] for follower in module.followers] for module in model.modules() if getattr(module, "followers", ())}


def test_layers_of_one_input_are_those_that_got_it():
    assert names(adapted("llama")) == {"q_proj": ["k_proj", "v_proj"], "gate_proj": ["up_proj"]}
    assert names(adapted("llama", shared=False)) == names(adapted("gpt2")) == {}


def test_a_follower_that_cannot_be_computed_ahead_is_computed_when_it_is_called(monkeypatch):
    """One with another adapter at work, as when it is looked at alone; and one that gets something else for once."""
    model = adapted("llama", dropout=0.3)
    attention = model.base_model.model.model.layers[0].self_attn
    together = []
    monkeypatch.setattr(
        updates, "_Update", SimpleNamespace(apply=lambda x, result, bases, *rest: together.append(len(bases)) or _Update.apply(x, result, bases, *rest))
    )
    x, y = torch.randn(2, 1, 3, 64)
    for layer, given in ((attention.q_proj, x), (attention.k_proj, x), (attention.v_proj, y)):
        layer(given)
    assert together == [3, 1]
    together.clear()
    attention.v_proj.enable_adapters(False)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer(x)
    assert together == [1, 1]
    assert torch.equal(attention.v_proj(x), attention.v_proj.base_layer(x))


def test_more_adapters_than_one_are_pefts_own():
    module = layer(0.0, features=8)
    module.update_layer("second", 8, lora_alpha=16, config=peft.LoraConfig(init_lora_weights=False))
    module.set_adapter(["default", "second"])
    x = torch.randn(3, 8)
    second = module.lora_B["second"](module.lora_A["second"](x)) * 2
    assert torch.allclose(module(x), 2 * x + second, atol=1e-6)
    module.enable_adapters(False)
    assert torch.equal(module(x), x)


def test_who_listens_to_a_base_keeps_what_it_gave():
    module = layer(0.0, features=8)
    x = torch.randn(2, 3, 8)
    alone, made = module(x), []
    module.base_layer.register_forward_hook(lambda base, args, output: made.append(output))
    assert torch.equal(module(x), alone)
    assert torch.equal(made[0], module.base_layer(x))
    assert torch.allclose(alone, 2 * made[0])


@pytest.mark.parametrize("bias", [False, True])
def test_a_base_of_four_bits_gives_what_bitsandbytes_makes_of_it(bias):
    """On a GPU its matrix is given back here; on a CPU, where bitsandbytes packs it in another way at times, by its own module."""
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(64, 32, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.weight = bitsandbytes.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4", compress_statistics=True)
    base = base.to("cpu").requires_grad_(False)
    assert updates._frozen(base, torch.bfloat16) is None
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 64), (8, 64), (32, 8)))
    whole = updates.Frozen(base.weight, base.bias, base.weight.quant_state)
    found = []
    for given, frozen in ((base(x.bfloat16()), None), (None, whole)):
        (made,) = updates._Update.apply(x.bfloat16(), given, [frozen], [2.0], 0, torch.bfloat16, a, b)
        gradients = torch.autograd.grad(made.float().square().sum(), (x, a, b))
        found.append([made.detach().float(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
