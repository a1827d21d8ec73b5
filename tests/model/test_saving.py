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


def test_the_merged_model_gives_the_same_logits(trained, tmp_path):
    folder, expected = trained
    merged = saving.export_merged(folder, tmp_path / "merged")
    model, _ = load(merged, lora_r=0)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in n for n in load_file(merged / "model.safetensors"))


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
