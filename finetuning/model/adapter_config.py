"""The configuration of a saved adapter, which a stranger may have written.

Kinds, ranks and modules are checked. Where it says by expressions which modules are adapted, the tensors
beside it say so by name: the expressions of strangers are never evaluated.
"""

import re
from pathlib import Path
from typing import Any, TypedDict

from peft import LoraConfig, PeftConfig

from finetuning.common.bounds import MODEL_EXCESS
from finetuning.common.errors import UserError
from finetuning.common.fingerprint import safetensors_header
from finetuning.common.kinds import misfit
from finetuning.common.text import clean_line
from finetuning.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetuning.model.resolve import (
    as_user_error,
    read_model_json,
)

# Initialisations that change the base weights, so that the saved adapter alone is not the model.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN = re.compile(r"[\w.-]+")  # a name, which peft takes for an expression that fits only itself
_PATTERNS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_MODULE = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:A|embedding_A)(?:\.\w+)?(?:\.weight)?")


class _Used(TypedDict, total=False):
    """What of it counts here, and the kinds that it must have."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | str
    modules_to_save: list[str] | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    use_rslora: bool
    use_dora: bool
    bias: str
    fan_in_fan_out: bool
    base_model_name_or_path: str | None


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a saved adapter. Raises UserError for one that can't be continued."""
    path = folder / ADAPTER_CONFIG
    content = read_model_json(path, "an adapter folder of peft, TRL or LLaMA-Factory has one")
    if content.get("peft_type") != "LORA":
        kind = clean_line(str(content.get("peft_type")), 40)
        raise UserError(f"{path}: peft_type is {kind}, only LORA adapters can be continued")
    init = str(content.get("init_lora_weights") or "").lower()
    if init.startswith(BASE_CHANGING):
        raise UserError(
            f"{path}: initialised with {clean_line(init, 40)}, which changes the base weights; merge that "
            "adapter into its base, or convert it to plain LoRA, first"
        )
    _check(content, path)
    with as_user_error(str(path), "save the adapter again with a current peft"):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: not the configuration of a LoRA adapter")
    config.inference_mode, config.init_lora_weights = False, True
    config.rank_pattern, config.alpha_pattern = (
        config.rank_pattern or {},
        config.alpha_pattern or {},
    )
    ranks = _ranks(folder / ADAPTER_WEIGHTS)
    if ranks and max(config.r, *config.rank_pattern.values(), 0) > MODEL_EXCESS.limit * max(
        ranks.values()
    ):
        raise UserError(
            f"{path}: its rank is {config.r:,}, but no tensor beside it has more than "
            f"{max(ranks.values()):,}; get the adapter again"
        )
    modules = config.target_modules
    by_pattern = not modules or (isinstance(modules, str) and modules != "all-linear")
    if ranks and (by_pattern or any(getattr(config, name, None) for name in _PATTERNS)):
        config.target_modules = set(ranks)
    elif by_pattern and not (modules and _PLAIN.fullmatch(modules)):
        raise UserError(f"{path}: target_modules names no module, and no tensors say which")
    for name in _PATTERNS:
        setattr(config, name, None)
    return config


def _check(content: dict[str, Any], path: Path) -> None:
    known = {name: content[name] for name in _Used.__annotations__ if name in content}
    fault = misfit(known, _Used)
    names = [] if fault else [known.get(n) or {} for n in ("rank_pattern", "alpha_pattern")]
    odd = next((name for pattern in names for name in pattern if not _PLAIN.fullmatch(name)), None)
    if odd is not None:
        fault = f"{clean_line(odd, 60)} in a pattern of ranks is an expression, and names only are taken"
    if not fault and "r" in known and known["r"] < 1:
        fault = "its rank is below 1"
    if fault:
        raise UserError(f"{path}: {fault}; save the adapter again with a current peft")


def _ranks(path: Path) -> dict[str, int]:
    """Module -> rank, by the tensors of an adapter; empty where none can be read, which is told later."""
    try:
        _, header = safetensors_header(path)
        found = {name: entry["shape"] for name, entry in header.items()}
        return {
            m[1]: int(shape[0]) for name, shape in found.items() if (m := _MODULE.fullmatch(name))
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
