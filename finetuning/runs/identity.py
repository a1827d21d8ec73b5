"""What makes two runs the same run: for a resume, and for the ranks of one run. Content counts, not names."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetuning.common.errors import UserError
from finetuning.common.files import strict
from finetuning.common.fingerprint import text_digest
from finetuning.common.remote import shown_address
from finetuning.common.text import REDACTED, redact
from finetuning.config import NAMES_AND_PATHS, DirectTrainingConfig, allowed_values
from finetuning.data.packing import StepPlan
from finetuning.data.training_data import TrainingData
from finetuning.monitoring.alert_command import program_of
from finetuning.monitoring.channels import service_of

LORA = ("lora_r", "lora_alpha", "use_rslora", "use_dora")
# Settings that say where something lies, who works and who is told.
PLACES = (
    "model_name",
    "init_adapter",
    "data_path",
    "eval_path",
    "output_dir",
    "cache_dir",
    "workers",
    "notify",
    "mirror",
)
# Of what is partly shown: the part.
SHOWN_PART = {"alert_actions": program_of, "notify": service_of, "mirror": shown_address}
# By these the same samples make other steps.
ORDER = ("seed", "packing", "max_seq_length", "tokens_per_row", "empty_thinking")
# Digests, by what a person calls that of which they are.
CONTENTS = {
    "model_weights": "the model's weights",
    "model_config": "the model's config.json or code",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "init_adapter": "the adapter of init_adapter",
    "data": "the training data",
    "held_out_data": "the data of eval_path",
    "documents": "the lengths of the training documents",
    "general_text": "the data of general_path",
    "questions": "the data of probe_path",
}
# By these a run is measured, not trained: it may go on without, or begin with them, but not with others.
MEASURED_BY = ("general_text", "questions")
# Cut differently by tokenizers that are not the same, even where the vocabularies are.
PROBE = (
    "SM4的分组长度是128比特，共32轮。  RSA-2048: c = m^e mod n;\n\tfoo_bar()  ①②③ ＳＭ３ naïve 🔑"
)


def identity(
    settings: Mapping[str, Any],
    model: str,
    contents: Mapping[str, str],
    data: TrainingData,
    plan: StepPlan,
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it, or the steps would not be the same.

    model: the name under which it was found, which is only told. contents: digests of model, tokenizer, and
    what the run is measured by (`MEASURED_BY`; empty: nothing of the user's).
    """
    lengths = data.train.tokens.lengths[data.train.documents].tobytes()
    held_out = data.split.eval_read
    return {
        "model": model,
        **contents,
        "data": data.split.read.fingerprint,
        "held_out_data": held_out.fingerprint if held_out else "",
        "documents": hashlib.sha256(lengths).hexdigest()[:16],
        "rows_per_step": plan.rows_per_step,
        "steps": plan.num_steps,
        **{name: settings[name] for name in (*LORA, *ORDER)},
        "target_modules": sorted(settings["target_modules"]),
    }


def tokenizer_contents(tokenizer: Any) -> dict[str, str]:
    """Digests of a tokenizer, by its vocabulary and by how it cuts a text, and of its chat template."""
    ids = tokenizer.get_vocab()
    vocabulary = "\0".join(sorted(ids, key=ids.get))  # JSON of all would take half a second
    gaps = "" if len(ids) == max(ids.values()) + 1 else str(sorted(ids.values()))
    cut = json.dumps(tokenizer.encode(PROBE, add_special_tokens=False))
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    ends = f"{tokenizer.eos_token} {tokenizer.bos_token}"
    return {
        "tokenizer": text_digest(vocabulary, gaps, cut, ends),
        "chat_template": text_digest(template),
    }


def check_identity(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    path: object,
    *,
    finished: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Raise UserError naming every difference between a checkpoint's identity and this run's.

    finished: the checkpoint is that of the run's last step. warn: told what is not known to be the same,
    as the checkpoint is of a version that did not write it down.
    """
    unknown = [
        text
        for name, text in CONTENTS.items()
        if name in wanted and name not in found and (wanted[name] or name not in MEASURED_BY)
    ]
    by_content = "model_weights" in found
    names = [name for name in wanted if name in found and not (by_content and name == "model")]
    absent = [n for n in MEASURED_BY if not (found.get(n) and wanted.get(n))]
    names = [name for name in names if name not in absent]
    if (
        not by_content and wanted["init_adapter"]
    ):  # it wrote down the settings, not the adapter's own
        names = [name for name in names if name not in (*LORA, "target_modules")]
    differences = [
        _difference(name, found, wanted) for name in names if found[name] != wanted[name]
    ]
    if not differences:
        if unknown:
            text = "is of an earlier version; whether these are the same is not known"
            warn(f"{path} {text}: {', '.join(unknown)}")
        return
    advice = (
        "Use the settings and data of the run that wrote it, or start a fresh run without --resume"
    )
    if not by_content and found.get("model") != wanted["model"]:
        advice = (
            "The checkpoint is of an earlier version, which knew a model by its name only: give that as "
            "--model-name, or start a fresh run without --resume"
        )
    if finished and found.get("steps") != wanted["steps"]:
        advice += (
            ". That run is finished, and its learning rate has come to its end: to train on, start a new "
            "run with --init-adapter final_model (at lora_r 0: --model-name final_model) and another "
            "--output-dir"
        )
    raise UserError(f"--resume {path}: {'; '.join(differences)}. {advice}")


def _difference(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Digests say nothing to a person: what they are of does."""
    if name == "init_adapter" and not (found[name] and wanted[name]):
        has, had = ("no init_adapter", "one") if found[name] else ("an init_adapter", "none")
        return f"this run has {has}, the checkpoint's had {had}"
    if name in CONTENTS:
        names = dict.fromkeys(map(str, (wanted["model"], found.get("model"))))
        of = f" (model {', then '.join(names)})" if "model" in name else ""
        return f"{CONTENTS[name]} changed since the checkpoint was written{of}"
    return f"{name} is {wanted[name]}, the checkpoint has {found[name]}"


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name before -> now` of every setting that a resumed run has otherwise than its checkpoint.

    Not of places, of which the content counts, nor of what is recomputed, which follows the free memory and
    changes no result; and what was left to the program ("auto"), or was overridden, is not known to have been
    otherwise.
    """
    before, now = strict(before), strict(now)
    unused = {*PLACES, "run_name", "gradient_checkpointing"}
    unused |= {"num_epochs"} if before.get("max_steps") else set()
    return [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and name not in unused and before[name] not in (now[name], "auto")
    ]


def check_ranks(identities: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError naming what is not the same on all ranks: they would train on different samples."""
    first = identities[0]
    for rank, other in enumerate(identities):
        names = [name for name in first if name != "model" and other[name] != first[name]]
        if names:
            raise UserError(
                f"rank {rank} differs from rank 0 in {', '.join(names)}: give all nodes the same data, "
                "model and settings"
            )


def recorded_settings(config: DirectTrainingConfig) -> dict[str, Any]:
    """Every setting as records show it. What a setting is decides, not how its value looks.

    Numbers, switches and words of a choice are shown; a text only where the setting is a name or a path, and
    then without what looks like a secret; of a command its program, of a channel its service, of an
    address its place. Any other
    text is hidden.
    """
    return {f.name: _recorded(f, getattr(config, f.name)) for f in dataclasses.fields(config)}


def _recorded(setting: dataclasses.Field, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _recorded(setting, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_recorded(setting, entry) for entry in value]
    if not isinstance(value, str) or value in allowed_values(setting)[0]:
        return value
    if setting.name in SHOWN_PART:
        return SHOWN_PART[setting.name](value)
    if setting.name in NAMES_AND_PATHS:
        return redact(value)
    return REDACTED if value else value
