"""What people bring along: hub names, adapters of other tools, other names for settings, full
fine-tuning, 4 bits.

uv run pytest -m "not long" tests/model/test_compatibility.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import fake_hub
from tests.runs.test_run import SCRIPT, interrupt_in_step, strict_json

pytestmark = pytest.mark.slow

# -----------------------------------------------------------------------------
# Names on a hub

HUB_NAME, TOKEN = "somebody/Tiny-Thinking", "hf_" + 20 * "k"


def test_a_hub_name_is_downloaded_from_the_endpoint(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, cache_dir: Path
):
    """With the token of its owner; afterwards without a network. The adapter names what all can find."""
    options = {
        "--model-name": HUB_NAME,
        "--data-path": str(tiny_data),
        "--output-dir": str(tmp_path / "out"),
        "--cache-dir": str(cache_dir),
        "--max-steps": "1",
        "--max-seq-length": "768",
        "--num-probes": "0",
    }
    words = [word for pair in options.items() for word in pair]

    def start(*more: str, **environment: str) -> subprocess.CompletedProcess:
        env = os.environ | {"HF_HOME": str(tmp_path / "home"), **environment}
        command = [sys.executable, str(SCRIPT), *words, *more]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    with fake_hub.serve(HUB_NAME, tiny_model, TOKEN) as endpoint:
        stranger = start("--plan", HF_ENDPOINT=endpoint, HF_TOKEN="hf_wrong")
        owner = start(HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert stranger.returncode == 2 and "answers 401" in stranger.stderr, stranger.stderr
    assert owner.returncode == 0, owner.stderr[-2000:]
    assert TOKEN not in owner.stdout + owner.stderr
    assert "renamed" not in owner.stderr, "peft has put the cache's folder into the adapter"
    adapter = strict_json(tmp_path / "out" / "final_model" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == HUB_NAME
    again = start("--plan", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and HUB_NAME in again.stdout, again.stderr[-2000:]


# -----------------------------------------------------------------------------
# Full fine-tuning


@pytest.fixture(scope="module")
def full(tmp_path_factory, run) -> Path:
    """The output directory of a whole run with lora_r 0."""
    tmp_path = tmp_path_factory.mktemp("full")
    assert run(tmp_path, "--lora-r", "0", "--learning-rate", "1e-3") == 0
    return tmp_path / "out"


def test_full_fine_tuning_leaves_a_model(full: Path, tiny_model: Path):
    tuned = AutoModelForCausalLM.from_pretrained(full / "final_model")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = AutoTokenizer.from_pretrained(full / "final_model")("SM4", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert (tuned(ids).logits - base(ids).logits).abs().max() > 1e-4
    changed = [
        name
        for (name, new), (_, old) in zip(
            tuned.named_parameters(), base.named_parameters(), strict=True
        )
        if not torch.equal(new, old)
    ]
    assert len(changed) == len(list(base.parameters())), "every weight has moved"
    training = strict_json(full / "training_statistics.json")["training"]
    assert training["last_eval_loss"] < training["first_eval_loss"]


def test_full_fine_tuning_goes_on_where_it_was(full: Path, tmp_path, run, monkeypatch):
    interrupt_in_step(3, monkeypatch)
    same = ["--lora-r", "0", "--learning-rate", "1e-3"]
    assert run(tmp_path, *same) == 0
    monkeypatch.undo()
    assert not (tmp_path / "out" / "final_model").exists()
    assert run(tmp_path, "--resume", "latest", *same) == 0
    resumed = load_file(tmp_path / "out" / "final_model" / "model.safetensors")
    whole = load_file(full / "final_model" / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


# -----------------------------------------------------------------------------
# Adapters of other tools


@pytest.fixture
def foreign_adapter(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder as TRL and LLaMA-Factory leave one: peft's files among others, another rank."""
    folder = tmp_path / "sft" / "checkpoint-100"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft_model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text('{"global_step": 100}', encoding="utf-8")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n", encoding="utf-8")
    (folder / "training_args.bin").write_bytes(b"pickle that nobody must read")
    return folder


def test_an_adapter_of_another_tool_is_the_start(tmp_path, foreign_adapter, tiny_model, run):
    assert run(tmp_path, "--init-adapter", str(foreign_adapter), "--max-steps", "2") == 0
    final = tmp_path / "out" / "final_model"
    config = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (foreign_adapter, final)
    )
    assert before.keys() == after.keys()
    name = next(name for name in before if "lora_B" in name)
    moved = (after[name] - before[name]).abs().max()
    assert 0 < moved < before[name].abs().max(), "two steps from where the adapter stood"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert PeftModel.from_pretrained(base, final) is not None


def test_the_plan_counts_the_adapter_that_is_the_start(foreign_adapter, tmp_path, run, capfd):
    assert run(tmp_path, "--init-adapter", str(foreign_adapter), "--plan") == 0
    weights = sum(
        tensor.numel()
        for tensor in load_file(foreign_adapter / "adapter_model.safetensors").values()
    )
    assert f"{weights:,} trainable" in capfd.readouterr().out


def test_a_folder_without_an_adapter_is_a_clear_error(tmp_path, run, capfd):
    assert run(tmp_path, "--init-adapter", str(tmp_path)) == 2
    assert "adapter" in capfd.readouterr().err


# -----------------------------------------------------------------------------
# Configuration of other tools, 4 bits


def test_a_run_from_the_settings_of_training_arguments(tmp_path, run):
    path = tmp_path / "trainer.toml"
    path.write_text(
        "num_train_epochs = 1\nper_device_train_batch_size = 2\nbf16 = false\n"
        'lr_scheduler_type = "constant"\noptim = "adamw_torch"\nlora_rank = 4\n'
        'gradient_checkpointing = true\nreport_to = "tensorboard"\n',
        encoding="utf-8",
    )
    assert run(tmp_path, "--config", str(path), "--max-steps", "2") == 0
    config = strict_json(tmp_path / "out" / "training_statistics.json")["config"]
    expected = {"lora_r": 4, "batch_size": 2, "precision": "fp32", "gradient_checkpointing": "on"}
    assert {name: config[name] for name in expected} == expected


def test_training_in_4_bits(tmp_path, run):
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    assert run(tmp_path, "--quantization", "4bit", "--max-steps", "2") == 0
    assert (tmp_path / "out" / "final_model" / "adapter_model.safetensors").is_file()
