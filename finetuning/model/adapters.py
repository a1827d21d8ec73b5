"""LoRA adapters through peft: attach, load, name, count."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.config import LoraSettings
from finetuning.model.adapter_config import read_adapter_config
from finetuning.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetuning.model.parallel import decoder_layers, placed_like
from finetuning.model.resolve import (
    check_safetensors,
    short_reason,
)

_TRAINED = (
    BaseTunerLayer,
    AuxiliaryTrainingWrapper,
)  # of peft: adapters, and whole copies of modules


def attach_adapters(
    model: PreTrainedModel, lora: LoraSettings, base_name: str, seed: int
) -> PeftModel:
    """Fresh adapters: B zero, A drawn on the CPU from `seed`; fp32 whatever the base is.

    base_name: what the saved adapter calls its base.
    """
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=known_modules(model, lora.target_modules),
        rank_pattern=dict(lora.rank_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    check_rank_pattern(model, config)
    adapted = _with_adapters(model, config, seed)
    check_ends(adapted)
    return adapted


def _with_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    model.name_or_path = config.base_model_name_or_path  # peft writes this name, not the config's
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Said of a tied head, which is refused where it would be trained.
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying")
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"adapter settings: {short_reason(error)}") from error


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The model is its base within it; nothing changes where it has no adapters."""
    layers = [m for m in model.modules() if isinstance(m, _TRAINED) and not m.disable_adapters]
    # peft's own `disable_adapter` also freezes and unfreezes the adapters, whose gradients are on the way.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def check_ends(model: PeftModel) -> None:
    """What is trained lies between embedding and head, which meets some rows only, outside its own forward.

    Raises UserError for adapters at the ends.
    """
    base = model.get_base_model()
    ends = {base.get_input_embeddings(), base.get_output_embeddings()}
    names = [n for n, m in base.named_modules() if isinstance(m, _TRAINED) and m in ends]
    if names:
        raise UserError(
            f"adapters on {', '.join(names)} are not trained here, as it is the embedding or the output "
            "head; leave it out of target_modules and modules_to_save"
        )


def parts_without_adapters(model: torch.nn.Module) -> dict[str, tuple[int, list[str]]]:
    """Parts of the decoder layers, such as `linear_attn`, in which nothing is adapted, with the number of
    layers that have them so and the names of their matrices. Empty at lora_r 0."""
    if not isinstance(model, PeftModel):
        return {}
    found: dict[str, tuple[int, list[str]]] = {}
    for layer in decoder_layers(model):
        for part, module in layer.named_children():
            matrices = {n: p for n, p in module.named_parameters() if p.dim() > 1}
            if matrices and not any(p.requires_grad for p in matrices.values()):
                names = sorted({n.removesuffix(".weight") for n in matrices})
                count, before = found.get(part, (0, []))
                found[part] = (count + 1, sorted({*before, *names}))
    return found


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of all linear layers except the output head, sorted."""
    head = model.get_output_embeddings()
    kinds = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is not head and isinstance(module, torch.nn.Linear)
    }
    return sorted(kinds)


def known_modules(model: PreTrainedModel, wanted: Sequence[str]) -> list[str] | str:
    """`wanted` when each name fits a module of the model; peft itself minds only when none does."""
    if list(wanted) == ["all-linear"]:
        return "all-linear"
    names = [name for name, _ in model.named_modules()]
    unknown = [w for w in wanted if not any(n == w or n.endswith(f".{w}") for n in names)]
    if unknown or not wanted:
        raise UserError(
            f"target_modules: {', '.join(map(clean_line, unknown)) or 'empty'}; this model has "
            f"{', '.join(linear_names(model))} (or all-linear)"
        )
    return list(wanted)


def check_rank_pattern(model: PreTrainedModel, config: LoraConfig) -> None:
    """Every rank pattern must fit a module (peft's rule: the end of the name, as an expression)."""
    names = [name for name, _ in model.named_modules()]
    for pattern, rank in config.rank_pattern.items():
        try:
            found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        except re.error as error:
            raise UserError(f"rank_pattern {clean_line(pattern)}: {error}") from error
        if not found or rank < 1:
            raise UserError(
                f"rank_pattern {clean_line(pattern)} = {rank}: "
                + ("the rank must be at least 1" if found else "no module of this model fits it")
            )


def load_adapter(model: PreTrainedModel, folder: Path, base_name: str) -> PeftModel:
    """A saved LoRA adapter as the trainable start; rank and modules are the adapter's own."""
    config = read_adapter_config(folder)
    config.base_model_name_or_path = base_name
    peft_model = _with_adapters(model, config, seed=0)
    _load_exactly(peft_model, _adapter_tensors(folder), f"adapter {folder}")
    return peft_model


def _adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickle = (
            " (adapter_model.bin is pickle, which can run code)"
            * (folder / "adapter_model.bin").is_file()
        )
        raise UserError(
            f"adapter {folder} has no {ADAPTER_WEIGHTS}{pickle}; save it as safetensors"
        )
    check_safetensors(path)
    return load_file(path)


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trainable tensors by name, detached, as they lie: peft's names, or parameter names at lora_r 0."""
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        state = dict(model.named_parameters())
    return {name: tensor.detach() for name, tensor in state.items()}


def load_adapter_state(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write whole tensors under the names of `adapter_state` back. UserError when a name or shape differs."""
    _load_exactly(model, tensors, "checkpoint")


def _load_exactly(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    live = adapter_state(model)
    missing, extra = sorted(live.keys() - tensors.keys()), sorted(tensors.keys() - live.keys())
    shapes = sorted(n for n in live.keys() & tensors.keys() if live[n].shape != tensors[n].shape)
    faults = [
        f"{len(names)} {what}, first {clean_line(names[0], 120)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise UserError(f"{source} does not fit this model: tensors {'; '.join(faults)}")
    for name, tensor in live.items():
        tensor.copy_(placed_like(tensors[name], tensor))


def adapter_documents(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """File name -> JSON content that belongs beside the adapter's tensors; empty at lora_r 0."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True  # what a reader should start from, as peft saves it
    return {ADAPTER_CONFIG: _plain(config)}


def _plain(value: Any) -> Any:
    """Sets become sorted lists and enums their values, so that equal configurations give equal bytes."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return getattr(value, "value", value)
