"""A configuration that asks for more than its weights hold is refused before anything is built of it.

uv run pytest tests/model/test_sizes.py
"""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest

from finetuning.common.bounds import HEADER
from finetuning.common.errors import UserError
from finetuning.common.fingerprint import safetensors_header
from finetuning.config import LoraSettings
from finetuning.model.resolve import named_model
from finetuning.model.row_proof import proven_way
from finetuning.training.memory_estimate import model_shape


@pytest.fixture
def changed(tiny_model: Path, tmp_path: Path):
    """A copy of the tiny model with other lines in its configuration."""

    def change(**lines: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder)
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(content | lines), encoding="utf-8")
        return folder

    return change


@pytest.mark.parametrize(
    "lines",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 10**6},
        {"hidden_size": 10**8},
        {"intermediate_size": 10**12},
        {"vocab_size": 10**10},
        {"head_dim": 10**7},
        {"num_labels": 10**9},
        {"text_config": {"hidden_size": 10**9}},
        {"moe": [{"expert": {"ffn_dim": 10**9}}]},
    ],
    ids=str,
)
def test_what_no_tensor_comes_near_is_refused(changed, lines):
    folder = changed(**lines)
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"config\.json: .* but the weights beside it are \d+ tensors"
    ):
        named_model(str(folder), False)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_heads_that_multiply_are_refused_before_they_lie_anywhere(changed, tmp_path):
    folder = changed(num_attention_heads=50_000, num_key_value_heads=50_000)
    named_model(str(folder), False)
    text = r"describes [\d,]+ weights, the files hold"
    with pytest.raises(UserError, match=text):
        model_shape(folder, LoraSettings(lora_r=0))
    with pytest.raises(UserError, match=text):
        proven_way(folder, tmp_path, longest=64)


def test_numbers_of_other_kinds_may_be_large(changed):
    lines = {"max_position_embeddings": 10**9, "rope_theta": 10**10, "sliding_window": 10**9}
    assert named_model(str(changed(**lines)), False).path


def test_a_header_is_bounded(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((HEADER.limit + 1).to_bytes(8, "little"))
        file.truncate(2 * HEADER.limit)  # sparse: nothing is written
    with pytest.raises(ValueError, match="longer than"):
        safetensors_header(path)
    path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(ValueError, match="no list"):
        safetensors_header(path)
