"""A merged folder appears only when its logits are those of base and adapter apart.

uv run pytest tests/runs/test_export.py
"""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from export import check, main
from finetuning.common.errors import RunStopped
from finetuning.common.terminal import Terminal
from finetuning.model.loading import load_for_inference
from finetuning.model.merging import Agreement, MergedModel, merged_model, model_below

# What transformers and vLLM read.
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def test_the_folder_is_a_plain_model_that_says_the_same(tmp_path, adapter, capsys):
    output = tmp_path / "new" / "merged"
    assert main(["--adapter", str(adapter), "--output", str(output), "--device", "cpu"]) == 0
    assert "largest difference of a logit" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == ["merged"], "no staging is left"
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["use_cache"] is True
    tokenizer = AutoTokenizer.from_pretrained(output)
    merged = AutoModelForCausalLM.from_pretrained(output)
    apart, own = load_for_inference(adapter, device="cpu")
    assert tokenizer.chat_template == own.chat_template
    ids = tokenizer("SM4的分组长度", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (merged(ids).logits - apart(input_ids=ids).logits).abs().max()
    assert difference < 1e-4


def test_sixteen_bits_pass_with_their_own_tolerance(tmp_path, adapter):
    output = tmp_path / "merged"
    options = ["--adapter", str(adapter), "--output", str(output), "--precision", "bf16"]
    assert main([*options, "--device", "cpu"]) == 0
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_a_merge_that_is_wrong_leaves_nothing(tmp_path, adapter, monkeypatch, capsys):
    def base_only(folder: Path, base_model: str) -> MergedModel:
        """As if the adapter had been forgotten."""
        base = model_below(folder, base_model)
        return merged_model(base.path)

    monkeypatch.setattr(export, "merged_model", base_only)
    output = tmp_path / "merged"
    assert main(["--adapter", str(adapter), "--output", str(output), "--device", "cpu"]) == 3
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rounding_that_eats_the_adapter_is_warned_about(capsys):
    check(Agreement(difference=0.02, effect=0.03), 0.25, Terminal())
    assert "--precision fp32" in capsys.readouterr().err
    check(Agreement(difference=0.02, effect=3.0), 0.25, Terminal())
    check(Agreement(difference=0.0, effect=0.0), 0.25, Terminal())
    assert not capsys.readouterr().err


@pytest.mark.parametrize("difference", [0.3, math.nan, math.inf])
def test_a_difference_above_the_tolerance_stops(difference):
    with pytest.raises(RunStopped, match="more than"):
        check(Agreement(difference, effect=0.5), 0.25, Terminal())


def test_an_adapter_that_is_missing_stops():
    with pytest.raises(RunStopped):
        check(Agreement(difference=8.0, effect=8.0), 0.25, Terminal())


def test_bad_input_is_one_clear_line(tmp_path, adapter, tiny_model, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    output = ["--output", str(tmp_path / "merged")]
    cases = {
        "exists": ["--adapter", str(adapter), "--output", str(full)],
        "train first": ["--output-dir", str(tmp_path), *output],
        "whole model already": ["--adapter", str(tiny_model), *output],
    }
    for expected, arguments in cases.items():
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert expected in said and "Traceback" not in said
    assert (full / "file").read_text() == "mine" and not (tmp_path / "merged").exists()
