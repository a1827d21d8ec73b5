"""The command line of the main program and its TOML file: both become a `DirectTrainingConfig`."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from finetuning.common.arguments import options_of, without_language
from finetuning.common.errors import UserError
from finetuning.common.files import regular
from finetuning.common.language import FLAG
from finetuning.common.machine import check_device_name
from finetuning.common.paths import check_there, expanded
from finetuning.common.text import REDACTED
from finetuning.config import PARTLY_SHOWN, DirectTrainingConfig, allowed_values, either
from finetuning.foreign_names import (
    option,
    our_arguments,
    renamed_text,
    suggestion,
    translated,
)

PROGRAM = "direct_finetuning_with_existing_modules.py"


@dataclass(frozen=True)
class CommandLine:
    """LoRA fine-tuning of a thinking model, watched in TensorBoard."""

    training: Annotated[DirectTrainingConfig, tyro.conf.arg(name="")]
    resume: str = ""
    """latest: continue from the newest checkpoint, or fail; auto: continue, or start fresh; or a
    checkpoint directory."""
    plan: bool = False
    """Say what the run would do, need and take, without loading weights, and end."""
    gpus: str = ""
    """With --plan: plan for these GPUs, such as 8xH100, 1x4090 or 1xA100-40G, which need not be here; of the
    model only config.json and the tokenizer are needed."""
    check_data: bool = False
    """Read and tokenize everything, say what is wrong with it, the worst of each kind here and all in a file,
    and end with 0 (good) or 1."""
    quiet: bool = False
    """Only warnings and the closing lines on the terminal."""
    trust_remote_code: bool = False
    """Let the model folder run its own code. There is no such key in a configuration file."""
    config: str = ""
    """TOML file with any of the other settings; the command line wins."""


def parse_command_line(arguments: list[str]) -> CommandLine:
    """Defaults, then the TOML file of --config, then the command line. Raises UserError for both."""
    arguments = without_language(arguments)
    path = _value_of("--config", arguments)
    defaults = CommandLine(
        training=read_config_file(Path(expanded(path, "--config")))
        if path
        else DirectTrainingConfig()
    )
    arguments, _ = our_arguments(arguments, _own_names())
    command, unknown = options_of(
        PROGRAM, CommandLine, arguments, default=defaults, return_unknown_args=True
    )
    if unknown:
        raise UserError(_unknown_text(unknown))
    if command.gpus and not command.plan:
        raise UserError("--gpus is for --plan: add --plan, or leave it out")
    check_device_name(command.training.device)
    check_there(command.training.model_name, "model_name")
    check_there(command.training.init_adapter, "init_adapter")
    return dataclasses.replace(command, resume=expanded(command.resume, "--resume"))


def what_was_renamed(arguments: list[str]) -> str:
    """One line on options of other tools in a command line that was read; empty where there are none."""
    return renamed_text(our_arguments(arguments, _own_names())[1])


def _own_names() -> set[str]:
    kinds = (DirectTrainingConfig, CommandLine)
    return {FLAG[2:], *(field.name for kind in kinds for field in dataclasses.fields(kind))}


def _unknown_text(unknown: list[str]) -> str:
    """What is wrong with what no option takes, and what may have been meant."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return f"{unknown[0]!r} belongs to no option; files with data go behind --data-path"
    faults = [f"unknown option {flag!r}{_meant(flag)}" for flag in flags]
    return f"command line: {'; '.join(faults)}; --help lists all options"


def _meant(flag: str) -> str:
    near = suggestion(flag.lstrip("-").replace("-", "_"), _own_names())
    return f" (did you mean {option(near)!r}?)" if near else ""


def read_config_file(path: Path) -> DirectTrainingConfig:
    """A configuration from TOML, `key = value` lines; all faults in one UserError."""
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UserError(
            f"--config {path}: YAML is not read; write it as TOML, key = value a line, and save it as "
            f"{path.stem}.toml"
        )
    try:
        text = regular(path).read_text(encoding="utf-8-sig")  # Notepad writes a mark
        values = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"--config {path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--config {path}: not UTF-8; save it so (iconv -f GB18030 -t UTF-8)"
        ) from error
    except (ValueError, RecursionError) as error:  # syntax, endless digits, depth
        raise UserError(f"--config {path}: not valid TOML ({error})") from error
    fields = {f.name: f for f in dataclasses.fields(DirectTrainingConfig)}
    settings, faults = {}, []
    for key, value in values.items():
        meant = translated(key, value)
        if isinstance(meant, str):
            faults.append(meant)
            continue
        for name, setting in meant.items():
            if name not in fields:
                near = suggestion(key, fields)
                faults.append(
                    f"unknown key {key!r}" + (f" (did you mean {near!r}?)" if near else "")
                )
            elif name in settings:
                faults.append(f"{key!r} sets {name} a second time")
            else:
                settings[name] = _converted(fields[name], setting, faults)
    if faults:
        raise UserError(f"--config {path}: " + "; ".join(faults))
    return DirectTrainingConfig(**settings)


def _converted(field_: dataclasses.Field, value: Any, faults: list[str]) -> Any:
    """The TOML value in the field's type, or a fault."""
    default = (
        field_.default if field_.default is not dataclasses.MISSING else field_.default_factory()  # type: ignore[misc]
    )
    choices, types = allowed_values(field_)
    wanted = either(choices, *types)
    if isinstance(default, tuple):
        items = value if isinstance(value, list) else [value]
        kind = float if field_.name == "data_weights" else str
        if all(isinstance(item, (kind, int) if kind is float else kind) for item in items):
            return tuple(kind(item) for item in items)
        wanted = "a list of numbers" if kind is float else "a text, or a list of texts"
    elif isinstance(default, bool) or isinstance(value, bool):
        if isinstance(default, bool) and isinstance(value, bool):
            return value
    elif isinstance(default, float) and isinstance(value, int):
        return float(value)
    elif value in choices or type(value) in types:
        return value
    told = REDACTED if field_.name in PARTLY_SHOWN else repr(value)
    faults.append(f"{field_.name} is {told}, must be {wanted}")
    return value


def _value_of(flag: str, arguments: list[str]) -> str:
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return ""
