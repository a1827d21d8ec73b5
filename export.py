"""What a run has trained, for the tools that people use: a Hugging Face folder, a GGUF file, or ollama's.

    uv run python export.py --output qwen3-4b-thinking-crypto
    uv run --extra gguf python export.py --format gguf --precision q8_0 --output crypto.gguf
    uv run --extra gguf python export.py --format ollama --output crypto
    uv run python export.py --adapter best_model --output merged

Before anything appears under its name, its logits are compared with those of base and adapter apart.
"""

# ruff: noqa: E402  what is slow to import comes once the command line is known to be right

from finetuning.common import process  # first: Ctrl-C gets an answer while torch is loaded

if __name__ == "__main__":
    process.imports_begin()

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.common.arguments import parsed
from finetuning.common.destination import Destination
from finetuning.common.errors import RunStopped, UserError, exit_code
from finetuning.common.language import translated
from finetuning.common.machine import check_device_name
from finetuning.common.paths import expanded
from finetuning.common.terminal import Terminal
from finetuning.model.adapter_files import is_adapter
from finetuning.model.gguf_package import gguf_package
from finetuning.runs.result import Trained, base_named, find_trained


@dataclass(frozen=True)
class Export:
    """Make of a trained adapter, or a model that was trained whole, what other tools read."""

    output: str
    """Folder to write (for gguf: a file that ends in .gguf); it must not exist, or be an empty folder."""
    format: Literal["hf", "gguf", "ollama"] = "hf"
    """hf: a Hugging Face folder for transformers, vLLM and SGLang; gguf: one file for llama.cpp and LM
    Studio; ollama: such a file and its Modelfile."""
    adapter: str = ""
    """Adapter or model: a folder, or the name of one below output_dir, such as best_model or checkpoint-50;
    empty: the result of the newest run."""
    output_dir: str = "qwen3_4b_thinking_output"
    """Where a run has written final_model/, best_model/ and checkpoints/."""
    base_model: str = ""
    """Folder or hub name of the base; empty: the one that the adapter names."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "q8_0"] = "auto"
    """Type of the written weights; auto: that of the base. q8_0, about half of bf16: gguf and ollama only."""
    tolerance: float = 0.0
    """Largest difference of a logit that passes, in standard deviations (times what the adapter moves the
    logits, if that is more than one); 0: 0.001 in fp32, 0.1 in fp16, 0.25 in bf16 and q8_0."""
    device: str = "auto"
    """Where the logits are compared."""


def checked(settings: Export) -> tuple[Destination, Trained, str]:
    """Where to write, and what, on which given base.

    UserError for what can be known to be wrong before the model is looked at.
    """
    destination = destination_of(settings)
    trained = find_trained(settings.adapter, settings.output_dir)
    destination.check_outside(trained.folder)
    if settings.format != "hf":
        gguf_package()
    elif settings.precision == "q8_0":
        raise UserError("--precision q8_0 is for --format gguf and ollama; leave it out")
    elif not is_adapter(trained.folder):
        raise UserError(f"--adapter {trained.folder}: a whole model already; use it as it is")
    check_device_name(settings.device)
    return destination, trained, base_named(settings.base_model)


def destination_of(settings: Export) -> Destination:
    """Where to write. UserError where something is there, or for a name of another format."""
    output = Path(expanded(settings.output, "--output")).absolute()
    is_file = output.suffix == ".gguf"
    if is_file != (settings.format == "gguf"):
        kind = "a file that ends in .gguf" if settings.format == "gguf" else "a folder"
        raise UserError(f"--output {output}: --format {settings.format} writes {kind}")
    destination = Destination(output, is_file, "--output")
    destination.check_free()
    return destination


if __name__ == "__main__":  # help, and what is wrong, need none of the slow imports
    if refused := exit_code(lambda: checked(parsed("export.py", Export))):
        sys.exit(refused)
    print(translated("starting: the libraries are being loaded"), file=sys.stderr, flush=True)

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from finetuning.common.distributed import limit_threads, pick_device
from finetuning.config import EMBEDDED
from finetuning.model.gguf_file import check_architecture, read_gguf, write_gguf
from finetuning.model.gguf_tokens import vocabulary
from finetuning.model.loading import load_tokenizer
from finetuning.model.merging import (
    TOLERANCE,
    Agreement,
    bytes_in,
    compare,
    logits_apart,
    logits_of,
    merged_model,
    model_below,
    own_precision,
    prompt_logits,
)
from finetuning.model.modelfile import context_length, modelfile
from finetuning.model.resolve import ResolvedModel, licence_of, shared_name
from finetuning.model.sampling_defaults import SamplingDefaults
from finetuning.model.saving import save_merged, stop_at_turns
from finetuning.runs.directory import RunDirectory
from finetuning.runs.model_card import write_card
from finetuning.runs.origin import read_origin
from finetuning.runs.recorded import RecordedRun, read_recorded

process.imports_are_done()

WEIGHTS = "model.gguf"  # in ollama's folder
SERVED = {  # format -> what comes next
    "hf": "{0}/README.md has the lines for vLLM, SGLang and transformers",
    "gguf": "llama-server -m {0} --jinja",
    "ollama": "ollama create crypto -f {0}/Modelfile",
}


@dataclass(frozen=True)
class Source:
    """What is exported, and how."""

    folder: Path  # of an adapter, or of a model that was trained whole
    base_model: str
    name: str  # of what is written, without its suffix
    precision: str
    device: torch.device
    origin: Mapping[str, Any]  # what the folder says of where it has come from
    record: RecordedRun | None  # of the run that has trained it, where that lies beside it


def export(settings: Export, terminal: Terminal) -> Agreement:
    """Write it once its logits agree. Raises RunStopped where they don't."""
    destination, trained, base_model = checked(settings)
    limit_threads()
    below = model_below(trained.folder, base_model)
    origin = origin_of(trained.folder, below)
    check_possible(settings, below, origin)
    precision = own_precision(below) if settings.precision == "auto" else settings.precision
    output = destination.path
    with destination.held(bytes_in(below, precision)) as staging:
        device = pick_device(settings.device)
        record = record_of(origin, trained.folder, terminal)
        name = output.name.removesuffix(".gguf")
        source = Source(trained.folder, base_model, name, precision, device, origin, record)
        terminal.info(f"exporting {trained.folder} ({trained.reason})")
        with terminal.working("asking the trained model"):
            apart = logits_apart(trained.folder, device, base_model)
        made = staging / output.name if destination.is_file else staging
        try:
            agreement = made_and_checked(settings, source, made, apart, terminal)
            destination.publish(made)
        except OSError as error:
            raise RunStopped(
                f"--output {output}: can't be written ({error.strerror or error}); free its disk, or choose "
                "another place"
            ) from error
    terminal.final(f"model: {output}")
    terminal.info(f"serve it: {SERVED[settings.format].format(shlex.quote(str(output)))}")
    return agreement


def made_and_checked(
    settings: Export,
    source: Source,
    made: Path,
    apart: tuple[torch.Tensor, torch.Tensor | None],
    terminal: Terminal,
) -> Agreement:
    """Write it, and compare its logits with those `apart` (trained, base)."""
    with terminal.working("writing and reading back"):
        agreement = compare(WRITERS[settings.format](source, made), *apart)
    check(agreement, settings.tolerance or TOLERANCE[source.precision], terminal)
    return agreement


def check_possible(settings: Export, below: ResolvedModel, origin: Mapping[str, Any]) -> None:
    """UserError where the model can't be written so; before any weights are loaded."""
    if settings.format == "hf":
        return
    config = AutoConfig.from_pretrained(below.path, local_files_only=True)
    check_architecture(config)
    vocabulary(load_tokenizer(below), config.vocab_size)
    if settings.format == "ollama":
        modelfile_of(below, origin)


def origin_of(folder: Path, below: ResolvedModel) -> dict[str, Any]:
    """What the folder says of where its model has come from; an adapter's base as others may call it."""
    origin = read_origin(folder)
    base = origin.get("base", {})
    if is_adapter(folder) and base.get("model") != EMBEDDED:
        assert below.path is not None
        base = {"licence": licence_of(below.path), **base, "model": shared_name(below)}
    return {**origin, "base": base}


def record_of(origin: Mapping[str, Any], folder: Path, terminal: Terminal) -> RecordedRun | None:
    """The record of the run that has trained the model in a folder; a broken one is told and left out."""
    for output in folder.absolute().parents[
        :3
    ]:  # final_model/, checkpoints/, earlier_models/<run>/
        run = RunDirectory(output, origin.get("run", ""))
        if run.name and (run.logs / "metrics.jsonl").is_file():
            try:
                return read_recorded(run)
            except UserError as error:
                terminal.warning(f"the model's card is without its run: {error}")
    return None


# -----------------------------------------------------------------------------
# The formats: each writes, and returns the logits of what it has written


def write_hf(source: Source, folder: Path) -> torch.Tensor:
    """A plain model folder with a card."""
    save_merged(merged_model(source.folder, source.base_model), folder, source.precision)
    write_card(folder, source.name, "merged", source.origin, source.record)
    return logits_of(folder, source.device)


def write_file(source: Source, path: Path) -> torch.Tensor:
    """A GGUF file; its weights, rounded as they are there, take the place of those in memory."""
    merged = merged_model(source.folder, source.base_model)
    stop_at_turns(merged)
    write_gguf(merged.model, merged.tokenizer, path, source.precision, source.name)
    read_gguf(path, merged.model)
    return prompt_logits(merged.model.to(source.device), merged.tokenizer)


def write_ollama(source: Source, folder: Path) -> torch.Tensor:
    """A GGUF file and its Modelfile."""
    text = modelfile_of(model_below(source.folder, source.base_model), source.origin)
    (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    return write_file(source, folder / WEIGHTS)


def modelfile_of(below: ResolvedModel, origin: Mapping[str, Any]) -> str:
    """The Modelfile of a model on this base. UserError where it can't be written."""
    assert below.path is not None
    generation = None
    if (below.path / GENERATION_CONFIG_NAME).is_file():
        generation = GenerationConfig.from_pretrained(below.path, local_files_only=True)
    config = AutoConfig.from_pretrained(below.path, local_files_only=True)
    longest = origin.get("trained", {}).get("max_seq_length", 0)
    context = context_length(config.max_position_embeddings, longest)
    defaults, system = SamplingDefaults.of(generation), origin.get("system_prompt", "")
    return modelfile(WEIGHTS, load_tokenizer(below), defaults, context, system)


WRITERS = {"hf": write_hf, "gguf": write_file, "ollama": write_ollama}


def check(agreement: Agreement, tolerance: float, terminal: Terminal) -> None:
    """Say how well the logits agree. RunStopped where they don't."""
    difference, effect = agreement.difference, agreement.effect
    limit = tolerance * max(1.0, effect or 0.0)
    terminal.info(
        f"exported against trained: largest difference of a logit {difference:.2g} standard deviations "
        f"(at most {limit:.2g})"
    )
    if effect is not None:
        terminal.info(f"the adapter itself moves a logit by up to {effect:.2g} of them")
    if not (math.isfinite(difference) and difference <= limit):
        raise RunStopped(
            f"the exported model differs by {difference:.2g} standard deviations, more than {limit:.2g}; "
            "nothing was written. Try --precision fp32"
        )
    if effect == 0:
        terminal.warning(
            "the adapter changes nothing: what is exported answers as its base does. It was probably not "
            "trained; look at --adapter, and at the loss of its run"
        )
    elif effect is not None and difference > 0.5 * effect:
        terminal.warning(
            "rounding the merged weights changes the logits by half as much as the adapter does, or "
            "more; --precision fp32 keeps what it has learned"
        )


def main(arguments: list[str] | None = None) -> int:
    """The program; exit code 3: the exported model is not the trained one."""
    return exit_code(lambda: export(parsed("export.py", Export, arguments), Terminal()))


if __name__ == "__main__":
    process.exit_process(main())
