"""Command line and TOML: right values, all faults at once, and nothing unknown passes.

uv run pytest tests/test_config.py
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Union, get_args, get_origin

import pytest

from finetuning import config
from finetuning.command_line import parse_command_line, read_config_file, what_was_renamed
from finetuning.common import language
from finetuning.common.errors import UserError
from finetuning.config import (
    ALERT_NAMES,
    PARTLY_SHOWN,
    BatchSettings,
    DataSettings,
    DeviceSettings,
    DirectTrainingConfig,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
)
from finetuning.events.metric_table import METRICS
from finetuning.foreign_names import FOREIGN, Absent, Values, suggestion
from finetuning.monitoring.detectors import DETECTORS

GROUPS = (
    ModelSettings,
    LoraSettings,
    DataSettings,
    BatchSettings,
    OptimizerSettings,
    DeviceSettings,
    OutputSettings,
)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_command_line_wins_over_file_wins_over_defaults(tmp_path: Path):
    path = toml(tmp_path, 'learning_rate = 1e-5\nseed = 7\ndata_path = "mine.jsonl"\n')
    command = parse_command_line(
        ["--config", str(path), "--learning-rate", "2e-5", "--resume", "auto"]
    )
    training = command.training
    assert (training.learning_rate, training.seed, training.data_path) == (2e-5, 7, ("mine.jsonl",))
    assert training.lora_r == DirectTrainingConfig().lora_r
    assert command.resume == "auto" and not command.trust_remote_code


def test_names_of_neighbours_are_understood(tmp_path: Path):
    path = toml(tmp_path, "per_device_train_batch_size = 3\nnum_train_epochs = 2\nlora_rank = 8\n")
    config = read_config_file(path)
    assert (config.batch_size, config.num_epochs, config.lora_r) == (3, 2.0, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16 = true", {"precision": "bf16"}),
        ("bf16 = false", {"precision": "fp32"}),
        ("gradient_checkpointing = true", {"gradient_checkpointing": "on"}),
        ("gradient_checkpointing = false", {"gradient_checkpointing": "off"}),
        ('gradient_checkpointing = "auto"', {"gradient_checkpointing": "auto"}),
        ('lr_scheduler_type = "linear"', {"lr_schedule": "linear"}),
        ('lr_scheduler_type = "constant"', {"lr_schedule": "constant", "warmup_ratio": 0.0}),
        (
            'lr_scheduler_type = "constant_with_warmup"\nwarmup_ratio = 0.1',
            {"lr_schedule": "constant", "warmup_ratio": 0.1},
        ),
        ("max_steps = -1", {"max_steps": 0}),
        ('lora_target = "all"', {"target_modules": ("all-linear",)}),
        ('lora_target = "q_proj, v_proj"', {"target_modules": ("q_proj", "v_proj")}),
        ('finetuning_type = "full"', {"lora_r": 0}),
        ("load_in_4bit = true", {"quantization": "4bit"}),
        ('optim = "adamw_torch"\nreport_to = ["tensorboard"]\nseed = 3', {"seed": 3}),
        ("use_cpu = true", {"device": "cpu"}),
        ("eval_steps = 25\nsave_steps = 500", {"eval_steps": 25, "save_steps": 500}),
        ('eval_steps = "auto"', {"eval_steps": "auto"}),
    ],
)
def test_settings_of_training_arguments_that_mean_the_same(tmp_path: Path, text, expected):
    config = read_config_file(toml(tmp_path, text))
    changed = dataclasses.replace(DirectTrainingConfig(), **expected)
    assert config == changed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("warmup_steps = 100", "warmup_ratio"),
        ("fp16 = true", "must be False"),
        ("bf16 = 1", "True or False"),
        ('lr_scheduler_type = "polynomial"', "'constant_with_warmup'"),
        ('optim = "adafactor"', "adamw_torch"),
        ('report_to = "wandb"', "tensorboard"),
        ("eval_steps = 0.1", "'auto' or int"),
        ("eval_steps = -1", "auto, or 0 or more"),
        ('save_strategy = "epoch"', "'steps'"),
        ('resume_from_checkpoint = "x"', "--resume"),
        ("trust_remote_code = true", "--trust-remote-code"),
        ("bf16 = true\nprecision = 'fp32'", "second time"),
        ("num_train_epoch = 3", "'num_epochs'"),
    ],
)
def test_settings_that_mean_something_else_get_an_answer(tmp_path: Path, text, said):
    with pytest.raises(UserError) as caught:
        read_config_file(toml(tmp_path, text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_translation_names_a_setting_of_ours():
    fields = {f.name for f in dataclasses.fields(DirectTrainingConfig)}
    for name, meaning in FOREIGN.items():
        if isinstance(meaning, Values):
            assert all(settings.keys() <= fields for _, settings in meaning.meanings)
        else:
            assert name not in fields, "a name of ours must mean ours"
            assert isinstance(meaning, Absent) or meaning in fields


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-train-epochs", "2", "--lora_rank=8"], {"num_epochs": 2.0, "lora_r": 8}),
        (["--dataset", "a.jsonl", "b.jsonl"], {"data_path": ("a.jsonl", "b.jsonl")}),
        (["--bf16", "--optim", "adamw_torch", "--seed", "3"], {"precision": "bf16", "seed": 3}),
        (["--quantization-bit", "4", "--bf16", "False"], {"quantization": "4bit"}),
        (["--lora-target", "q_proj,v_proj"], {"target_modules": ("q_proj", "v_proj")}),
        (["--gradient-checkpointing", "on"], {"gradient_checkpointing": "on"}),
        (["--output-dir", "bf16", "--no-packing"], {"output_dir": "bf16", "packing": False}),
    ],
)
def test_the_command_line_takes_the_names_that_a_file_takes(arguments, expected):
    training = parse_command_line(arguments).training
    for name, value in expected.items():
        assert getattr(training, name) == value


def test_foreign_flags_that_mean_something_else_get_an_answer():
    with pytest.raises(UserError) as caught:
        parse_command_line(["--warmup-steps", "100", "--fp16", "--seed", "1"])
    assert "warmup_ratio" in str(caught.value) and "must be False" in str(caught.value)
    assert parse_command_line(["--trust-remote-code"]).trust_remote_code
    with pytest.raises(UserError, match="--num-epochs"):
        parse_command_line(["--num-train-epochs"])


def test_the_groups_in_their_order_are_the_configuration():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert names == [field.name for field in dataclasses.fields(DirectTrainingConfig)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("group", "settings", "said"),
    [
        (LoraSettings, {"lora_r": -1}, "lora_r is -1, must be finite, 0 or more"),
        (LoraSettings, {"target_modules": ()}, "target_modules is (), must be not empty"),
        (DataSettings, {"data_weights": (1.0, 2.0)}, "one number of 0 or more for each data_path"),
        (BatchSettings, {"batch_size": 0}, "batch_size is 0, must be at least 1"),
        (OptimizerSettings, {"min_lr_ratio": 2.0}, "min_lr_ratio is 2.0, must be between 0 and 1"),
        (DeviceSettings, {"distributed_timeout": 0.0}, "must be finite and above 0"),
        (OutputSettings, {"alert_actions": {"Spike": "stop"}}, "no alert 'Spike'"),
    ],
)
def test_a_group_alone_checks_itself_as_the_whole_does(group, settings, said):
    for kind in (group, DirectTrainingConfig):
        with pytest.raises(UserError) as caught:
            kind(**settings)
        assert said in str(caught.value)
    assert LoraSettings(lora_r=0, target_modules=()).lora_r == 0


def test_4bit_weights_need_adapters():
    with pytest.raises(UserError, match="needs adapters"):
        DirectTrainingConfig(quantization="4bit", lora_r=0)


def test_alert_actions_knows_the_alerts_that_there_are():
    scalars = [metric.tag for metric in METRICS if metric.kind == "scalar"]
    in_table = [tag.removeprefix("Alerts/") for tag in scalars if tag.startswith("Alerts/")]
    assert list(ALERT_NAMES) == in_table
    assert set(ALERT_NAMES) == set(DETECTORS)


def test_4bit_weights_are_not_sharded():
    with pytest.raises(UserError, match="can't be sharded"):
        DirectTrainingConfig(quantization="4bit", parallel="fsdp")


def test_all_faults_of_values_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        DirectTrainingConfig(
            learning_rate=-1.0, batch_size=0, eval_fraction=1.5, lora_r=-2, data_path=()
        )
    for name in ("learning_rate", "batch_size", "eval_fraction", "lora_r", "data_path"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_of_a_file_are_reported_at_once(tmp_path: Path):
    text = (
        'lerning_rate = 1\nseed = "x"\npacking = 1\nprecision = "fp4"\ntrust_remote_code = true\n'
    )
    with pytest.raises(UserError) as caught:
        read_config_file(toml(tmp_path, text))
    message = str(caught.value)
    for part in ("learning_rate", "seed", "packing", "fp32", "trust_remote_code", "run.toml"):
        assert part in message


@pytest.mark.parametrize("text", ["a = ", "seed = 1\nseed = 2", "\x00"])
def test_a_broken_file_is_one_clear_error(tmp_path: Path, text: str):
    with pytest.raises(UserError, match="not valid TOML"):
        read_config_file(toml(tmp_path, text))


@pytest.mark.parametrize("key", PARTLY_SHOWN)
def test_what_may_be_a_secret_is_not_in_a_fault(tmp_path: Path, key: str):
    with pytest.raises(UserError, match=f"{key} is .redacted., must be") as caught:
        read_config_file(toml(tmp_path, f'{key} = [["Qx7pl41n"]]'))
    assert "Qx7pl41n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX special files")
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path):
    """Reading them would wait for ever, or fill the memory."""
    os.mkfifo(tmp_path / "run.toml")
    for path in (tmp_path / "run.toml", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path.name} is no regular file"):
            read_config_file(path)


def test_a_mark_at_the_beginning_is_no_fault(tmp_path: Path):
    path = toml(tmp_path, "")
    path.write_text("seed = 7", encoding="utf-8-sig")  # Notepad's UTF-8
    assert read_config_file(path).seed == 7
    path.write_bytes("output_dir = '密评'".encode("gb18030"))
    with pytest.raises(UserError, match=r"run.toml: not UTF-8; save it so"):
        read_config_file(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data_path = [1]", "data_path is [1], must be a text, or a list of texts"),
        ('data_weights = ["x"]', "data_weights is ['x'], must be a list of numbers"),
        (
            'alert_actions = {Loss_Spik = "stop"}',
            "no alert 'Loss_Spik' (did you mean 'Loss_Spike'?)",
        ),
        ("learning_rate = inf", "learning_rate is inf, must be auto, or above 0 and finite"),
    ],
)
def test_a_fault_says_what_would_be_right(tmp_path: Path, text, said):
    with pytest.raises(UserError) as caught:
        read_config_file(toml(tmp_path, text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_a_clear_error(tmp_path: Path):
    with pytest.raises(UserError, match="can't be read"):
        read_config_file(tmp_path / "absent.toml")


@pytest.mark.parametrize("temperature", [1e-40, 0.001, 0.0099])
def test_a_temperature_that_only_rounding_errors_can_tell_from_0_is_refused(temperature: float):
    with pytest.raises(UserError, match=r"probe_temperature is .* 0, or 0\.01 or more"):
        DirectTrainingConfig(probe_temperature=temperature)
    assert DirectTrainingConfig(probe_temperature=0.0).probe_temperature == 0


def test_answers_decide_only_where_something_is_asked():
    asks = {"best_by": "answers", "eval_fraction": 0.0}
    with pytest.raises(UserError, match="best_by answers needs questions: hold samples out"):
        DirectTrainingConfig(**asks)
    for more in ({"probe_path": ("a.jsonl",)}, {"eval_path": ("a.jsonl",)}, {"eval_fraction": 0.1}):
        DirectTrainingConfig(**asks | more)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float):
    with pytest.raises(UserError, match="learning_rate"):
        DirectTrainingConfig(learning_rate=value)


JUST_ABOVE_ZERO, LARGE, NEVER = 1e-12, 10**6, float("nan")
# Smallest and largest value that is taken, then one below and one above that are refused; None: none is.
BOUNDS = {
    "lora_r": (0, LARGE, -1, None),
    "lora_alpha": (JUST_ABOVE_ZERO, LARGE, 0.0, NEVER),
    "lora_dropout": (0.0, 0.999, -0.001, 1.0),
    "eval_fraction": (0.0, 0.999, -0.001, 1.0),
    "max_eval_samples": (0, LARGE, -1, None),
    "replay": (0.0, 0.999, -0.001, 1.0),
    "max_seq_length": (16, LARGE, 15, "long"),
    "tokens_per_row": (0, LARGE, -1, "long"),
    "max_broken_fraction": (0.0, 1.0, -0.001, 1.001),
    "batch_size": (1, LARGE, 0, None),
    "gradient_accumulation_steps": (1, LARGE, 0, None),
    "num_epochs": (JUST_ABOVE_ZERO, LARGE, 0.0, NEVER),
    "max_steps": (0, LARGE, -1, None),
    "learning_rate": (JUST_ABOVE_ZERO, 1.0, 0.0, NEVER),
    "warmup_ratio": (0.0, 0.999, -0.001, 1.0),
    "min_lr_ratio": (0.0, 1.0, -0.001, 1.001),
    "weight_decay": (0.0, 1.0, -0.001, NEVER),
    "adam_beta1": (0.0, 0.999, -0.001, 1.0),
    "adam_beta2": (0.0, 0.9999, -0.001, 1.0),
    "adam_epsilon": (JUST_ABOVE_ZERO, 1.0, 0.0, NEVER),
    "max_grad_norm": (0.0, LARGE, -0.001, NEVER),
    "kl_anchor": (0.0, LARGE, -0.001, NEVER),
    "answer_weight": (JUST_ABOVE_ZERO, LARGE, 0.0, NEVER),
    "max_nonfinite_steps": (0, LARGE, -1, None),
    "seed": (0, LARGE, -1, None),
    "distributed_timeout": (JUST_ABOVE_ZERO, LARGE, 0.0, NEVER),
    "logging_steps": (1, LARGE, 0, "often"),
    "save_steps": (0, LARGE, -1, "often"),
    "eval_steps": (0, LARGE, -1, "often"),
    "save_total_limit": (1, LARGE, 0, None),
    "early_stopping_patience": (0, LARGE, -1, None),
    "num_probes": (0, LARGE, -1, "many"),
    "probe_temperature": (0.01, 2.0, -0.1, NEVER),
    "probe_max_new_tokens": (0, LARGE, -1, None),
    "workers": (0, LARGE, -1, None),
}


def test_every_number_has_bounds_that_hold(subtests):
    numbers = {
        field.name
        for field in dataclasses.fields(DirectTrainingConfig)
        if field.type in (int, float)
        or (get_origin(field.type) is Union and {int, float} & set(get_args(field.type)))
    }
    assert numbers == set(BOUNDS), "a new number needs its row"
    for name, (smallest, largest, below, above) in BOUNDS.items():
        for good in (smallest, largest):
            with subtests.test(name=name, taken=good):
                assert getattr(DirectTrainingConfig(**{name: good}), name) == good
        for bad in (value for value in (below, above) if value is not None):
            with subtests.test(name=name, refused=bad), pytest.raises(UserError, match=name):
                DirectTrainingConfig(**{name: bad})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", ()),
        ("data_path", ()),
        ("output_dir", " "),
        ("output_dir", "a\0b"),
        ("revision", "a b"),
        ("revision", "../main"),
        ("alert_actions", {"Noise": "stop"}),
        ("notify", ("slack",)),
        ("mirror", "s3://a\nb"),
        ("notify", ("slack=env:A", "irc=env:B")),
    ],
)
def test_what_is_no_number_and_can_not_be_right_is_refused(name: str, value: object):
    with pytest.raises(UserError, match=name):
        DirectTrainingConfig(**{name: value})


@pytest.mark.parametrize("ranks", [{"q_proj": 0}, {"q_proj": 8, "v_proj": -1}])
def test_ranks_of_modules_are_ranks(ranks: dict[str, int]):
    assert LoraSettings(rank_pattern={"q_proj": 1}).rank_pattern == {"q_proj": 1}
    with pytest.raises(UserError, match="rank_pattern"):
        LoraSettings(rank_pattern=ranks)


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 2.0, 3.0), (1.0, -0.1), (0.0, 0.0), (1.0, NEVER)]
)
def test_weights_are_one_for_each_path(weights: tuple[float, ...]):
    assert DataSettings(data_path=("a", "b"), data_weights=(0.0, 0.5)).data_weights == (0.0, 0.5)
    with pytest.raises(UserError, match="data_weights"):
        DataSettings(data_path=("a", "b"), data_weights=weights)


def test_every_field_has_its_line_of_help():
    source = Path(config.__file__).read_text(encoding="utf-8")
    for field in dataclasses.fields(DirectTrainingConfig):
        pattern = rf'\n    {field.name}: [^"]*?(?:"[^"\n]*"[^"]*?)*\n    """'
        assert re.search(pattern, source), field.name


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DirectTrainingConfig().seed = 1


def test_what_options_of_other_tools_became_is_told_in_one_line():
    line = what_was_renamed(
        ["--lora_rank", "8", "--bf16", "--stage=sft", "--max-steps", "3", "--cutoff-len", "512"]
    )
    assert line == (
        "options of other tools, as they are named here: --lora_rank 8 = --lora-r 8, "
        "--bf16 = --precision bf16, --cutoff-len 512 = --max-seq-length 512; "
        "what happens here anyway: --stage=sft"
    )
    assert what_was_renamed(["--lora-r", "8", "--gradient-checkpointing", "on"]) == ""
    for text in (line, what_was_renamed(["--epochs", "2"]), what_was_renamed(["--do_train"])):
        told = language.in_chinese(text)
        assert told.startswith("其他工具的参数") and " here" not in told


@pytest.mark.parametrize("name", [n for n, m in FOREIGN.items() if not isinstance(m, Absent)])
def test_a_suggestion_is_an_option_of_help(name):
    """Of every foreign name with a letter too many; what is suggested is a field, not the other's name."""
    near = suggestion(f"{name}x", [f.name for f in dataclasses.fields(DirectTrainingConfig)])
    assert near in {"", *(f.name for f in dataclasses.fields(DirectTrainingConfig))}


def test_data_alone_means_data_path():
    with pytest.raises(UserError, match=r"'--data' \(did you mean '--data-path'\?\)"):
        parse_command_line(["--data", "1"])
