"""Models are loaded: weights that fit, types, 4 bits, gradient checkpointing."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetuning.common.errors import UserError
from finetuning.config import LoraSettings, ModelSettings
from finetuning.model import adapters, demo_model, loading, saving
from finetuning.model.loading import load_model, load_tokenizer
from finetuning.model.resolve import ensure_local, resolve_model
from tests.helpers.models import TEXTS, disturb, edit, load, logits


def lost_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "missing keys.*layers.1.mlp.up_proj"


def other_shape(folder):
    edit(folder / "config.json", intermediate_size=129)
    return "model folder"


def unknown_architecture(folder):
    edit(folder / "config.json", model_type="no_such_model")
    return "no_such_model"


def smaller_vocabulary(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:40].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=40)
    return "tokenizer is of another model"


@pytest.mark.parametrize("fault", [lost_tensor, other_shape, smaller_vocabulary])
def test_weights_that_do_not_fit_are_refused(copy, fault):
    """For training, and for questions and exports."""
    reason = fault(copy)
    with pytest.raises(UserError, match=reason):
        load(copy)
    with pytest.raises(UserError, match=reason):
        loading.load_for_inference(copy, device="cpu")


def test_an_unknown_architecture_is_refused(copy):
    reason = unknown_architecture(copy)
    with pytest.raises(UserError, match=reason):
        load(copy)


def test_a_tokenizer_without_chat_template_is_refused(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load(copy)


def test_parameter_counts(tiny):
    model, _ = load(tiny, lora_r=4)
    total = sum(p.numel() for p in model.parameters())
    shapes = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    trainable = 2 * sum(4 * (a + b) for a, b in shapes)
    assert loading.parameter_counts(model) == (trainable, total)


def test_rank_zero_trains_everything(tiny):
    model, _ = load(tiny, lora_r=0)
    trainable, total = loading.parameter_counts(model)
    assert trainable == total == sum(p.numel() for p in model.parameters())
    assert adapters.adapter_documents(model) == {}
    with pytest.raises(UserError, match="lora_r 0"):
        load(tiny, lora_r=0, quantization="4bit")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_layers_that_are_recomputed_change_no_gradient(tiny, dropout: float):
    """The first so many go through their pass twice, and all of them once memory has run out. Adapters that
    draw drop the same numbers both times."""
    plain: list[torch.Tensor] = []
    for recomputed, ran_out in ((0, False), (1, False), (2, False), (1, True)):
        model, _ = load(tiny, recomputed_layers=recomputed, lora_dropout=dropout)
        disturb(model)
        torch.manual_seed(7)
        if ran_out:
            loading.recompute_activations(model)
        calls: list[int] = []
        for i, layer in enumerate(loading.separate_layers(model)):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        ids = torch.arange(16).reshape(1, 16)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        again = 2 if ran_out else recomputed
        assert calls == [0, 1, *reversed(range(again))], "in the order of the backward pass"
        found = [p.grad for p in model.parameters() if p.requires_grad]
        plain = plain or found
        for one, other in zip(plain, found, strict=True):
            torch.testing.assert_close(one, other)


def test_layers_without_a_switch_of_their_own_are_recomputed_together():
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

    model = Own()
    assert loading.separate_layers(model) == [model]
    assert loading.separate_layers(model.layers[0]) == [model.layers[0]]


def test_the_embedded_model_takes_the_same_path(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "WARM_START_STEPS", 2)
    resolved = resolve_model("embedded", "cpu")
    resolved = ensure_local(resolved, lambda: TEXTS, tmp_path / "cache")
    tokenizer = load_tokenizer(resolved)
    model = load_model(resolved, tokenizer, ModelSettings(), LoraSettings(), device="cpu")
    saving.save_adapter(model, tokenizer, tmp_path / "final_model")
    named = adapters.adapter_documents(model)["adapter_config.json"]["base_model_name_or_path"]
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(named), tmp_path / "final_model"
    )
    torch.testing.assert_close(logits(again), logits(model))


def test_4bit_without_bitsandbytes_says_how_to_get_it(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--extra qlora"):
        load(tiny, quantization="4bit")


def adapter_gradients(model) -> list[torch.Tensor]:
    ids = torch.arange(16).reshape(1, 16)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    model.zero_grad(set_to_none=True)
    return gradients


def test_4bit(tiny):
    pytest.importorskip("bitsandbytes", reason="the optional extra qlora is not installed")
    model, _ = load(tiny, quantization="4bit", lora_r=4)
    plain, _ = load(tiny, lora_r=4)
    assert loading.parameter_counts(model) == loading.parameter_counts(plain)
    before = adapter_gradients(model)
    assert len(before) == 14 and all(g.norm() > 0 for g in before)
    difference = (logits(model).float() - logits(plain)).norm() / logits(plain).norm()
    assert 0 < difference < 0.3
    # An evaluation in between must not change what training sees.
    for gradient, again in zip(before, adapter_gradients(model), strict=True):
        torch.testing.assert_close(gradient, again)
