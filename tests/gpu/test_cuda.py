"""What only a GPU can show: kernels, precisions, and that nothing waits for the device.  scripts/test-gpu runs these."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from stopping import send_at
from torch.nn import functional as F

from ftkit import chunks, kernels, updates
from ftkit.attention import Flat
from ftkit.data.batches import collate, segments
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
from ftkit.loop import Position, fit
from ftkit.objectives.supervised import Supervised
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session
from ftkit.tasks.causal_lm import CausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 500, "pad_token_id": 0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=256),
    "mistral": transformers.MistralConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=256, sliding_window=16),
    "bert": transformers.BertConfig(**SIZES, is_decoder=True, layer_norm_eps=1e-5),
}
LENGTHS = (50, 50, 7, 129)
LONG = {"unlike": (2100, 2304, 2250), "alike": (2100, 2100)}


def rows(lengths=LENGTHS):
    rng = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return torch.randint(3, 500, mask.shape, generator=rng) * mask, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_flat_rows_give_what_they_give_alone(name, dtype):
    """float32 by scaled_dot_product_attention a segment, half precision by the kernel for rows of any length: as near to exact numbers as with padding."""
    assert_as_exact_as_padded(name, dtype, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LONG)
def test_long_rows_give_by_cudnn_what_they_give_alone(kind, dtype):
    called = assert_as_exact_as_padded("llama", dtype, LONG[kind])
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert ("aten::_scaled_dot_product_cudnn_attention" in called) is hopper, called


def assert_as_exact_as_padded(name, dtype, lengths):
    """Returns the names of the operations on flat rows that are attention."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).cuda().eval()
    exact = copy.deepcopy(model).double()
    for each in (model, exact):
        each.set_attn_implementation("eager")
    ids, mask = rows(lengths)
    ids, device_mask = ids.cuda(), mask.cuda()

    def with_gradients(model, outputs):
        model.zero_grad()
        torch.cat(outputs).float().log_softmax(-1)[:, 5].sum().backward()
        return outputs, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    def batch():
        logits = model(input_ids=ids, attention_mask=device_mask, use_cache=False).logits
        return with_gradients(model, [logits[row, :length] for row, length in enumerate(lengths)])

    def errors(found):
        """Of all outputs and of all gradients: the norm of the error beside that of what is exact."""
        for ours, theirs in zip(found, truth, strict=True):
            wrong = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(ours, theirs, strict=True)])
            yield (wrong.norm() / torch.cat([b.double().flatten() for b in theirs]).norm()).item()

    truth = with_gradients(exact, [exact(input_ids=ids[row : row + 1, :length], use_cache=False).logits[0] for row, length in enumerate(lengths)])
    usual = batch()
    with Flat(model).rows(None if mask.all() else segments(mask.numpy()).to("cuda")), torch.profiler.profile() as profile:
        found = batch()
    for error, limit in zip(errors(found), errors(usual), strict=True):
        assert error <= 1.5 * limit + 1e-6
    return {event.key for event in profile.key_averages() if "attention" in event.key}


def test_ligers_kernels_compute_what_torch_computes():
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32).cuda().train()
    ids, mask = rows()

    def gradients():
        model.zero_grad()
        model(input_ids=ids.cuda(), attention_mask=mask.cuda(), use_cache=False).logits.log_softmax(-1)[:, :, 5].sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    liger = kernels.Liger(model)
    found = gradients()
    liger.remove()
    again = gradients()
    largest = max(gradient.abs().max() for gradient in expected)
    assert 0 < max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) <= 1e-4 * largest
    assert max((a - b).abs().max() for a, b in zip(again, expected, strict=True)) <= 1e-6 * largest


@pytest.mark.parametrize("bits", [16, 4])
def test_updates_are_those_of_peft(bits, tmp_path):
    """In bfloat16 beside float32 weights that learn, as near to float32 as PEFT's own modules."""
    path, rng = tmp_path / "model", torch.Generator().manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32).save_pretrained(path)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    ids, mask = (each.cuda() for each in rows())

    def adapted(ours):
        more = {"quantization_config": nf4} if bits == 4 else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": 0}, **more)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", lora_alpha=16)).train()
        rng.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=rng).mul_(0.05).cuda()
        if ours:
            updates.add_in_place(model)
            with updates.sharing(model), torch.no_grad():
                model(input_ids=ids)
            assert sum(bool(module.followers) for module in model.modules() if isinstance(module, updates.Updated)) == 2 * model.config.num_hidden_layers
        return model

    def gradients(model, dtype):
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)[:, :, 5].sum().backward()
        return torch.cat([parameter.grad.flatten() for name, parameter in model.named_parameters() if "lora_" in name])

    exact, theirs, ours = gradients(adapted(False), torch.float32), gradients(adapted(False), torch.bfloat16), gradients(adapted(True), torch.bfloat16)
    assert 0 < (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_dropout_of_updates_loses_as_much_as_was_asked_for_and_the_same_in_both_passes():
    x = torch.ones(2000, 1000, device="cuda", requires_grad=True)
    a, b = (torch.eye(1000, device="cuda", requires_grad=True) for _ in range(2))
    (found,) = updates._Update.apply(x, torch.zeros_like(x), [None], [1.0], updates.num_lost(0.05), torch.float32, a, b)
    assert (found != 0).float().mean().item() == pytest.approx(0.95, abs=1e-3)
    assert torch.allclose(found[found != 0], torch.tensor(1 / 0.95, device="cuda"), rtol=1e-3)
    found.backward(torch.ones_like(found))
    assert torch.allclose(x.grad, found)
    assert torch.allclose(a.grad, found.sum(0).expand_as(a), rtol=1e-4)
    assert torch.allclose(b.grad, found.sum(0).expand_as(b), rtol=1e-4)


def test_the_loss_in_chunks_is_the_loss_of_all_logits(monkeypatch):
    monkeypatch.setitem(chunks.LOGITS, "cuda", 16 * 500)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32).cuda().train()
    ids, mask = rows()
    features = [Features(row[:length].tolist(), row[:length].tolist(), [1.0] * length) for row, length in zip(ids, LENGTHS, strict=True)]
    batch = collate(FeatureSet.of([[each] for each in features]), np.arange(len(LENGTHS)), 0).pin_memory().to("cuda")
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    expected = F.cross_entropy(logits[mask.bool()], batch.targets[mask.bool()], reduction="sum")
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = chunks.loss(CausalLM().items(model, batch), Supervised(), list(model.parameters()))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert all((parameter.grad - wanted[name]).abs().max() <= 1e-5 * largest for name, parameter in model.named_parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("model", "rows", "method"),
    [
        ("bert", "single", "full"),
        ("llama", "chats", "lora"),
        ("llama", "prompts", "qlora"),
        ("bert", "single", {"kind": "head", "bits": 4}),
        ("gpt2", "prompts", {"kind": "bitfit", "bits": 4}),
    ],
)
def test_the_real_command(precision, model, rows, method, recipe, ftkit, tmp_path):
    done = ftkit("train", recipe(model, rows, {"precision": precision, "steps": 6}, method=method))
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["layout"]) == ("finished", "flat")


def test_a_resumed_run_has_the_same_bits(recipe, ftkit, tmp_path):
    whole = recipe("llama", "chats", {"steps": 6, "save_every": 3}, method="full", output=str(tmp_path / "whole"))
    cut = recipe("llama", "chats", {"steps": 6, "save_every": 3}, method="full", output=str(tmp_path / "cut"), name="cut.yaml")
    assert ftkit("train", whole).code == 0
    with pytest.MonkeyPatch.context() as patch:
        send_at("ftkit.loop.train_step", 4, 15, patch.setattr)
        assert ftkit("train", cut).code == 75
    assert ftkit("train", cut, "--resume").code == 0
    files = sorted((tmp_path / "whole" / "model").glob("*.safetensors"))
    assert files
    assert all(file.read_bytes() == (tmp_path / "cut" / "model" / file.name).read_bytes() for file in files)


def test_a_step_waits_for_nothing(recipe):
    """Between two log lines the host runs ahead of the device."""
    with Reporter(None, quiet=True) as report:
        session = open_session(prepare(read(recipe("llama", "chats", {"steps": 8, "precision": "bf16"}, method="full")), report), report)
    steps = fit(session, Position())
    next(steps), next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = [next(steps), next(steps)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done[-1].settle()
    assert all(np.isfinite(step.loss) for step in done)
