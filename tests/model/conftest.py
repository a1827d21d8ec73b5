"""What the tests of this room share."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetuning.model import demo_model, saving
from tests.helpers.models import TEXTS, disturb, load, logits


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """An ordinary model folder: two random layers and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = demo_model.train_tokenizer(TEXTS)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=demo_model.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A disturbed adapter, saved: (folder, logits of the live model)."""
    model, tokenizer = load(tiny, lora_r=4)
    disturb(model)
    folder = tmp_path_factory.mktemp("run") / "final_model"
    saving.save_adapter(model, tokenizer, folder)
    return folder, logits(model)
