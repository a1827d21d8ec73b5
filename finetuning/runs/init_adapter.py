"""The adapter that a run starts from: its own settings count, and it belongs to one base."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetuning.common.errors import UserError
from finetuning.common.fingerprint import model_fingerprint
from finetuning.common.text import clean_line
from finetuning.config import DirectTrainingConfig
from finetuning.model.adapter_config import read_adapter_config
from finetuning.model.resolve import ResolvedModel, hub_spelling
from finetuning.runs.origin import read_origin


def with_own_settings(
    config: DirectTrainingConfig, warn: Callable[[str], None]
) -> DirectTrainingConfig:
    """The configuration with rank, scale and modules of `init_adapter`; told where they are others than set.

    Raises UserError for an adapter that can't be continued.
    """
    if not config.init_adapter:
        return config
    if not config.lora_r:
        raise UserError("lora_r 0 (full fine-tuning) does not go with init_adapter; leave one out")
    saved = read_adapter_config(Path(config.init_adapter))
    modules = saved.target_modules
    own = {
        "lora_r": saved.r,
        "lora_alpha": float(saved.lora_alpha),
        "lora_dropout": float(saved.lora_dropout),
        "target_modules": (modules,) if isinstance(modules, str) else tuple(sorted(modules)),
        "rank_pattern": dict(saved.rank_pattern),
        "use_rslora": saved.use_rslora,
        "use_dora": saved.use_dora,
    }
    given = {name: getattr(config, name) for name in own}
    given["target_modules"] = tuple(sorted(config.target_modules))
    others = [f"{name} {own[name]}, not {given[name]}" for name in own if own[name] != given[name]]
    if others:
        warn(f"init_adapter {config.init_adapter} brings its own settings: {'; '.join(others)}")
    return dataclasses.replace(config, **own)


def check_base(
    folder: Path, model: ResolvedModel, contents: Mapping[str, str], warn: Callable[[str], None]
) -> None:
    """Raise UserError for an adapter of another base; warn where that can't be told.

    The base is known by its content: as our own adapters say it, or as the model has it whose name is in
    the adapter's configuration, where that model is on this machine.
    """
    base = read_origin(folder).get("base", {})
    name = str(read_adapter_config(folder).base_model_name_or_path or base.get("model") or "")
    weights = base.get("model_weights") or _weights_of(name)
    shown, ours = clean_line(name, 200) or "unnamed", clean_line(model.name, 200)
    if weights is not None:
        if weights != contents["model_weights"]:
            raise UserError(
                f"init_adapter {folder}: its base model is {shown}, and the weights of {ours} are others; "
                "give --model-name that base, or another adapter"
            )
    elif (
        name != model.name
        and "/" in name
        and not Path(name).is_absolute()
        and (hub_spelling(model) or model.embedded)
    ):
        raise UserError(
            f"init_adapter {folder}: its base model is {shown}, this one is {ours}; give --model-name that "
            f"base, or, if both are the same, correct base_model_name_or_path in {folder}/adapter_config.json"
        )
    elif name != model.name:
        warn(
            f"init_adapter {folder}: its base model is {shown}, which is not on this machine; whether {ours} "
            "is the same can't be told"
        )


def _weights_of(name: str) -> str | None:
    """Digest of the weights of a model by its name, if it lies on this machine."""
    folder = Path(name) if name else None
    if folder is not None and not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # not a name that the hub has
            cached = None
        folder = Path(cached).parent if isinstance(cached, str) else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    return model_fingerprint(folder)["model_weights"]
