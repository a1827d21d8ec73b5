"""Command line and TOML: right values, all faults at once, and nothing unknown passes.

uv run pytest tests/test_training_config.py
"""

import dataclasses
import re
from pathlib import Path

import pytest

import foreign_names
import training_config
from errors import UserError
from training_config import DirectTrainingConfig, parse_command_line, read_config_file


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
        ("num_train_epoch = 3", "num_train_epochs"),
    ],
)
def test_settings_that_mean_something_else_get_an_answer(tmp_path: Path, text, said):
    with pytest.raises(UserError) as caught:
        read_config_file(toml(tmp_path, text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_translation_names_a_setting_of_ours():
    fields = {f.name for f in dataclasses.fields(DirectTrainingConfig)}
    assert set(foreign_names.ALIASES.values()) <= fields
    for meanings in foreign_names.MEANINGS.values():
        for _, settings in meanings:
            assert settings.keys() <= fields
    taken = set(foreign_names.ALIASES) | set(foreign_names.ADVICE)
    assert not taken & fields, "a name of ours must mean ours"


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
        ("learning_rate = inf", "learning_rate is inf, must be finite and above 0"),
    ],
)
def test_a_fault_says_what_would_be_right(tmp_path: Path, text, said):
    with pytest.raises(UserError) as caught:
        read_config_file(toml(tmp_path, text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_a_clear_error(tmp_path: Path):
    with pytest.raises(UserError, match="can't be read"):
        read_config_file(tmp_path / "absent.toml")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float):
    with pytest.raises(UserError, match="learning_rate"):
        DirectTrainingConfig(learning_rate=value)


def test_every_field_has_its_line_of_help():
    source = Path(training_config.__file__).read_text(encoding="utf-8")
    for field in dataclasses.fields(DirectTrainingConfig):
        pattern = rf'\n    {field.name}: [^"]*?(?:"[^"\n]*"[^"]*?)*\n    """'
        assert re.search(pattern, source), field.name


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DirectTrainingConfig().seed = 1
