"""A command that an alert starts gets the alert, harms nobody, and ends when its time is up, or with the run.

uv run pytest -m "not long" tests/monitoring/test_alert_command.py
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from finetuning.common.bounds import ACTION_END
from finetuning.common.errors import UserError
from finetuning.monitoring import alert_command
from finetuning.monitoring.alert_command import AlertCommand, end_commands
from finetuning.monitoring.alerts import Alert

ROOT = Path(__file__).parents[2]
EVIL = Alert("Loss_Spike", 7, math.nan, 2.0, {"text": "$(touch broken); `id` \"' \u4f60\n"}, "look")
HANGS = "import sys, pathlib, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
PARENT = """
import signal, subprocess, sys, pathlib, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""
SAYS_MUCH = """
import sys
for _ in range(2**13):
    sys.stdout.write("x" * 2**17), sys.stderr.write("y" * 2**17)
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and (path.stat().st_size or path.suffix == ".mark")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_command_gets_the_alert_as_json_and_nothing_is_interpreted(tmp_path):
    out = tmp_path / "got.json"
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"
    AlertCommand(python(code, out), EVIL).join(30)
    got = json.loads(out.read_text())
    assert got["name"] == "Loss_Spike" and got["value"] == "nan"
    assert got["evidence"]["text"] == EVIL.evidence["text"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/no/such/program"], "'program' exited 1: No such file or directory"),
        (python("raise SystemExit(3)"), "exited 3"),
        (python("import os; os.kill(os.getpid(), 9)"), "exited -9"),
    ],
)
def test_a_failing_command_is_one_line_on_stderr(command, said, capsys):
    AlertCommand(command, EVIL).join(30)
    told = capsys.readouterr().err
    assert told.startswith("alert command ") and said in told and told.count("\n") == 1


@pytest.mark.parametrize("command", ["", [], "echo 'open"])
def test_an_unusable_command_is_the_users_error(command):
    with pytest.raises(UserError):
        AlertCommand(command, EVIL)


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path, capsys):
    command = AlertCommand(python(PARENT, tmp_path / "child"), EVIL, timeout_s=2)
    assert command.is_alive()  # nobody waits for it
    wait_for(tmp_path / "child")
    command.join(30)
    assert not command.is_alive() and "was ended after 2 s" in capsys.readouterr().err
    assert is_gone(int((tmp_path / "child").read_text()))


def test_a_command_that_says_too_much_is_ended(capsys):
    """A gigabyte on each of stdout and stderr: the one is dropped, the other heard to a bound."""
    before = psutil.Process().memory_info().rss
    AlertCommand(python(SAYS_MUCH), EVIL).join(30)
    assert "was ended: it wrote more than 1 MiB of messages" in capsys.readouterr().err
    assert psutil.Process().memory_info().rss - before < 64 * 2**20


def test_the_end_of_a_run_waits_for_commands_a_little(tmp_path, capsys, monkeypatch):
    soon = "import time, sys, pathlib; time.sleep(0.3); pathlib.Path(sys.argv[1]).touch()"
    end_commands([AlertCommand(python(soon, tmp_path / "done"), EVIL)], at_once=False)
    assert (tmp_path / "done").exists() and not capsys.readouterr().err
    monkeypatch.setattr(alert_command, "ACTION_END", replace(ACTION_END, limit=1))
    for at_once in (False, True):
        mark = tmp_path / f"{at_once}.mark"
        command = AlertCommand(python(HANGS, mark), EVIL)
        wait_for(mark)
        began = time.monotonic()
        end_commands([command, AlertCommand(python(HANGS, mark), EVIL)], at_once=at_once)
        assert (time.monotonic() - began >= 1) is not at_once and time.monotonic() - began < 3
        assert not command.is_alive()
        assert capsys.readouterr().err.count("was ended with the run") == 2


DESCENDANTS = """
import os, pathlib, subprocess, sys, time
folder, depth = pathlib.Path(sys.argv[1]), int(sys.argv[2])
if depth:
    for own_session in (False, True):
        subprocess.Popen([sys.executable, "-S", "-c", sys.argv[3], folder, str(depth - 1), sys.argv[3]],
                         start_new_session=own_session, stderr=subprocess.DEVNULL)
(folder / f"{os.getpid()}.part").write_text("")
(folder / f"{os.getpid()}.part").rename(folder / str(os.getpid()))
if depth != 1:  # those below lose their parent
    time.sleep(60)
"""


def descendants(folder: Path) -> list[int]:
    """The command, those that it started, and theirs: some in sessions of their own, some orphans."""
    deadline = time.monotonic() + 30
    while len(found := [int(path.name) for path in folder.glob("*[0-9]")]) < 7:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's word, Linux")


@linux
def test_a_command_ends_with_a_parent_that_is_killed(tmp_path):
    """And so does all that it started."""
    start = f"""
import time
from finetuning.monitoring.alert_command import AlertCommand
from finetuning.monitoring.alerts import Alert
command = {python(DESCENDANTS, tmp_path, 2, DESCENDANTS)!r}
AlertCommand(command, Alert("NonFinite", 1, 1.0, 0.0))
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", start], env=environment)
    try:
        found = descendants(tmp_path)
    finally:
        parent.kill()
        parent.wait()
    assert all(map(is_gone, found))


@linux
def test_what_a_command_left_behind_ends_when_its_time_is_up(tmp_path, capsys):
    command = AlertCommand(python(DESCENDANTS, tmp_path, 2, DESCENDANTS), EVIL, timeout_s=3)
    found = descendants(tmp_path)
    command.join(30)
    assert "was ended after 3 s" in capsys.readouterr().err
    assert all(map(is_gone, found))


@linux
def test_a_command_that_leaves_a_process_behind_has_ended_with_it(tmp_path, capsys):
    leaves = """
import pathlib, subprocess, sys
subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(0.5); open({sys.argv[1]!r}, 'w')"],
                 start_new_session=True, stderr=subprocess.DEVNULL)
sys.exit(3)
"""
    AlertCommand(python(leaves, tmp_path / "done"), EVIL).join(30)
    assert (tmp_path / "done").exists() and "exited 3" in capsys.readouterr().err
