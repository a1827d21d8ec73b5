"""What the settings of transformers' TrainingArguments, TRL, LLaMA-Factory and ms-swift mean here.

A name is taken where it means the same. One that means something else gets an answer that says what to do.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from finetuning.common.errors import UserError


@dataclass(frozen=True)
class Values:
    """A setting whose values mean settings here: (value, {name here: value here}) for each it may have."""

    meanings: tuple[tuple[Any, dict[str, Any]], ...]

    @classmethod
    def ignored(cls, *values: Any) -> "Values":
        """Values that ask for what happens here anyway."""
        return cls(tuple((value, {}) for value in values))

    @classmethod
    def switch(cls, name: str, on: str, off: str) -> "Values":
        """True and False as two values of a setting here."""
        return cls(((True, {name: on}), (False, {name: off})))


@dataclass(frozen=True)
class Absent:
    """A setting that does not exist here."""

    advice: str


_CHECKPOINTING = "gradient_checkpointing"
_STEPS = Values.ignored("steps")
_TEMPLATE = Absent("the tokenizer's own chat template is used")

# Name elsewhere -> name here, where the meaning is the same; else what its values mean, or what to do.
FOREIGN: dict[str, str | Values | Absent] = {
    # The model and its adapters
    "model": "model_name",
    "model_name_or_path": "model_name",
    "model_revision": "revision",
    "adapter_name_or_path": "init_adapter",
    "bf16": Values.switch("precision", "bf16", "fp32"),
    "fp16": Values.ignored(False),
    "load_in_4bit": Values.switch("quantization", "4bit", "none"),
    "load_in_8bit": Values.ignored(False),
    "quantization_bit": Values(((4, {"quantization": "4bit"}),)),
    "finetuning_type": Values((("lora", {}), ("full", {"lora_r": 0}))),
    "r": "lora_r",
    "lora_rank": "lora_r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "init_lora_weights": Absent("A is drawn at random and B is zero"),
    "modules_to_save": Absent("only adapters train, or with lora_r = 0 everything"),
    # Data
    "dataset": "data_path",
    "train_file": "data_path",
    "dataset_dir": Absent("data_path takes files and folders"),
    "validation_file": "eval_path",
    "eval_dataset": "eval_path",
    "val_dataset": "eval_path",
    "val_size": "eval_fraction",
    "split_dataset_ratio": "eval_fraction",
    "max_samples": Absent("give a data_weights share, or a smaller file"),
    "max_length": "max_seq_length",
    "max_seq_len": "max_seq_length",
    "cutoff_len": "max_seq_length",
    "template": _TEMPLATE,
    "chat_template": _TEMPLATE,
    "dataset_text_field": Absent("give columns where question, thinking and answer are not found"),
    "remove_unused_columns": Absent("columns that are not needed are ignored"),
    "dataloader_num_workers": Absent("workers is for reading and tokenizing"),
    "group_by_length": Values.ignored(False),
    # Updates
    "lr": "learning_rate",
    "epochs": "num_epochs",
    "gradient_accumulation": "gradient_accumulation_steps",
    "stage": Values.ignored("sft"),
    "do_train": Values.ignored(True),
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": Absent("held-out samples run in rows, batch_size at once"),
    "auto_find_batch_size": Absent("a micro-batch that does not fit is halved by itself"),
    "num_train_epochs": "num_epochs",
    "optim": Values.ignored("adamw_torch", "adamw_torch_fused", "adamw_hf"),
    "adam_beta_1": "adam_beta1",
    "adam_beta_2": "adam_beta2",
    "lr_scheduler_type": Values(
        (
            ("cosine", {"lr_schedule": "cosine"}),
            ("linear", {"lr_schedule": "linear"}),
            # Theirs has no warmup, whatever warmup_ratio says.
            ("constant", {"lr_schedule": "constant", "warmup_ratio": 0.0}),
            ("constant_with_warmup", {"lr_schedule": "constant"}),
        )
    ),
    "lr_scheduler_kwargs": Absent("the end of the schedule is min_lr_ratio"),
    "warmup_steps": Absent("give warmup_ratio, the share of all steps"),
    "label_smoothing_factor": Absent("the loss is plain cross-entropy"),
    "neftune_noise_alpha": Absent("no noise is added to embeddings"),
    # Devices
    "use_cpu": Values(((True, {"device": "cpu"}), (False, {}))),
    "no_cuda": Values(((True, {"device": "cpu"}), (False, {}))),
    "torch_compile": Values.switch("compile", "on", "off"),
    "ddp_timeout": "distributed_timeout",
    "deepspeed": Absent("use torchrun, and parallel = 'fsdp' where the model fits no single GPU"),
    "fsdp": Absent("use torchrun and parallel = 'fsdp'"),
    _CHECKPOINTING: Values(
        (
            *Values.switch(_CHECKPOINTING, "on", "off").meanings,
            *((way, {_CHECKPOINTING: way}) for way in ("auto", "on", "off")),
        )
    ),
    # Output
    "logging_dir": Absent("event files are in tensorboard_logs/ below output_dir"),
    "overwrite_output_dir": Absent("every run has directories of its own below output_dir"),
    "report_to": Values.ignored("tensorboard", ["tensorboard"], "all"),
    "eval_strategy": _STEPS,
    "evaluation_strategy": _STEPS,
    "save_strategy": _STEPS,
    "logging_strategy": _STEPS,
    "logging_first_step": Values.ignored(False),
    "load_best_model_at_end": Values.ignored(False),
    "metric_for_best_model": Absent("best_model/ is the one with the lowest held-out loss"),
    "push_to_hub": Absent("upload final_model/ with the hub's own tool"),
    "resume_from_checkpoint": Absent("start with --resume latest or --resume FOLDER"),
    "trust_remote_code": Absent("only the flag --trust-remote-code allows it"),
}


def suggestion(key: str, own: Iterable[str]) -> str:
    """The setting here whose name, or name elsewhere, is most similar to `key`; empty where none is."""
    known = {name: name for name in own}
    for name, meaning in FOREIGN.items():
        if isinstance(meaning, Values):
            ours = {setting for _, settings in meaning.meanings for setting in settings}
            if len(ours) == 1:
                known.setdefault(name, ours.pop())
        elif isinstance(meaning, str):
            known.setdefault(name, meaning)
    match = get_close_matches(key, known, n=1)
    return known[match[0]] if match else ""


def translated(key: str, value: Any) -> dict[str, Any] | str:
    """Our settings that `key = value` means; as text, why it means none."""
    if key == "max_steps" and value == -1:
        return {"max_steps": 0}
    meaning = FOREIGN.get(key, key)
    if isinstance(meaning, Absent):
        return f"{key} is not a setting here: {meaning.advice}"
    if isinstance(meaning, Values):
        for known, settings in meaning.meanings:
            if type(value) is type(known) and value == known:
                return settings
        wanted = " or ".join(repr(known) for known, _ in meaning.meanings)
        return f"{key} is {value!r}, must be {wanted} here"
    if meaning == "target_modules" and key != meaning and isinstance(value, str):
        names = [name.strip() for name in value.split(",")]
        return {meaning: ["all-linear"] if names == ["all"] else names}
    return {meaning: value}


@dataclass(frozen=True)
class Renamed:
    """An option of another tool as it was given, and what it is here; empty where that happens anyway."""

    given: str
    ours: str


def our_arguments(arguments: Sequence[str], own: Container[str]) -> tuple[list[str], list[Renamed]]:
    """A command line with the foreign names in it translated, `own` names left alone; and which those were.

    Raises UserError with all that is wrong. A flag without a value means true, as in their programs.
    """
    result, renamed, faults, rest = [], [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, given, value = argument.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key in own or key not in FOREIGN:
            result.append(argument)
            continue
        if not given and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            argument += f" {value}"
        elif not given and isinstance(FOREIGN[key], str):
            result.append(option(FOREIGN[key]))  # tyro says what is missing
            continue
        elif not given:
            value = "true"
        settings = translated(key, _typed(key, value))
        if isinstance(settings, str):
            faults.append(settings)
            continue
        ours = [word for name, setting in settings.items() for word in _words(name, setting)]
        result += ours
        renamed.append(Renamed(argument, " ".join(ours)))
    if faults:
        raise UserError("command line: " + "; ".join(faults))
    return result, renamed


def renamed_text(renamed: Sequence[Renamed]) -> str:
    """One line on what options of other tools became; empty where there are none."""
    others = ", ".join(f"{one.given} = {one.ours}" for one in renamed if one.ours)
    anyway = ", ".join(one.given for one in renamed if not one.ours)
    if others:
        text = f"options of other tools, as they are named here: {others}"
        return f"{text}; what happens here anyway: {anyway}" if anyway else text
    return f"options of other tools for what happens here anyway: {anyway}" if anyway else ""


def option(name: str) -> str:
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


def _words(name: str, setting: Any) -> list[str]:
    return [option(name), *map(str, setting if isinstance(setting, list) else [setting])]


def _typed(key: str, text: str) -> Any:
    """The text of a command line as the value that the table has for it."""
    meaning = FOREIGN[key]
    known = [value for value, _ in meaning.meanings] if isinstance(meaning, Values) else []
    return next((value for value in known if str(value).lower() == text.lower()), text)
