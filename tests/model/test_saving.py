"""What is saved loads in peft and transformers, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetuning.model import saving
from finetuning.model.loading import load_tokenizer
from finetuning.model.merging import merged_model
from finetuning.model.resolve import resolve_model
from tests.helpers.models import load, logits


def test_peft_loads_what_we_save(trained, tiny):
    folder, expected = trained
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == tiny.resolve()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder)
    torch.testing.assert_close(logits(model), expected)
    assert load_tokenizer(resolve_model(str(tiny), "cpu")).get_vocab()
    assert (folder / "tokenizer.json").is_file()


def test_saving_again_replaces_and_leaves_nothing_behind(tiny, tmp_path):
    model, tokenizer = load(tiny)
    for _ in range(2):
        (tmp_path / "final_model").mkdir(exist_ok=True)
        (tmp_path / "final_model" / "old.txt").write_text("old")
        saving.save_adapter(model, tokenizer, tmp_path / "final_model")
    assert [p.name for p in tmp_path.iterdir()] == ["final_model"]
    assert not (tmp_path / "final_model" / "old.txt").exists()


def test_full_fine_tuning_saves_a_whole_model(tiny, tmp_path):
    model, tokenizer = load(tiny, lora_r=0)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    saving.save_adapter(model, tokenizer, tmp_path / "out")
    again, _ = load(tmp_path / "out", lora_r=0)
    assert torch.equal(logits(again), logits(model))


def saved_merged(adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    saving.save_merged(merged_model(adapter), folder, "fp32")
    return folder


def test_the_merged_model_gives_the_same_logits(trained, tmp_path):
    folder, expected = trained
    merged = saved_merged(folder, tmp_path / "merged")
    model, _ = load(merged, lora_r=0)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in n for n in load_file(merged / "model.safetensors"))


def ends_of(folder: Path) -> list:
    """What a folder names as the end of a turn: generation, model and tokenizer."""
    documents = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("generation_config", "config", "tokenizer_config")
        if (folder / f"{name}.json").is_file()
    }
    return [record.get("eos_token_id", record.get("eos_token")) for record in documents.values()]


@pytest.fixture
def base_model(tiny, tmp_path) -> Path:
    """The tiny model with the configuration of a base model: its end of text is not the end of a turn."""
    model, tokenizer = load(tiny, lora_r=0)
    model.config.eos_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_model_stops_where_training_taught_it_to(base_model, tmp_path):
    """Merged or trained whole; an adapter's tokenizer, too. The tokenizer in use stays as it is."""
    model, tokenizer = load(base_model)
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends_of(base_model) == [pad, pad, tokenizer.pad_token] and pad != end
    saving.save_adapter(model, tokenizer, tmp_path / "adapter")
    assert ends_of(tmp_path / "adapter") == ["<|im_end|>"]
    assert tokenizer.eos_token == tokenizer.pad_token
    merged = saved_merged(tmp_path / "adapter", tmp_path / "merged")
    assert ends_of(merged) == [[end, pad], [end, pad], "<|im_end|>"]
    whole, tokenizer = load(base_model, lora_r=0)
    saving.save_adapter(whole, tokenizer, tmp_path / "whole")
    assert ends_of(tmp_path / "whole") == [[end, pad], [end, pad], "<|im_end|>"]


def test_a_chat_model_keeps_the_ends_that_it_has(base_model, tmp_path):
    model, tokenizer = load(base_model, lora_r=0)
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.config.eos_token_id, model.generation_config.eos_token_id = end, [end, pad]
    saving.save_adapter(model, tokenizer, tmp_path / "whole")
    assert ends_of(tmp_path / "whole") == [[end, pad], end, "<|im_end|>"]


@pytest.mark.parametrize(
    "fault",
    [
        SafetensorError("I/O error: No space left"),
        Exception("No space left"),
        OSError(28, "No space left"),
    ],
)
def test_a_full_disk_is_an_oserror_and_the_earlier_folder_stays(tmp_path, fault):
    target = tmp_path / "final_model"
    target.mkdir()
    (target / "weights").write_text("of before")

    def full(path):
        raise fault

    with pytest.raises(OSError, match="No space left"):
        saving._save_folder(target, None, full)
    assert (target / "weights").read_text() == "of before"
    assert [p.name for p in tmp_path.iterdir()] == ["final_model"]
    with pytest.raises(TypeError):  # our own mistake is no full disk
        saving._save_folder(target, None, lambda: None)
