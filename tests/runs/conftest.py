"""What the tests of this room share."""

from pathlib import Path

import pytest
import torch

from finetuning.config import LoraSettings, ModelSettings
from finetuning.model.loading import load_model, load_tokenizer
from finetuning.model.resolve import resolve_model
from finetuning.model.saving import save_adapter


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, tiny_model: Path) -> Path:
    """An adapter that changes what the tiny model says."""
    resolved = resolve_model(str(tiny_model), "cpu")
    tokenizer = load_tokenizer(resolved)
    model = load_model(resolved, tokenizer, ModelSettings(), LoraSettings(), device="cpu", seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("trained") / "final_model"
    save_adapter(model, tokenizer, folder)
    return folder
