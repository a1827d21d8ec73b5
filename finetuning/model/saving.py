"""A trained model to a folder, whole or not at all.

Every folder stops where training taught the model to stop: at the token that ends the template's turns. The
configurations of a base model name another one.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import (
    PeftModel,
)
from safetensors import SafetensorError
from safetensors.torch import save_file

from finetuning.common.files import (
    fsync_files,
    give_mode,
    publish_folder,
    staging_folder,
    usual_mode,
    write_json,
)
from finetuning.common.paths import utf8_twin
from finetuning.data.chat_template import chat_format
from finetuning.model.adapter_files import ADAPTER_WEIGHTS
from finetuning.model.adapters import adapter_documents, adapter_state
from finetuning.model.merging import PRECISIONS, MergedModel
from finetuning.model.parallel import full_tensor

TORCH_TYPES = {precision: dtype for dtype, precision in PRECISIONS.items()}


def save_adapter(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    directory: Path,
    *,
    notes: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    writes: bool = True,
) -> None:
    """Write what `PeftModel.from_pretrained` loads, and the tokenizer; the whole model at lora_r 0.

    The folder appears whole (a staging folder is renamed) and replaces an earlier one. The adapter's
    configuration names its base: a hub name as it is, else the absolute path of the folder.

    notes: file name -> text of small files beside the model, such as the name of its run.
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
        end_id = chat_format(tokenizer).end_id
        _save_folder(
            directory, tokenizer, lambda path: _write_model_files(model, state, end_id, path), notes
        )


def save_merged(merged: MergedModel, directory: Path, precision: str) -> None:
    """Fill an empty folder with a plain model, its weights rounded once to `precision` (fp32, fp16, bf16)."""
    stop_at_turns(merged)
    model = merged.model.to(TORCH_TYPES[precision])
    _fill(directory, merged.tokenizer, model.save_pretrained)


def stop_at_turns(merged: MergedModel) -> None:
    """Let the model's configurations name the token at which training taught it to stop."""
    _stop_at(merged.model, chat_format(merged.tokenizer).end_id)


def _write_model_files(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], end_id: int, directory: Path
) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if not isinstance(model, PeftModel):
        _stop_at(model, end_id)
        model.save_pretrained(directory, state_dict=state)
        model.config.dtype = next(iter(state.values())).dtype  # not that of the weights in training
        model.config.save_pretrained(directory)
        return
    save_file(state, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    for name, content in adapter_documents(model).items():
        write_json(directory / name, content)


def _stop_at(model: transformers.PreTrainedModel, end_id: int) -> None:
    """Let the configurations name the token that training put at the end of a turn, first of all."""
    for configuration in (model.config, getattr(model, "generation_config", None)):
        if configuration is None:
            continue
        known = configuration.eos_token_id
        known = known if isinstance(known, (list, tuple)) else [known]
        ends = [end_id, *(token for token in known if token not in (None, end_id))]
        if end_id not in known or isinstance(configuration.eos_token_id, (list, tuple)):
            configuration.eos_token_id = ends if len(ends) > 1 else end_id


@contextmanager
def _ending_turns(tokenizer: Any) -> Iterator[None]:
    """Within it, the tokenizer's `eos_token` is the one that ends a turn."""
    known, end = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(chat_format(tokenizer).end_id)
    tokenizer.eos_token = end
    try:
        yield
    finally:
        tokenizer.eos_token = known


def _save_folder(
    directory: Path,
    tokenizer: Any,
    write: Callable[[Path], None],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Fill a staging folder, make it durable, and put it in the place of `directory`."""
    with staging_folder(directory.parent, f".{directory.name}-", str(os.getpid())) as staging:
        _fill(staging, tokenizer, write, notes)
        publish_folder(staging, directory)


def _fill(
    folder: Path,
    tokenizer: Any,
    write: Callable[[Path], None],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write model, tokenizer and notes into an empty folder; all of it is on the disk then."""
    try:
        write(folder)
        with _ending_turns(tokenizer), utf8_twin(folder) as place:
            tokenizer.save_pretrained(place)
        for name, text in (notes or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        for path in folder.iterdir():
            give_mode(path, usual_mode())  # safetensors' is 0600
        fsync_files(folder)
    except Exception as error:
        # A full disk is a SafetensorError to safetensors and a bare Exception to tokenizers.
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(f"{folder}: {error}") from error
        raise
