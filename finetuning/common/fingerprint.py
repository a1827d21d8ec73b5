"""What a folder of a model holds, in few digits: the same wherever it lies, another where its content is.

The weights of a large model are read in part: a download that was replaced, a merge or a further training
changes all tensors, or nearly all.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetuning.common.bounds import HEADER
from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object
from finetuning.common.text import clean_line

WHOLE_BYTES = 64 * 2**20  # of tensors that are read whole
BLOCKS, BLOCK_BYTES = (
    8,
    4096,
)  # of each tensor beyond: evenly spaced ones, the first and the last among them
# They say who wrote the file, or where the model lay.
_NOT_CONTENT = ("_name_or_path", "transformers_version")


def model_fingerprint(folder: Path) -> dict[str, str]:
    """Digests of a model folder: `model_weights`, `model_config` with the model's own code.

    Raises UserError where a file can't be read.
    """
    return {
        "model_weights": tensors_digest(weight_files(folder)),
        "model_config": config_digest(folder / "config.json", sorted(folder.glob("*.py"))),
    }


def adapter_fingerprint(folder: Path) -> str:
    """Digest of a saved adapter: its tensors, and its configuration but for the name of its base."""
    tensors = tensors_digest([folder / "adapter_model.safetensors"])
    config = config_digest(
        folder / "adapter_config.json", without=("base_model_name_or_path", "inference_mode")
    )
    return text_digest(tensors, config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the weights of a model folder are in."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    names = read_json_object(index).get("weight_map", {})
    return [folder / name for name in sorted(set(names.values()))]


def tensors_digest(files: Iterable[Path]) -> str:
    """Names, types, shapes and content of the tensors in safetensors files, however they are spread."""
    places: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
    for file in files:
        try:
            start, header = safetensors_header(file)
        except (OSError, ValueError) as error:
            reason = clean_line(str(error), 200)
            raise UserError(f"{file}: can't be read as safetensors ({reason})") from error
        places |= {name: (file, start, entry) for name, entry in header.items()}
    total = sum(_size(entry) for _, _, entry in places.values())
    digest = hashlib.blake2b(digest_size=16)
    opened: dict[Path, int] = {}
    try:
        for name in sorted(places):
            file, start, entry = places[name]
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            descriptor = opened.get(file)
            if descriptor is None:
                opened[file] = descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            for begin, length in _parts(_size(entry), total):
                os.lseek(descriptor, start + entry["data_offsets"][0] + begin, os.SEEK_SET)
                digest.update(os.read(descriptor, length))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return digest.hexdigest()


def config_digest(
    config: Path, code: Iterable[Path] = (), without: tuple[str, ...] = _NOT_CONTENT
) -> str:
    """Content of a JSON file, whatever its layout, and of files of code."""
    content = {k: v for k, v in read_json_object(config).items() if k not in without}
    for name, value in content.items():
        if name == "target_modules" and isinstance(value, list):  # peft writes a set
            content[name] = sorted(value)
    return text_digest(
        json.dumps(content, sort_keys=True), *(f.read_text("utf-8", "replace") for f in code)
    )


def text_digest(*texts: str) -> str:
    """32 hexadecimal digits over texts in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and what it says about each of them.

    Raises OSError and ValueError where it is none.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(file.stat().st_size, HEADER.limit):
            raise ValueError(f"its header is longer than the file, or than {HEADER}")
        try:
            header = json.loads(stream.read(length))
        except RecursionError as error:
            raise ValueError("its header is no list of tensors") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    return 8 + length, header


def _size(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


def _parts(size: int, total: int) -> list[tuple[int, int]]:
    """(offset, length) of what is read of a tensor."""
    if total <= WHOLE_BYTES or size <= BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    last = size - BLOCK_BYTES
    return [(i * last // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]
