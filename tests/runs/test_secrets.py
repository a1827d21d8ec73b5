"""No secret of a user is in anything that a run leaves behind.

uv run pytest tests/runs/test_secrets.py
"""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from finetuning.common.errors import UserError
from finetuning.common.text import REDACTED
from finetuning.config import NAMES_AND_PATHS, PARTLY_SHOWN, DirectTrainingConfig
from finetuning.monitoring.alert_command import AlertCommand
from finetuning.monitoring.alerts import Alert
from finetuning.runs.identity import recorded_settings

SECRETS = ("Qx7pl41n", "b4rW0rd5")
COMMAND = f"curl -H 'Authorization: Bearer {SECRETS[0]}' https://hooks.example/{SECRETS[1]}"


@pytest.mark.slow
def test_the_arguments_of_an_action_are_nowhere(tmp_path: Path, run, capfd: pytest.CaptureFixture):
    """Settings go to configuration.json, statistics, events, the report, checkpoints and the log."""
    action = ["--alert-actions", "NonFinite", COMMAND]
    assert run(tmp_path, *action, "--max-steps", "2", "--save-steps", "1", "--num-probes", "0") == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    holders = {
        path.relative_to(tmp_path): secret
        for path in files
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    }
    assert holders == {}
    assert any(b'"NonFinite": "curl"' in path.read_bytes() for path in files)
    printed = capfd.readouterr()
    assert not any(secret in printed.out + printed.err for secret in SECRETS)


@pytest.mark.parametrize(
    "command",
    [
        f"no-such-program --token {SECRETS[0]}",
        f"{sys.executable} -c 'raise SystemExit(str(__import__(\"sys\").argv))' {SECRETS[0]} x/{SECRETS[1]}",
        f"{sys.executable} -c 'import time; time.sleep(9)' {SECRETS[0]}",
    ],
)
def test_what_a_failed_command_says_shows_no_argument(command: str, capfd: pytest.CaptureFixture):
    alert = Alert("NonFinite", 1, 1.0, 0.0)
    AlertCommand(command, alert, timeout_s=1).join(20)
    said = capfd.readouterr().err
    assert said.startswith("alert command ") and said.count("\n") == 1
    assert not any(secret in said for secret in SECRETS), said


def test_a_command_that_cannot_be_split_is_not_shown():
    with pytest.raises(UserError) as refused:
        AlertCommand(f"curl 'Bearer {SECRETS[0]}", Alert("NonFinite", 1, 1.0, 0.0))
    assert SECRETS[0] not in str(refused.value)


def test_a_text_is_recorded_only_where_the_setting_is_a_name_or_a_path():
    """A setting that is added, and takes any text, is hidden until somebody says that it holds no secret."""
    fields = dataclasses.fields(DirectTrainingConfig)
    # As a value: the keys of a mapping to numbers are names of layers.
    taking_text = {f.name for f in fields if re.search(r"\bstr\b(?!, int)", str(f.type))}
    taking_text |= {f.name for f in fields if f.type is str}
    assert taking_text == {*NAMES_AND_PATHS, *PARTLY_SHOWN}

    @dataclasses.dataclass(frozen=True)
    class WithMore(DirectTrainingConfig):
        webhook: str = ""

    settings = recorded_settings(
        WithMore(webhook=f"https://x/{SECRETS[0]}", model_name="/models/a")
    )
    assert settings["webhook"] == REDACTED and settings["model_name"] == "/models/a"
    assert settings["lr_schedule"] == "cosine" and settings["learning_rate"] == "auto"
