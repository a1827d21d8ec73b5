"""Tokenizer and frozen weights: type, device, 4 bits."""

import os
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.config import LoraSettings, ModelSettings
from finetuning.model.adapter_config import read_adapter_config
from finetuning.model.adapter_files import ADAPTER_CONFIG
from finetuning.model.adapters import (
    attach_adapters,
    check_ends,
    load_adapter,
)
from finetuning.model.parallel import decoder_layers
from finetuning.model.resolve import (
    ResolvedModel,
    as_user_error,
    ensure_local,
    hub_name,
    named_model,
    saved_dtype,
    weight_dtype,
)

transformers.utils.logging.disable_progress_bar()  # the run has its own
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it

# -----------------------------------------------------------------------------
# Tokenizer and model


def load_tokenizer(resolved: ResolvedModel) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model that is on this machine (`ensure_local`), with its chat template."""
    folder = _folder(resolved)
    with as_user_error(f"the tokenizer of {folder}", "copy the original model's tokenizer files"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=resolved.trust_remote_code, local_files_only=True
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; use an instruction-tuned model, or put its "
            "template into the folder as chat_template.jinja"
        )
    return tokenizer


def load_model(
    resolved: ResolvedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    settings: ModelSettings,
    lora: LoraSettings,
    *,
    device: str | torch.device,
    recomputed_layers: int = 0,
    seed: int = 0,
    sharded: bool = False,
) -> torch.nn.Module:
    """The model on `device`, base frozen, with fresh fp32 adapters or those of `init_adapter`.

    With `lora_r` 0 all parameters train and there is no adapter. `init_adapter` brings rank, alpha
    and target modules of its own. The same seed gives the same adapters on any device.

    sharded: the weights stay in the files, mapped into host memory in the files' own type, one copy
    for all ranks of a node; `parallel.parallelize` takes each rank's part from there.
    """
    folder, device = _folder(resolved), torch.device(device)
    if lora.lora_r == 0 and (settings.quantization != "none" or settings.init_adapter):
        raise UserError(
            "lora_r 0 (full fine-tuning) goes with neither quantization nor init_adapter"
        )
    dtype = weight_dtype(device, settings.precision)
    if sharded:
        assert settings.quantization == "none", "4-bit weights can't be sharded"
        device, dtype = torch.device("cpu"), saved_dtype(folder)
    model = load_base(resolved, device, dtype, settings.quantization)
    _check_vocabulary(model, tokenizer, folder)
    base_name = hub_name(resolved) or str(folder)
    if lora.lora_r == 0:
        model.requires_grad_(True)
    elif settings.init_adapter:
        model = load_adapter(model, Path(os.path.expanduser(settings.init_adapter)), base_name)
        check_ends(model)
    else:
        model = attach_adapters(model, lora, base_name, seed)
    if recomputed_layers:  # of the whole model: its adapters may draw
        recompute_activations(model, recomputed_layers)
    return model


def _folder(resolved: ResolvedModel) -> Path:
    assert resolved.path is not None, "the model is not on this machine yet: call ensure_local"
    return resolved.path


def recompute_activations(model: torch.nn.Module, first: int | None = None) -> None:
    """Gradient checkpointing from the next forward pass on, of all layers or the first so many.

    The first: when their turn comes in the backward pass, the layers behind have let go of theirs. The
    model may have adapters. Under the name that this version of transformers has for it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    new = "activation_checkpointing_enable"
    draws = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")(
        # What draws no random number needs no random state, which no CUDA graph can set back.
        {"use_reentrant": False, "preserve_rng_state": draws}
    )
    layers = separate_layers(model)
    for layer in layers[len(layers) if first is None else first :]:
        layer.gradient_checkpointing = False


def separate_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Those that can be recomputed one by one; where layers have no switch of their own, the whole model."""
    layers = decoder_layers(model)
    apart = layers and all(hasattr(layer, "gradient_checkpointing") for layer in layers)
    return layers if apart else [model]


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers; shared weights count once, packed 4-bit weights as what they mean."""
    counts = [(p.requires_grad, _size(p)) for p in model.parameters()]
    return sum(n for trainable, n in counts if trainable), sum(n for _, n in counts)


def _size(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def load_base(
    resolved: ResolvedModel, device: torch.device, dtype: torch.dtype, quantization: str = "none"
) -> PreTrainedModel:
    """Weights are mapped from the file and go straight to the device. No weight may be missing."""
    folder = _folder(resolved)
    advice = "download it again, or check that this version of transformers knows the architecture"
    with as_user_error(f"model folder {folder}", advice):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_quantization(quantization, device),
            use_safetensors=True,
            trust_remote_code=resolved.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    for fault in ("missing_keys", "mismatched_keys"):
        if info.get(fault):
            first = clean_line(str(sorted(map(str, info[fault]))[0]))
            raise UserError(
                f"model folder {folder}: {fault.replace('_', ' ')} in its weights, {len(info[fault])} in "
                f"all, first {first}; they don't belong to its config.json, download the folder again"
            )
    if quantization == "4bit":
        _keep_training_layout(model)
    model.config.use_cache = False
    return model.requires_grad_(False)


def _keep_training_layout(model: PreTrainedModel) -> None:
    """On some CPUs bitsandbytes repacks a weight at the first inference; training then reads it wrongly.

    Seen with 0.50.2: gradients differ after an evaluation. Its switch for the repacking is turned off.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantization(
    quantization: str, device: torch.device
) -> transformers.BitsAndBytesConfig | None:
    """NF4 with double quantisation (Dettmers et al. 2023), or None."""
    if quantization == "none":
        return None
    assert quantization == "4bit", quantization
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "quantization 4bit needs bitsandbytes, which is not installed; start with "
            "uv run --extra qlora, or set quantization to none"
        ) from error
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=weight_dtype(device, "auto"),
    )


def _check_vocabulary(model: PreTrainedModel, tokenizer: object, folder: Path) -> None:
    """UserError where a text may have a token that the model has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model folder {folder}: its tokenizer has {len(tokenizer)} tokens, the model only {rows}; "
            "the tokenizer is of another model"
        )


def load_for_inference(
    folder: Path, *, device: str | torch.device, precision: str = "auto", base_model: str = ""
) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """A saved adapter on its base, or a whole model folder, ready to generate; and its tokenizer.

    `base_model` replaces the base that the adapter's configuration names.
    """
    device, is_adapter = torch.device(device), (folder / ADAPTER_CONFIG).is_file()
    resolved = base_of(folder, base_model) if is_adapter else named_model(str(folder), False)
    tokenizer = load_tokenizer(resolved)
    model = load_base(resolved, device, weight_dtype(device, precision))
    _check_vocabulary(model, tokenizer, _folder(resolved))
    if is_adapter:
        model = load_adapter(model, folder, resolved.name)
    model.config.use_cache = True
    return model.eval(), tokenizer


def base_of(adapter: Path, base_model: str = "") -> ResolvedModel:
    """The base of a saved adapter, on this machine: `base_model`, or the one that its file names."""
    name = base_model or read_adapter_config(adapter).base_model_name_or_path
    if not name:
        raise UserError(f"{adapter / ADAPTER_CONFIG} names no base model; give it as --base-model")
    return ensure_local(named_model(name, False))
