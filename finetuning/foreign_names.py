"""What the settings of transformers' TrainingArguments, TRL, LLaMA-Factory and ms-swift mean here.

A name is taken where it means the same; one that is known but means something else gets an answer that
says what to do, instead of silence.
"""

from typing import Any

# The same meaning under another name.
ALIASES = {
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "num_epochs",
    "model_name_or_path": "model_name",
    "model": "model_name",
    "max_length": "max_seq_length",
    "cutoff_len": "max_seq_length",
    "dataset": "data_path",
    "train_file": "data_path",
    "validation_file": "eval_path",
    "eval_dataset": "eval_path",
    "val_dataset": "eval_path",
    "val_size": "eval_fraction",
    "split_dataset_ratio": "eval_fraction",
    "adam_beta_1": "adam_beta1",
    "adam_beta_2": "adam_beta2",
    "r": "lora_r",
    "lora_rank": "lora_r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "adapter_name_or_path": "init_adapter",
    "ddp_timeout": "distributed_timeout",
}
_Meanings = list[tuple[Any, dict[str, Any]]]
_STEPS_ONLY: _Meanings = [("steps", {})]

# Key -> its possible values and the settings that each of them means.
MEANINGS: dict[str, _Meanings] = {
    "bf16": [(True, {"precision": "bf16"}), (False, {"precision": "fp32"})],
    "fp16": [(False, {})],
    "gradient_checkpointing": [
        (True, {"gradient_checkpointing": "on"}),
        (False, {"gradient_checkpointing": "off"}),
        *((way, {"gradient_checkpointing": way}) for way in ("auto", "on", "off")),
    ],
    "torch_compile": [(True, {"compile": "on"}), (False, {"compile": "off"})],
    "use_cpu": [(True, {"device": "cpu"}), (False, {})],
    "no_cuda": [(True, {"device": "cpu"}), (False, {})],
    "load_in_4bit": [(True, {"quantization": "4bit"}), (False, {"quantization": "none"})],
    "load_in_8bit": [(False, {})],
    "quantization_bit": [(4, {"quantization": "4bit"})],
    "lr_scheduler_type": [
        ("cosine", {"lr_schedule": "cosine"}),
        ("linear", {"lr_schedule": "linear"}),
        # Theirs has no warmup, whatever warmup_ratio says.
        ("constant", {"lr_schedule": "constant", "warmup_ratio": 0.0}),
        ("constant_with_warmup", {"lr_schedule": "constant"}),
    ],
    "optim": [(name, {}) for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf")],
    "finetuning_type": [("lora", {}), ("full", {"lora_r": 0})],
    "stage": [("sft", {})],
    "do_train": [(True, {})],
    "report_to": [("tensorboard", {}), (["tensorboard"], {}), ("all", {})],
    "eval_strategy": _STEPS_ONLY,
    "evaluation_strategy": _STEPS_ONLY,
    "save_strategy": _STEPS_ONLY,
    "logging_strategy": _STEPS_ONLY,
    "logging_first_step": [(False, {})],
    "load_best_model_at_end": [(False, {})],
    "group_by_length": [(False, {})],
}

ADVICE = {
    "warmup_steps": "give warmup_ratio, the share of all steps",
    "lr_scheduler_kwargs": "the end of the schedule is min_lr_ratio",
    "per_device_eval_batch_size": "held-out samples run in packed rows, batch_size of them at once",
    "resume_from_checkpoint": "start the command with --resume latest or --resume FOLDER",
    "trust_remote_code": "only the flag --trust-remote-code allows it",
    "logging_dir": "event files are in tensorboard_logs/ below output_dir",
    "run_name": "a run is named by the time it started",
    "deepspeed": "several GPUs: torchrun, and parallel = 'fsdp' where the model fits no single one",
    "fsdp": "several GPUs: torchrun, and parallel = 'fsdp'",
    "template": "the tokenizer's own chat template is used",
    "chat_template": "the tokenizer's own chat template is used",
    "dataset_text_field": "question, thinking and answer are found by themselves, or named by columns",
    "dataloader_num_workers": "batches come from memory; workers is for reading and tokenizing",
    "remove_unused_columns": "columns that are not needed are ignored",
    "overwrite_output_dir": "every run has directories of its own below output_dir",
    "metric_for_best_model": "best_model/ is the one with the lowest held-out loss",
    "push_to_hub": "upload final_model/ with the hub's own tool when the run is over",
    "auto_find_batch_size": "a micro-batch that does not fit is halved without being asked",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "init_lora_weights": "A is drawn at random and B is zero",
    "modules_to_save": "only adapters train, or with lora_r = 0 everything",
    "dataset_dir": "data_path takes files and folders",
    "max_samples": "give a data_weights share, or a smaller file",
}


def known_names() -> list[str]:
    """All foreign names that are understood, for suggestions."""
    return [*ALIASES, *MEANINGS]


def translated(key: str, value: Any) -> dict[str, Any] | str:
    """Our settings that `key = value` of a file means; as text, why it means none."""
    if key == "max_steps" and value == -1:
        return {"max_steps": 0}
    if key in ("lora_target", "lora_target_modules") and isinstance(value, str):
        names = [name.strip() for name in value.split(",")]
        return {"target_modules": ["all-linear"] if names == ["all"] else names}
    if key in MEANINGS:
        for known, settings in MEANINGS[key]:
            if type(value) is type(known) and value == known:
                return settings
        wanted = " or ".join(repr(known) for known, _ in MEANINGS[key])
        return f"{key} is {value!r}, must be {wanted} here"
    if key in ADVICE:
        return f"{key} is not a setting here: {ADVICE[key]}"
    return {ALIASES.get(key, key): value}
