"""Fold an adapter into its base: a plain Hugging Face folder for transformers, vLLM and others.

    uv run python export.py --output qwen3-4b-thinking-crypto
    uv run python export.py --adapter qwen3_4b_thinking_output/best_model --output merged

Before the folder appears, its logits are compared with those of base and adapter apart.
"""

import gc
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from chat_format import encode_prompt
from command_line import exit_code
from distributed import pick_device
from errors import RunStopped, UserError
from model_loading import export_merged, load_for_inference, saved_dtype
from terminal import Terminal
from trained_model import find_trained, is_adapter

PROMPTS = (
    "SM4的分组长度和密钥长度各是多少比特？",
    "RSA中p=61、q=53、e=17，求私钥指数d。",
    "What does a nonce protect against in AES-GCM?",
)
# Largest difference of a logit, in standard deviations of the logits, times what the adapter moves them
# if that is more than one: rounding takes a share of each merged weight, so it grows with the adapter.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


@dataclass(frozen=True)
class Export:
    """Merge an adapter into its base and write a plain model folder."""

    output: str
    """Folder to write; it must not exist, or be empty."""
    adapter: str = ""
    """Adapter folder; empty: the newest below output_dir."""
    output_dir: str = "qwen3_4b_thinking_output"
    """Where a run has written final_model/, best_model/ and checkpoints/."""
    base_model: str = ""
    """Folder or hub name of the base; empty: the one that the adapter names."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the written weights; auto: that of the base."""
    tolerance: float = 0.0
    """Largest difference of a logit that passes, in standard deviations (times what the adapter moves the
    logits, if that is more than one); 0: 0.001 in fp32, 0.25 in bf16."""
    device: str = "auto"
    """Where the logits are compared."""


@dataclass(frozen=True)
class Agreement:
    """Logits of the merged model against those of base and adapter apart, in standard deviations."""

    difference: float  # largest, over all prompts, positions and words
    effect: float  # the same between base and trained model: what the adapter does


def export(settings: Export, terminal: Terminal) -> Agreement:
    """Write the folder once its logits agree. Raises RunStopped where they don't."""
    output = Path(settings.output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists; choose a folder that does not")
    adapter = find_trained(settings.adapter, settings.output_dir)
    if not is_adapter(adapter):
        raise UserError(f"--adapter {adapter}: a whole model already; use it as it is")
    device = pick_device(settings.device)
    terminal.say(f"merging {adapter}")
    trained, base = logits_apart(adapter, device, settings.base_model)
    unchecked = output.absolute().with_name(f".{output.name}-unchecked")
    try:
        export_merged(
            adapter, unchecked, base_model=settings.base_model, precision=settings.precision
        )
        agreement = compare(logits_of(unchecked, device), trained, base)
        check(
            agreement, settings.tolerance or TOLERANCE.get(saved_dtype(unchecked), 0.25), terminal
        )
        if output.exists():
            output.rmdir()
        unchecked.rename(output)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    terminal.conclude(f"model: {output}")
    return agreement


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


def check(agreement: Agreement, tolerance: float, terminal: Terminal) -> None:
    """Say how well the logits agree. RunStopped where they don't."""
    difference, effect = agreement.difference, agreement.effect
    limit = tolerance * max(1.0, effect)
    terminal.say(
        f"merged against apart: largest difference of a logit {difference:.2g} standard deviations "
        f"(at most {limit:.2g}); the adapter itself moves them by {effect:.2g}"
    )
    if not (math.isfinite(difference) and difference <= limit):
        raise RunStopped(
            f"the merged model differs by {difference:.2g} standard deviations, more than {limit:.2g}; "
            "nothing was written. Try --precision fp32"
        )
    if difference > 0.5 * effect > 0:
        terminal.warn(
            "rounding the merged weights changes the logits by half as much as the adapter does, or "
            "more; --precision fp32 keeps what it has learned"
        )


def main(arguments: list[str] | None = None) -> int:
    """The program; exit code 3: the merged model is not the trained one."""
    return exit_code(
        lambda: export(tyro.cli(Export, args=arguments, use_underscores=False), Terminal())
    )


if __name__ == "__main__":
    sys.exit(main())
