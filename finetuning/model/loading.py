"""Tokenizer and frozen weights: type, device, 4 bits."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.model import demo_model
from finetuning.model.adapters import (
    PROJECTIONS,
    attach_adapters,
    check_rank_pattern,
    known_modules,
    load_adapter,
    read_adapter_config,
)
from finetuning.model.resolve import (
    ADAPTER_CONFIG,
    ResolvedModel,
    as_user_error,
    check_model_folder,
    download,
    hub_spelling,
    named_model,
    resolve_model,
    saved_dtype,
    weight_dtype,
)

transformers.utils.logging.disable_progress_bar()  # the run has its own
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it

# -----------------------------------------------------------------------------
# Tokenizer and model


def load_tokenizer(
    resolved: ResolvedModel,
    texts: Sequence[str] | Callable[[], Sequence[str]] = (),
    cache_dir: Path | None = None,
    seed: int = 0,
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, with its chat template; `name_or_path` is the model's folder.

    Downloads a hub model. Builds the embedded one from `texts` (or a function that gives them),
    training samples only, below `cache_dir`.
    """
    folder = resolved.path
    if resolved.embedded:
        assert cache_dir is not None, "the embedded model needs a place to be kept"
        texts = texts() if callable(texts) else texts
        folder = demo_model.build_embedded(texts, cache_dir, seed)
    elif folder is None:
        folder = download(resolved)
        check_model_folder(folder, resolved.trust_remote_code)
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
    *,
    device: str | torch.device,
    precision: str = "auto",
    lora_r: int = 16,
    lora_alpha: float = 32.0,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = PROJECTIONS,
    rank_pattern: Mapping[str, int] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    quantization: str = "none",
    init_adapter: str = "",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    sharded: bool = False,
) -> PeftModel | PreTrainedModel:
    """The model on `device`, base frozen, with fresh fp32 adapters or those of `init_adapter`.

    With `lora_r` 0 all parameters train and there is no adapter. `init_adapter` brings rank, alpha
    and target modules of its own. The same seed gives the same adapters on any device.

    sharded: the weights stay in the files, mapped into host memory in the files' own type, one copy
    for all ranks of a node; `distributed.parallelize` takes each rank's part from there.
    """
    folder = Path(tokenizer.name_or_path)
    device = torch.device(device)
    resolved = replace(resolved, trust_remote_code=resolved.trust_remote_code or trust_remote_code)
    if lora_r == 0 and (quantization != "none" or init_adapter):
        raise UserError(
            "lora_r 0 (full fine-tuning) goes with neither quantization nor init_adapter"
        )
    dtype = weight_dtype(device, precision)
    if sharded:
        assert quantization == "none", "4-bit weights can't be sharded"
        device, dtype = torch.device("cpu"), saved_dtype(folder)
    model = load_base(resolved, folder, device, dtype, quantization)
    _check_vocabulary(model, tokenizer, folder)
    if gradient_checkpointing:
        recompute_activations(model)
    if lora_r == 0:
        return model.requires_grad_(True)
    base_name = resolved.name if hub_spelling(resolved) else str(folder)
    if init_adapter:
        return load_adapter(model, Path(init_adapter).expanduser(), base_name)
    config = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=known_modules(model, target_modules),
        rank_pattern=dict(rank_pattern or {}),
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    check_rank_pattern(model, config)
    return attach_adapters(model, config, seed)


def recompute_activations(model: torch.nn.Module) -> None:
    """Gradient checkpointing from the next forward pass on; the model may have adapters.

    Under the name that this version of transformers has for it.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    new = "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")(
        {"use_reentrant": False}
    )


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers; shared weights count once, packed 4-bit weights as what they mean."""
    counts = [(p.requires_grad, _size(p)) for p in model.parameters()]
    return sum(n for trainable, n in counts if trainable), sum(n for _, n in counts)


def _size(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def load_base(
    resolved: ResolvedModel,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
) -> PreTrainedModel:
    """Weights are mapped from the file and go straight to the device. No weight may be missing."""
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
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model folder {folder}: its tokenizer has {len(tokenizer)} tokens, the model only {rows}; "
            "the tokenizer is of another model"
        )


def load_for_inference(
    folder: Path, *, device: str | torch.device, precision: str = "auto", base_model: str = ""
) -> tuple[PeftModel | PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A saved adapter on its base, or a whole model folder, ready to generate; and its tokenizer.

    `base_model` replaces the base that the adapter's configuration names.
    """
    device, is_adapter = torch.device(device), (folder / ADAPTER_CONFIG).is_file()
    resolved = (
        base_of(folder, device, base_model) if is_adapter else named_model(str(folder), False)
    )
    tokenizer = load_tokenizer(resolved)
    dtype = weight_dtype(device, precision)
    model = load_base(resolved, Path(tokenizer.name_or_path), device, dtype, "none")
    if is_adapter:
        model = load_adapter(model, folder, resolved.name)
    model.config.use_cache = True
    return model.eval(), tokenizer


def base_of(adapter: Path, device: torch.device, base_model: str = "") -> ResolvedModel:
    name = base_model or read_adapter_config(adapter).base_model_name_or_path
    if not name:
        raise UserError(f"{adapter / ADAPTER_CONFIG} names no base model; give it as --base-model")
    return resolve_model(name, device)
