"""An adapter folded into its base; and whether what was made of it is the trained model, by their logits."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from finetuning.common.fingerprint import weight_files
from finetuning.data.chat_template import encode_prompt
from finetuning.model.adapter_files import is_adapter
from finetuning.model.adapters import load_adapter
from finetuning.model.loading import base_of, load_base, load_for_inference, load_tokenizer
from finetuning.model.resolve import ResolvedModel, named_model, saved_dtype
from finetuning.model.sizes import numbers_in

PROMPTS = (
    "SM4的分组长度和密钥长度各是多少比特？",
    "RSA中p=61、q=53、e=17，求私钥指数d。",
    "What does a nonce protect against in AES-GCM?",
)
# Largest difference of a logit, in standard deviations of the logits, times what the adapter moves them
# if that is more than one: rounding takes a share of each merged weight, so it grows with the adapter.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.1, "q8_0": 0.25}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "q8_0": 34 / 32}  # of a number
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class MergedModel:
    """A trained model without adapters, in fp32 on the CPU, and its tokenizer."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase


def model_below(folder: Path, base_model: str = "") -> ResolvedModel:
    """The base of a saved adapter, on this machine; a model that was trained whole is its own.

    base_model: replaces the base that the adapter's configuration names.
    """
    if is_adapter(folder):
        return base_of(folder, base_model)
    return named_model(str(folder), False)


def merged_model(folder: Path, base_model: str = "") -> MergedModel:
    """A saved adapter folded into its base, or a model that was trained whole. W + s·B·A is made in fp32."""
    gc.collect()  # a model that was compared before has reference cycles and is as large
    below = model_below(folder, base_model)
    tokenizer, model = load_tokenizer(below), load_base(below, torch.device("cpu"), torch.float32)
    if is_adapter(folder):
        model = load_adapter(model, folder, below.name).merge_and_unload(safe_merge=True)
    model.config.use_cache = True
    return MergedModel(model, tokenizer)


def own_precision(below: ResolvedModel) -> str:
    """A key of `TOLERANCE`: what the weights of a model's folder are held in."""
    assert below.path is not None
    return PRECISIONS.get(saved_dtype(below.path), "fp32")


def bytes_in(below: ResolvedModel, precision: str) -> int:
    """About how many bytes the weights of a model's folder take in a precision, a key of `BYTES`."""
    assert below.path is not None
    return round(numbers_in(weight_files(below.path)) * BYTES[precision])


@dataclass(frozen=True)
class Agreement:
    """Logits of the merged model against those of base and adapter apart, in standard deviations."""

    difference: float  # largest, over all prompts, positions and words
    effect: (
        float | None
    )  # the same between base and trained model: what the adapter does; None without one


def logits_apart(
    folder: Path, device: torch.device, base_model: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits with the adapter, and of its base alone; None for a model that was trained whole."""
    model, tokenizer = load_for_inference(
        folder, device=device, precision="fp32", base_model=base_model
    )
    trained = prompt_logits(model, tokenizer)
    if not is_adapter(folder):
        return trained, None
    with model.disable_adapter():
        return trained, prompt_logits(model, tokenizer)


def logits_of(folder: Path, device: torch.device) -> torch.Tensor:
    """Logits of a model folder, as another program would load it."""
    gc.collect()  # as above
    return prompt_logits(*load_for_inference(folder, device=device, precision="fp32"))


@torch.no_grad()
def prompt_logits(model: torch.nn.Module, tokenizer: Any) -> torch.Tensor:
    """(positions of all prompts, words) fp32 on the host."""
    rows = []
    for question in PROMPTS:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
        logits = model(
            input_ids=torch.tensor([prompt], device=model.device), use_cache=False
        ).logits
        rows.append(logits[0].float().cpu())
    return torch.cat(rows)


def compare(merged: torch.Tensor, trained: torch.Tensor, base: torch.Tensor | None) -> Agreement:
    """Largest differences in units of the logits' standard deviation."""

    def distance(other: torch.Tensor) -> float:
        return ((other - trained).abs().max() / trained.std()).item()

    return Agreement(distance(merged), None if base is None else distance(base))
