"""Fold an adapter into its base: a plain Hugging Face folder for transformers, vLLM and others.

    uv run python export.py --output qwen3-4b-thinking-crypto
    uv run python export.py --adapter qwen3_4b_thinking_output/best_model --output merged

Before the folder appears, its logits are compared with those of base and adapter apart.
"""

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from finetuning.common.distributed import limit_threads, pick_device
from finetuning.common.errors import RunStopped, UserError, exit_code
from finetuning.common.paths import check_name, expanded
from finetuning.common.terminal import Terminal
from finetuning.model.merging import TOLERANCE, Agreement, compare, logits_apart, logits_of
from finetuning.model.resolve import is_adapter, saved_dtype
from finetuning.model.saving import export_merged
from finetuning.runs.result import find_trained


@dataclass(frozen=True)
class Export:
    """Merge an adapter into its base and write a plain model folder."""

    output: str
    """Folder to write; it must not exist, or be empty."""
    adapter: str = ""
    """Adapter folder; empty: the newest below output_dir, or a stopped run's best one."""
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


def export(settings: Export, terminal: Terminal) -> Agreement:
    """Write the folder once its logits agree. Raises RunStopped where they don't."""
    output = Path(expanded(settings.output, "--output"))
    check_name(output, "--output")
    base_model = expanded(settings.base_model, "--base-model")
    limit_threads()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists; choose a folder that does not")
    adapter = find_trained(settings.adapter, settings.output_dir)
    if not is_adapter(adapter):
        raise UserError(f"--adapter {adapter}: a whole model already; use it as it is")
    device = pick_device(settings.device)
    terminal.info(f"merging {adapter}")
    trained, base = logits_apart(adapter, device, base_model)
    unchecked = output.absolute().with_name(f".{output.name}-unchecked")
    try:
        export_merged(adapter, unchecked, base_model=base_model, precision=settings.precision)
        agreement = compare(logits_of(unchecked, device), trained, base)
        check(
            agreement, settings.tolerance or TOLERANCE.get(saved_dtype(unchecked), 0.25), terminal
        )
        if output.exists():
            output.rmdir()
        unchecked.rename(output)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    terminal.final(f"model: {output}")
    return agreement


def check(agreement: Agreement, tolerance: float, terminal: Terminal) -> None:
    """Say how well the logits agree. RunStopped where they don't."""
    difference, effect = agreement.difference, agreement.effect
    limit = tolerance * max(1.0, effect)
    terminal.info(
        f"merged against apart: largest difference of a logit {difference:.2g} standard deviations "
        f"(at most {limit:.2g}); the adapter itself moves them by {effect:.2g}"
    )
    if not (math.isfinite(difference) and difference <= limit):
        raise RunStopped(
            f"the merged model differs by {difference:.2g} standard deviations, more than {limit:.2g}; "
            "nothing was written. Try --precision fp32"
        )
    if difference > 0.5 * effect > 0:
        terminal.warning(
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
