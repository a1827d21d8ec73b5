"""A folder's fingerprint: the same content anywhere, and no other.

uv run pytest tests/common/test_fingerprint.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.common import fingerprint
from finetuning.common.errors import UserError
from finetuning.common.fingerprint import model_fingerprint, tensors_digest


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_a_copy_a_link_and_another_layout_are_the_same(tiny_model: Path, copy: Path):
    wanted = model_fingerprint(tiny_model)
    link = copy.with_name("link")
    link.symlink_to(copy, target_is_directory=True)
    assert model_fingerprint(copy) == model_fingerprint(link) == wanted
    config = json.loads((copy / "config.json").read_text())
    text = json.dumps(
        {"_name_or_path": "/elsewhere", **config, "transformers_version": "0"}, indent=4
    )
    (copy / "config.json").write_text(text)
    assert model_fingerprint(copy) == wanted


def test_weights_in_several_files_are_the_same(copy: Path):
    wanted, tensors = model_fingerprint(copy), load_file(copy / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, copy / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (copy / "model.safetensors").unlink()
    assert model_fingerprint(copy) == wanted


@pytest.mark.parametrize("change", ["value", "shape", "name", "type"])
def test_other_weights_are_others(copy: Path, change: str):
    before, tensors = model_fingerprint(copy), load_file(copy / "model.safetensors")
    name = sorted(tensors)[3]
    tensor = tensors.pop(name)
    if change == "value":
        tensor.view(-1)[tensor.numel() // 3] += 1e-3
    if change == "shape":
        tensor = tensor.reshape(-1)
    if change == "type":
        tensor = tensor.half()
    tensors[f"{name}_" if change == "name" else name] = tensor
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    after = model_fingerprint(copy)
    assert after["model_weights"] != before["model_weights"]
    assert after["model_config"] == before["model_config"]


def test_another_configuration_or_code_is_another(copy: Path):
    before = model_fingerprint(copy)["model_config"]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    other = model_fingerprint(copy)["model_config"]
    (copy / "modeling_own.py").write_text("x = 1\n")
    assert len({before, other, model_fingerprint(copy)["model_config"]}) == 3


def test_a_large_model_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A training changes every tensor nearly everywhere: that is seen, and little is read."""
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    read, original = [], fingerprint.os.read
    monkeypatch.setattr(fingerprint.os, "read", lambda fd, n: read.append(n) or original(fd, n))
    path, tensors = tmp_path / "a.safetensors", {"w": torch.randn(1000, 1000)}
    save_file(tensors, path)
    before = tensors_digest([path])
    assert sum(read) == fingerprint.BLOCKS * fingerprint.BLOCK_BYTES
    assert tensors_digest([path]) == before
    tensors["w"] *= 1 + 1e-6
    save_file(tensors, path)
    assert tensors_digest([path]) != before


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="can't be read as safetensors"):
        tensors_digest([path])
