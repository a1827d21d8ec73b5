"""What the tests of this room share."""

import pytest

from finetuning.config import LoraSettings
from finetuning.training import memory_estimate
from finetuning.training.memory_estimate import model_shape
from tests.helpers import traced_step


@pytest.fixture(scope="session")
def qwen3_4b(tmp_path_factory) -> memory_estimate.ModelShape:
    """The published shape of Qwen3-4B; there are no weights."""
    folder = tmp_path_factory.mktemp("qwen3-4b")
    traced_step.qwen3_4b().save_pretrained(folder)
    return model_shape(folder, LoraSettings(lora_r=16))
