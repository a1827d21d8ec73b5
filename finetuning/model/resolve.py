"""Which model a name means: a folder, a cached download, the hub, the demonstration model, a trained one."""

import os
import re
import threading
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
from safetensors import SafetensorError, safe_open

from finetuning.common.bounds import CARD_HEAD
from finetuning.common.errors import UserError
from finetuning.common.files import read_json_object, regular
from finetuning.common.text import clean_line, redact
from finetuning.config import EMBEDDED
from finetuning.model import demo_model
from finetuning.model.adapter_files import ADAPTER_CONFIG
from finetuning.model.fp8_products import require_fp8
from finetuning.model.sizes import check_sizes

DEFAULT_MODEL = "Qwen/Qwen3-4B-Thinking-2507"
# Free GPU memory: 7.5 of bf16 weights or 15 of fp32 ones, 0.5 of adapter, the rest for a short row.
DEFAULT_MODEL_GIB = {torch.bfloat16: 12.0, torch.float32: 20.0}
HUB_TIMEOUT = 5.0  # seconds for "is the hub there?"
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "README.md"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError)


@dataclass(frozen=True)
class ResolvedModel:
    """Which model a run uses and why.

    `path` is its folder; None means it is still to be downloaded (hub) or built (embedded), which
    `ensure_local` does.
    """

    name: str
    path: Path | None
    embedded: bool
    reason: str
    trust_remote_code: bool = False
    revision: str = ""  # of the hub; empty: its main branch


# -----------------------------------------------------------------------------
# Which model


def resolve_model(
    model_name: str | None,
    device: str | torch.device,
    *,
    precision: str = "auto",
    trust_remote_code: bool = False,
    revision: str = "",
) -> ResolvedModel:
    """Find the model without loading it. `embedded` as the name asks for the embedded one.

    revision: branch, tag or commit of a model of the hub; empty: its main branch. Raises UserError for a
    name that can't be had, saying where it was looked for.
    """
    if model_name == EMBEDDED:
        return embedded_because("it was asked for by name")
    if model_name:
        return named_model(model_name, trust_remote_code, revision)
    obstacle = _no_room(torch.device(device), precision)
    if obstacle:
        return embedded_because(obstacle)
    try:
        return named_model(DEFAULT_MODEL, trust_remote_code, revision)
    except UserError as error:
        return embedded_because(f"{DEFAULT_MODEL} is not at hand: {error}")


def embedded_because(reason: str) -> ResolvedModel:
    """The embedded model, which is never a choice without a reason."""
    return ResolvedModel(EMBEDDED, None, True, reason)


def banner(resolved: ResolvedModel) -> str:
    """What to tell the user about the model: plain words when it is the embedded one."""
    if resolved.embedded:
        return demo_model.banner(resolved.reason)
    return f"{resolved.name}: {resolved.reason}"


def ensure_local(
    resolved: ResolvedModel,
    texts: Sequence[str] | Callable[[], Sequence[str]] = (),
    cache_dir: Path | None = None,
    seed: int = 0,
) -> ResolvedModel:
    """The same model with its folder on this machine.

    A hub model is downloaded. The embedded one is built below `cache_dir` from `texts` (or a function
    that gives them), training samples only.
    """
    if resolved.embedded:
        assert cache_dir is not None, "the embedded model needs a place to be kept"
        texts = texts() if callable(texts) else texts
        return replace(resolved, path=demo_model.build_embedded(texts, cache_dir, seed))
    if resolved.path is None:
        folder = download(resolved)
        check_model_folder(folder, resolved.trust_remote_code)
        return replace(resolved, path=folder)
    return resolved


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


def named_model(name: str, trust_remote_code: bool, revision: str = "") -> ResolvedModel:
    """A folder, then the caches, then the hub."""
    if folder := local_folder(name, revision):
        check_model_folder(folder, trust_remote_code)
        return ResolvedModel(name, folder, False, "local folder", trust_remote_code)
    if os.path.exists(os.path.expanduser(name)):
        raise UserError(f"model_name {clean_line(name)}: a file, but a model is a folder")
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise UserError(f"model_name {clean_line(name)}: no such folder; check the path")
    tried = [f"local folder {clean_line(name)} (not there)"]
    for what, cached in _cached_folders(name, revision):
        try:
            check_model_folder(cached, trust_remote_code)
            return ResolvedModel(name, cached, False, what, trust_remote_code, revision)
        except UserError as error:
            tried.append(f"{what} ({error})")
    obstacle = _hub_obstacle(name, revision)
    if obstacle is None:
        return ResolvedModel(name, None, False, f"hub {_endpoint()}", trust_remote_code, revision)
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


def local_folder(name: str, revision: str) -> Path | None:
    """The folder that the name is; None where it is none. Raises UserError for a revision of a folder."""
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        return None
    if revision:
        raise UserError(
            f"revision {clean_line(revision)} is for a model of the hub, and {clean_line(name)} is a "
            "folder; leave --revision out"
        )
    return folder.resolve()


def _cached_folders(name: str, revision: str) -> Iterator[tuple[str, Path]]:
    """Folders of this model that an earlier download left, complete or not."""
    repo = Path(hub_constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        commit = (repo / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    if commit and (repo / "snapshots" / commit).is_dir():
        yield "Hugging Face cache", repo / "snapshots" / commit
    if revision:  # ModelScope's cache does not say which one it holds
        return
    for parent in (
        _modelscope() / "models",
        _modelscope() / "hub" / "models",
        _modelscope() / "hub",
    ):
        for spelling in dict.fromkeys((name, name.replace(".", "___"))):
            if (parent / spelling).is_dir():
                yield "ModelScope cache", parent / spelling


def _modelscope() -> Path:
    return Path(os.path.expanduser(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"))


def _endpoint() -> str:
    return redact(hub_constants.ENDPOINT)


def _hub_obstacle(name: str, revision: str) -> str | None:
    """Why the hub does not give the model, or None when it does; answers within seconds."""
    if hub_constants.is_offline_mode():
        return f"hub {_endpoint()} (not asked: HF_HUB_OFFLINE is set)"

    def ask() -> None:
        url = huggingface_hub.hf_hub_url(name, "config.json", revision=revision or None)
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT)

    error = _within(HUB_TIMEOUT + 1, ask)
    if error is None:
        return None
    status = (
        error.response.status_code if isinstance(error, HfHubHTTPError) and error.response else None
    )
    if status in (401, 403, 404):
        why = f"answers {status}: no such model or revision, or no access to it (HF_TOKEN, licence)"
    elif status:
        why = f"answers {status}"
    else:
        why = f"not reachable: {short_reason(error)}"
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


def download(resolved: ResolvedModel) -> Path:
    """Fetch what a run needs of a hub model into the hub's cache; its folder. Raises UserError."""
    patterns = _HUB_FILES + (["*.py"] if resolved.trust_remote_code else [])
    try:
        folder = huggingface_hub.snapshot_download(
            resolved.name,
            revision=resolved.revision or None,
            allow_patterns=patterns,
            ignore_patterns=["original/*", "consolidated*", "*/*"],
        )
    except (HTTPError, *_LOAD_ERRORS) as error:
        raise UserError(
            f"model_name {clean_line(resolved.name)}: the download from {_endpoint()} failed "
            f"({short_reason(error)}); start again to go on with it, or set HF_ENDPOINT to a mirror"
        ) from error
    return Path(folder)


# -----------------------------------------------------------------------------
# What a folder must hold


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise UserError unless the folder holds a configuration, whole safetensors and a tokenizer.

    Configurations that name code to run (`auto_map`) need trust_remote_code; keys for the library's
    internal use are refused, since they have been a way to run code. A pipe or a device in it is refused.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model folder {folder} holds an adapter ({ADAPTER_CONFIG}); give the base model as "
            "--model-name and this folder as --init-adapter"
        )
    for path in folder.iterdir():  # the library opens what it knows by name
        if path.exists():  # a link into nothing is missing, which is said where it is needed
            regular(path)
    config = read_model_json(
        folder / "config.json", "a model folder has one; is this the right folder?"
    )
    _check_config(config, folder / "config.json", trust_remote_code)
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file():
        content = read_model_json(tokenizer_config, "")
        _check_config(content, tokenizer_config, trust_remote_code)
    check_sizes(config, folder / "config.json", _checked_weights(folder))
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


def _checked_weights(folder: Path) -> list[Path]:
    """The files that hold the weights, each whole."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        shards = read_model_json(index, "").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise UserError(f"{index}: no weight_map; download the folder again")
        names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: {clean_line(name)} points outside the folder; don't use it")
        if not (folder / name).is_file():
            raise UserError(_missing_weights(folder, name))
        check_safetensors(folder / name)
    return [folder / name for name in names]


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


def check_safetensors(path: Path) -> None:
    """Reads the header only; the library checks that it covers the file exactly."""
    try:
        with safe_open(path, framework="pt") as file:
            count = len(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({short_reason(error)}); download it again"
        ) from error
    if not count:
        raise UserError(f"{path} holds no tensor; download it again")


def read_model_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises UserError that says what to do."""
    if not path.exists():
        raise UserError(f"{path} is missing; {advice or 'download the folder again'}")
    try:
        return read_json_object(path)
    except UserError as error:
        raise UserError(f"{error}; get it again") from error


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


def hub_spelling(resolved: ResolvedModel) -> bool:
    """Whether the name means the same on another machine."""
    return not resolved.embedded and resolved.reason != "local folder"


def hub_name(resolved: ResolvedModel) -> str:
    """Under which name the hub has the model; empty where that is not known, as of most folders."""
    if hub_spelling(resolved):
        return resolved.name
    if resolved.embedded or resolved.path is None:
        return ""
    folder = resolved.path
    names = (
        folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1),
        f"{folder.parent.name}/{folder.name}".replace("___", "."),
    )
    return next((name for name in names if _is_cached_as(name, folder)), "")


def _is_cached_as(name: str, folder: Path) -> bool:
    """Whether a folder, resolved, is what a name of the hub means where there is no network."""
    cached = _cached_folders(name, "") if _HUB_NAME.fullmatch(name) else ()
    first = next((path for _, path in cached), None)
    return first is not None and first.resolve() == folder


def shared_name(resolved: ResolvedModel) -> str:
    """What others may call the model: the hub's name, else the last part of its folder's."""
    if resolved.embedded:
        return EMBEDDED
    assert resolved.path is not None or hub_spelling(resolved)
    return hub_name(resolved) or resolved.path.name


def short_reason(error: Exception) -> str:
    """What an error says, on one line, without secrets."""
    return clean_line(redact(str(error) or type(error).__name__), 300)


@contextmanager
def as_user_error(what: str, advice: str) -> Iterator[None]:
    """Turn what the libraries raise when they load `what` into a UserError with `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{what} does not fit into the device's memory; use --quantization 4bit, a smaller model, "
            "or a device with more memory"
        ) from error
    except (
        Exception
    ) as error:  # the tokenizers' library raises bare ones for a file of another version
        if not (type(error) is Exception or isinstance(error, (SafetensorError, *_LOAD_ERRORS))):
            raise
        raise UserError(f"{what} can't be loaded ({short_reason(error)}); {advice}") from error


def licence_of(folder: Path) -> str:
    """What the card of a model's folder names as its licence; empty where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    with open(regular(card), encoding="utf-8", errors="replace") as file:
        _, found, rest = file.read(CARD_HEAD.limit).partition("---\n")
    head = rest.partition("\n---")[0] if found else ""
    known = dict(re.findall(r"^(license|license_name): *([\w.+-]+) *$", head, re.MULTILINE))
    named = known.get("license", "")
    return known.get("license_name", named) if named == "other" else named


def saved_dtype(folder: Path) -> torch.dtype:
    """The type of the weights in a model folder, from its configuration."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config, "dtype", None) or torch.float32
