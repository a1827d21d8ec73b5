"""Does a configuration describe the tensors that lie beside it? Asked before anything is built of it.

A library makes room for what `config.json` says: a line can ask for a terabyte, whatever the files hold.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetuning.common.bounds import MODEL_EXCESS
from finetuning.common.errors import UserError
from finetuning.common.fingerprint import safetensors_header, weight_files
from finetuning.common.text import clean_line
from finetuning.model.small_config import is_layer_count, is_width


def check_sizes(config: Mapping[str, Any], path: Path, files: Sequence[Path]) -> None:
    """Raise UserError where a configuration has more layers than there are tensors, or a width that none of
    them comes near. path: of the configuration, for the message; files: the weights, safetensors."""
    shapes = list(_shapes(files))
    widest = max((n for shape in shapes for n in shape), default=0)
    for name, value in _numbers(config):
        most = len(shapes) if is_layer_count(name) else widest * MODEL_EXCESS.limit
        if value > most and (is_layer_count(name) or is_width(name) or name == "num_labels"):
            held = f"{len(shapes)} tensors, none wider than {widest:,}"
            raise UserError(
                f"{path}: {clean_line(name, 80)} is {value:,.0f}, but the weights beside it are {held}: they "
                "don't belong together; download the folder again"
            )


def check_extent(config: Any, folder: Path, trust_remote_code: bool) -> None:
    """Raise UserError where the model is far larger than its files: a relative of it would be, too."""
    files = [file for file in weight_files(folder) if file.is_file()]
    if files:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        check_count(sum(p.numel() for p in model.parameters()), folder, files)


def check_count(parameters: int, folder: Path, files: Sequence[Path]) -> None:
    """Raise UserError where a model that was laid out has far more numbers than its files hold."""
    held = numbers_in(files)
    if parameters > held * MODEL_EXCESS.limit:
        raise UserError(
            f"model folder {folder}: its config.json describes {parameters:,} weights, the files hold "
            f"{held:,}: they don't belong together; download the folder again"
        )


def numbers_in(files: Sequence[Path]) -> int:
    """How many numbers safetensors files hold."""
    return sum(math.prod(shape) for shape in _shapes(files))


def _shapes(files: Sequence[Path]) -> Iterator[Sequence[int]]:
    for file in files:
        try:
            _, header = safetensors_header(file)
            yield from [tuple(map(int, entry["shape"])) for entry in header.values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = clean_line(str(error), 200)
            raise UserError(f"{file}: can't be read as safetensors ({reason})") from error


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a configuration with the name that it has, or that its list has."""
    if isinstance(value, Mapping):
        for key, content in value.items():
            yield from _numbers(content, str(key))
    elif isinstance(value, (list, tuple)):
        for content in value:
            yield from _numbers(content, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
