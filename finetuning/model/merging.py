"""Whether a merged model is the trained one: their logits compared."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuning.data.chat_template import encode_prompt
from finetuning.model.loading import load_for_inference

PROMPTS = (
    "SM4的分组长度和密钥长度各是多少比特？",
    "RSA中p=61、q=53、e=17，求私钥指数d。",
    "What does a nonce protect against in AES-GCM?",
)
# Largest difference of a logit, in standard deviations of the logits, times what the adapter moves them
# if that is more than one: rounding takes a share of each merged weight, so it grows with the adapter.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


@dataclass(frozen=True)
class Agreement:
    """Logits of the merged model against those of base and adapter apart, in standard deviations."""

    difference: float  # largest, over all prompts, positions and words
    effect: float  # the same between base and trained model: what the adapter does


def logits_apart(
    adapter: Path, device: torch.device, base_model: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with the adapter, and of its base alone."""
    model, tokenizer = load_for_inference(
        adapter, device=device, precision="fp32", base_model=base_model
    )
    trained = prompt_logits(model, tokenizer)
    with model.disable_adapter():
        return trained, prompt_logits(model, tokenizer)


def logits_of(folder: Path, device: torch.device) -> torch.Tensor:
    """Logits of a model folder, as another program would load it."""
    gc.collect()  # the model before this one has reference cycles and is as large
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


def compare(merged: torch.Tensor, trained: torch.Tensor, base: torch.Tensor) -> Agreement:
    """Largest differences in units of the logits' standard deviation."""
    unit = trained.std()
    difference, effect = ((other - trained).abs().max() / unit for other in (merged, base))
    return Agreement(difference.item(), effect.item())
