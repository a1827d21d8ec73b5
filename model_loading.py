"""Model name to tokenizer, model and adapters, and adapters to files.

A name that is given is never replaced: it loads, or the error says what was tried. With none given it
is Qwen3-4B-Thinking where a GPU can hold it and its weights are at hand, else the embedded model.
Only safetensors and JSON are read, never pickle. This is the one module that knows peft.
"""

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import embedded_model
from distributed import full_tensor, placed_like
from errors import UserError
from fp8_products import require_fp8
from run_directory import RUN_NAME
from safe_text import clean_line, redact, usual_mode, write_json

transformers.utils.logging.disable_progress_bar()  # the run has its own
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it

DEFAULT_MODEL = "Qwen/Qwen3-4B-Thinking-2507"
EMBEDDED = "embedded"
# Free GPU memory: 7.5 of bf16 weights or 15 of fp32 ones, 0.5 of adapter, the rest for a short row.
DEFAULT_MODEL_GIB = {torch.bfloat16: 12.0, torch.float32: 20.0}
HUB_TIMEOUT = 5.0  # seconds for "is the hub there?"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Initialisations that change the base weights, so that the saved adapter alone is not the model.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError)


@dataclass(frozen=True)
class ResolvedModel:
    """Which model a run uses and why.

    `path` is its folder; None means it is still to be downloaded (hub) or built (embedded), which
    `load_tokenizer` does.
    """

    name: str
    path: Path | None
    embedded: bool
    reason: str
    trust_remote_code: bool = False


# -----------------------------------------------------------------------------
# Which model


def resolve_model(
    model_name: str | None,
    device: str | torch.device,
    *,
    precision: str = "auto",
    trust_remote_code: bool = False,
) -> ResolvedModel:
    """Find the model without loading it. `embedded` as the name asks for the embedded one.

    Raises UserError for a name that can't be had, saying where it was looked for.
    """
    if model_name == EMBEDDED:
        return embedded_because("it was asked for by name")
    if model_name:
        return _named_model(model_name, trust_remote_code)
    obstacle = _no_room(torch.device(device), precision)
    if obstacle:
        return embedded_because(obstacle)
    try:
        return _named_model(DEFAULT_MODEL, trust_remote_code)
    except UserError as error:
        return embedded_because(f"{DEFAULT_MODEL} is not at hand: {error}")


def embedded_because(reason: str) -> ResolvedModel:
    """The embedded model, which is never a choice without a reason."""
    return ResolvedModel(EMBEDDED, None, True, reason)


def banner(resolved: ResolvedModel) -> str:
    """What to tell the user about the model: plain words when it is the embedded one."""
    if resolved.embedded:
        return embedded_model.banner(resolved.reason)
    return f"{resolved.name}: {resolved.reason}"


def _no_room(device: torch.device, precision: str) -> str | None:
    """Why the default model can't run on the device, or None."""
    if device.type != "cuda":
        return f"there is no CUDA GPU for {DEFAULT_MODEL} (device {device.type})"
    dtype = weight_dtype(device, precision)
    free, needed = torch.cuda.mem_get_info(device)[0] / 2**30, DEFAULT_MODEL_GIB[dtype]
    if free < needed:
        return (
            f"the GPU has {free:.1f} GiB free, {DEFAULT_MODEL} needs about {needed:g} in "
            f"{str(dtype).removeprefix('torch.')} (with --model-name and --quantization 4bit, less)"
        )
    return None


def _named_model(name: str, trust_remote_code: bool) -> ResolvedModel:
    """A folder, then the caches, then the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder, trust_remote_code)
        return ResolvedModel(name, folder.resolve(), False, "local folder", trust_remote_code)
    if folder.exists():
        raise UserError(f"model_name {clean_line(name)}: a file, but a model is a folder")
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise UserError(f"model_name {clean_line(name)}: no such folder; check the path")
    tried = [f"local folder {clean_line(name)} (not there)"]
    for what, cached in _cached_folders(name):
        try:
            check_model_folder(cached, trust_remote_code)
            return ResolvedModel(name, cached, False, what, trust_remote_code)
        except UserError as error:
            tried.append(f"{what} ({error})")
    obstacle = _hub_obstacle(name)
    if obstacle is None:
        return ResolvedModel(name, None, False, f"hub {_endpoint()}", trust_remote_code)
    tried += [
        f"Hugging Face cache {hub_constants.HF_HUB_CACHE}",
        f"ModelScope cache {_modelscope()}",
    ]
    raise UserError(
        f"model_name {clean_line(name)} can't be had. Tried: {'; '.join(tried)}; {obstacle}. "
        f"Download it where there is network (hf download {clean_line(name)}, or modelscope download "
        f"--model {clean_line(name)}), set HF_ENDPOINT to a mirror you can reach, or give "
        "--model-name the path of a local folder"
    )


def _cached_folders(name: str) -> Iterator[tuple[str, Path]]:
    """Folders of this model that an earlier download left, complete or not."""
    repo = Path(hub_constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        revision = (repo / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        revision = ""
    if revision and (repo / "snapshots" / revision).is_dir():
        yield "Hugging Face cache", repo / "snapshots" / revision
    for parent in (
        _modelscope() / "models",
        _modelscope() / "hub" / "models",
        _modelscope() / "hub",
    ):
        for spelling in dict.fromkeys((name, name.replace(".", "___"))):
            if (parent / spelling).is_dir():
                yield "ModelScope cache", parent / spelling


def _modelscope() -> Path:
    return Path(
        os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope"
    ).expanduser()


def _endpoint() -> str:
    return redact(hub_constants.ENDPOINT)


def _hub_obstacle(name: str) -> str | None:
    """Why the hub does not give the model, or None when it does; answers within seconds."""
    if hub_constants.is_offline_mode():
        return f"hub {_endpoint()} (not asked: HF_HUB_OFFLINE is set)"

    def ask() -> None:
        url = huggingface_hub.hf_hub_url(name, "config.json")
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT)

    error = _within(HUB_TIMEOUT + 1, ask)
    if error is None:
        return None
    status = (
        error.response.status_code if isinstance(error, HfHubHTTPError) and error.response else None
    )
    if status in (401, 403, 404):
        why = f"answers {status}: no such model, or no access to it (HF_TOKEN, licence)"
    elif status:
        why = f"answers {status}"
    else:
        why = f"not reachable: {_short(error)}"
    return f"hub {_endpoint()} ({why})"


def _within(seconds: float, action: Callable[[], None]) -> Exception | None:
    """Run `action` for at most `seconds` and return its exception, if any.

    A thread, because looking up a name has no time limit of its own.
    """
    outcome: list[Exception | None] = [TimeoutError(f"no answer within {seconds:g} s")]

    def work() -> None:
        try:
            action()
            outcome[0] = None
        except (HTTPError, *_LOAD_ERRORS) as error:
            outcome[0] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def _download(resolved: ResolvedModel) -> Path:
    patterns = _HUB_FILES + (["*.py"] if resolved.trust_remote_code else [])
    try:
        folder = huggingface_hub.snapshot_download(
            resolved.name,
            allow_patterns=patterns,
            ignore_patterns=["original/*", "consolidated*", "*/*"],
        )
    except (HTTPError, *_LOAD_ERRORS) as error:
        raise UserError(
            f"model_name {clean_line(resolved.name)}: the download from {_endpoint()} failed "
            f"({_short(error)}); start again to go on with it, or set HF_ENDPOINT to a mirror"
        ) from error
    return Path(folder)


# -----------------------------------------------------------------------------
# What a folder must hold


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise UserError unless the folder holds a configuration, whole safetensors and a tokenizer.

    Configurations that name code to run (`auto_map`) need trust_remote_code; keys for the library's
    internal use are refused, since they have been a way to run code.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model folder {folder} holds an adapter ({ADAPTER_CONFIG}); give the base model as "
            "--model-name and this folder as --init-adapter"
        )
    config = _read_json(folder / "config.json", "a model folder has one; is this the right folder?")
    _check_config(config, folder / "config.json", trust_remote_code)
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file():
        content = _read_json(tokenizer_config, "")
        _check_config(content, tokenizer_config, trust_remote_code)
    _check_weights(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"model folder {folder} has no tokenizer (tokenizer.json, or vocab.json with merges.txt); "
            "copy the tokenizer files of the original model into it"
        )


def _check_config(config: Mapping[str, Any], path: Path, trust_remote_code: bool) -> None:
    internal = [key for key in config if key.startswith("_") and key.endswith("_internal")]
    if internal:
        raise UserError(f"{path}: key {clean_line(internal[0])} is not allowed; remove it")
    if "auto_map" in config and not trust_remote_code:
        raise UserError(
            f"{path}: the model wants to run code of its own (auto_map). Read that code, and if you "
            "trust it, start with the flag --trust-remote-code; or remove the key if transformers "
            "knows this architecture"
        )


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        shards = _read_json(index, "").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise UserError(f"{index}: no weight_map; download the folder again")
        names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: {clean_line(name)} points outside the folder; don't use it")
        if not (folder / name).is_file():
            raise UserError(_missing_weights(folder, name))
        _check_safetensors(folder / name)


def _missing_weights(folder: Path, name: str) -> str:
    pickles = sorted(
        p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        return (
            f"model folder {folder} has its weights as pickle only ({clean_line(pickles[0])}), which can "
            "run code when read; get the safetensors version, or convert it where you trust it"
        )
    return f"model folder {folder} has no {clean_line(name)}; download the folder again"


def _check_safetensors(path: Path) -> None:
    """Reads the header only; the library checks that it covers the file exactly."""
    try:
        with safe_open(path, framework="pt") as file:
            count = len(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({_short(error)}); download it again"
        ) from error
    if not count:
        raise UserError(f"{path} holds no tensor; download it again")


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice or 'download the folder again'}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({_short(error)}); get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; get it again")
    return content


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
        folder = embedded_model.build_embedded(texts, cache_dir, seed)
    elif folder is None:
        folder = _download(resolved)
        check_model_folder(folder, resolved.trust_remote_code)
    with _as_user_error(f"the tokenizer of {folder}", "copy the original model's tokenizer files"):
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
    model = _load_base(resolved, folder, device, dtype, quantization)
    _check_vocabulary(model, tokenizer, folder)
    if gradient_checkpointing:
        recompute_activations(model)
    if lora_r == 0:
        return model.requires_grad_(True)
    base_name = resolved.name if _hub_spelling(resolved) else str(folder)
    if init_adapter:
        return _load_adapter(model, Path(init_adapter).expanduser(), base_name)
    config = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=_known_modules(model, target_modules),
        rank_pattern=dict(rank_pattern or {}),
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    _check_patterns(model, config)
    return _with_adapters(model, config, seed)


def recompute_activations(model: torch.nn.Module) -> None:
    """Gradient checkpointing from the next forward pass on; the model may have adapters.

    Under the name that this version of transformers has for it.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    new = "activation_checkpointing_enable"
    draws = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")(
        # What draws no random number needs no random state, which no CUDA graph can set back.
        {"use_reentrant": False, "preserve_rng_state": draws}
    )


def weight_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Type of the base's weights: "auto" is bf16 on a CUDA GPU that has it, else fp32. Raises UserError.

    "fp8" is bf16 beside FP8 copies, on a GPU that multiplies them.
    """
    if precision == "fp8":
        require_fp8(device)
        return torch.bfloat16
    on_gpu = device.type == "cuda"
    fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and on_gpu and not fast:
        raise UserError(
            f"precision bf16: {torch.cuda.get_device_name(device)} has no bf16; use --precision auto"
        )
    return (
        torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast) else torch.float32
    )


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers; shared weights count once, packed 4-bit weights as what they mean."""
    counts = [(p.requires_grad, _size(p)) for p in model.parameters()]
    return sum(n for trainable, n in counts if trainable), sum(n for _, n in counts)


def _size(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def _hub_spelling(resolved: ResolvedModel) -> bool:
    """Whether the name means the same on another machine."""
    return not resolved.embedded and resolved.reason != "local folder"


def _load_base(
    resolved: ResolvedModel,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
) -> PreTrainedModel:
    """Weights are mapped from the file and go straight to the device. No weight may be missing."""
    advice = "download it again, or check that this version of transformers knows the architecture"
    with _as_user_error(f"model folder {folder}", advice):
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


@contextmanager
def _as_user_error(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{what} does not fit into the device's memory; use --quantization 4bit, a smaller model, "
            "or a device with more memory"
        ) from error
    except (SafetensorError, *_LOAD_ERRORS) as error:
        raise UserError(f"{what} can't be loaded ({_short(error)}); {advice}") from error


def _short(error: Exception) -> str:
    return clean_line(redact(str(error) or type(error).__name__), 300)


# -----------------------------------------------------------------------------
# Adapters


def _with_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Fresh adapters: B zero, A drawn on the CPU from `seed`; fp32 whatever the base is."""
    model.name_or_path = config.base_model_name_or_path  # peft writes this name, not the config's
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"adapter settings: {_short(error)}") from error


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of all linear layers except the output head, sorted."""
    head = model.get_output_embeddings()
    kinds = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is not head and isinstance(module, torch.nn.Linear)
    }
    return sorted(kinds)


def _known_modules(model: PreTrainedModel, wanted: Sequence[str]) -> list[str] | str:
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


def _check_patterns(model: PreTrainedModel, config: LoraConfig) -> None:
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


def load_for_inference(
    folder: Path, *, device: str | torch.device, precision: str = "auto", base_model: str = ""
) -> tuple[PeftModel | PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A saved adapter on its base, or a whole model folder, ready to generate; and its tokenizer.

    `base_model` replaces the base that the adapter's configuration names.
    """
    device, is_adapter = torch.device(device), (folder / ADAPTER_CONFIG).is_file()
    resolved = (
        _base_of(folder, device, base_model) if is_adapter else _named_model(str(folder), False)
    )
    tokenizer = load_tokenizer(resolved)
    dtype = weight_dtype(device, precision)
    model = _load_base(resolved, Path(tokenizer.name_or_path), device, dtype, "none")
    if is_adapter:
        model = _load_adapter(model, folder, resolved.name)
    model.config.use_cache = True
    return model.eval(), tokenizer


def _base_of(adapter: Path, device: torch.device, base_model: str = "") -> ResolvedModel:
    name = base_model or _adapter_config(adapter).base_model_name_or_path
    if not name:
        raise UserError(f"{adapter / ADAPTER_CONFIG} names no base model; give it as --base-model")
    return resolve_model(name, device)


def _load_adapter(model: PreTrainedModel, folder: Path, base_name: str) -> PeftModel:
    """A saved LoRA adapter as the trainable start; rank and modules are the adapter's own."""
    config = _adapter_config(folder)
    config.base_model_name_or_path = base_name
    peft_model = _with_adapters(model, config, seed=0)
    _load_exactly(peft_model, _adapter_tensors(folder), f"adapter {folder}")
    return peft_model


def _adapter_config(folder: Path) -> LoraConfig:
    path = folder / ADAPTER_CONFIG
    content = _read_json(path, "an adapter folder of peft, TRL or LLaMA-Factory has one")
    if content.get("peft_type") != "LORA":
        kind = clean_line(str(content.get("peft_type")), 40)
        raise UserError(f"{path}: peft_type is {kind}, only LORA adapters can be continued")
    init = str(content.get("init_lora_weights") or "").lower()
    if init.startswith(BASE_CHANGING):
        raise UserError(
            f"{path}: initialised with {clean_line(init, 40)}, which changes the base weights; merge that "
            "adapter into its base, or convert it to plain LoRA, first"
        )
    with _as_user_error(str(path), "save the adapter again with a current peft"):
        config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.init_lora_weights = False, True
    return config


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
    _check_safetensors(path)
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


def save_adapter(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    directory: Path,
    *,
    run: str = "",
    dtype: torch.dtype = torch.float32,
    writes: bool = True,
) -> None:
    """Write what `PeftModel.from_pretrained` loads, and the tokenizer; the whole model at lora_r 0.

    The folder appears whole (a staging folder is renamed) and replaces an earlier one. The adapter's
    configuration names its base: a hub name as it is, else the absolute path of the folder.

    run: name of the run that trained it, for `run_directory.own_models`.
    dtype: of a whole model's weights in the file; that of the arithmetic, so that the file is the model
        that was measured. writes: false on all ranks but one, which gathers what the others hold parts of.
    """
    state = {}
    for name, tensor in adapter_state(model).items():
        whole = full_tensor(tensor)
        if writes:
            state[name] = whole.to("cpu", tensor.dtype if isinstance(model, PeftModel) else dtype)
        del whole  # no more than one at a time
    if writes:
        _save_folder(directory, tokenizer, lambda path: _write_model_files(model, state, path), run)


def export_merged(
    adapter: Path, directory: Path, *, base_model: str = "", precision: str = "auto"
) -> Path:
    """Fold a saved adapter into its base on the CPU and write a plain model folder; returns its path.

    The sum W + s·B·A is made in fp32 and then rounded once to the base's own type ("auto"), fp32 or
    bf16. `base_model` replaces the base that the adapter's configuration names.
    """
    resolved = _base_of(adapter, torch.device("cpu"), base_model)
    tokenizer = load_tokenizer(resolved)
    folder = Path(tokenizer.name_or_path)
    base = _load_base(resolved, folder, torch.device("cpu"), torch.float32, "none")
    dtype = (
        saved_dtype(folder) if precision == "auto" else weight_dtype(torch.device("cpu"), precision)
    )
    merged = _load_adapter(base, adapter, resolved.name).merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    _save_folder(directory, tokenizer, lambda path: merged.to(dtype).save_pretrained(path))
    return directory


def saved_dtype(folder: Path) -> torch.dtype:
    """The type of the weights in a model folder, from its configuration."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config, "dtype", None) or torch.float32


def _write_model_files(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], directory: Path
) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if not isinstance(model, PeftModel):
        model.save_pretrained(directory, state_dict=state)
        model.config.dtype = next(iter(state.values())).dtype  # not that of the weights in training
        model.config.save_pretrained(directory)
        return
    save_file(state, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    for name, content in adapter_documents(model).items():
        write_json(directory / name, content)


def _save_folder(
    directory: Path, tokenizer: Any, write: Callable[[Path], None], run: str = ""
) -> None:
    """Fill a staging folder, make it durable, and put it in the place of `directory`."""
    staging = directory.with_name(f".{directory.name}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write(staging)
        tokenizer.save_pretrained(staging)
        if run:
            (staging / RUN_NAME).write_text(f"{run}\n", encoding="utf-8")
        for path in staging.iterdir():
            path.chmod(usual_mode())  # safetensors' is 0600
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        _replace(staging, directory)
    except Exception as error:
        # A full disk is a SafetensorError to safetensors and a bare Exception to tokenizers.
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(f"{directory}: {error}") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, directory: Path) -> None:
    """Rename `staging` to `directory`; an earlier folder steps aside first and then goes."""
    old = directory.with_name(f".{directory.name}-old-{os.getpid()}")
    if directory.exists():
        directory.rename(old)
    staging.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
