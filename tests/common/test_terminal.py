"""The panel on a real pseudo-terminal, rare plain lines without one, and silence when asked for.

uv run pytest -m "not long" tests/common/test_terminal.py
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from finetuning.common import language, terminal
from finetuning.common.formatting import duration
from finetuning.common.terminal import RunPanel, Terminal, gpu_lines, trend_arrow

ROOT = Path(__file__).parents[2]
LOGGED = {"Training/Loss": 1.5, "Monitoring/Loss_Trend": -0.4, "Training/Learning_Rate": 2e-4}

SCENE = """
import sys, time
from finetuning.common.terminal import Terminal
t = Terminal(quiet="quiet" in sys.argv)
with t.working("reading") as report:
    report(1, 2)
    time.sleep(0.3)
t.info("a line\\x1b[2J of ours")
t.start_progress(20, 0, 10)
for step in range(1, 13):
    t.advance(step, {"Training/Loss": 1.5, "Monitoring/Loss_Trend": -0.4,
                     "GPU_0/Utilization_Percent": 97.0, "GPU_0/Temperature_C": 61.0})
with t.working("evaluating") as report:
    report(3, 4)
    t.warning("Loss_Spike at step 12: look at it")
    time.sleep(1.2)
t.stop_progress()
t.final("the end")
"""


def on_a_pty(*arguments: str, scene: str = SCENE) -> str:
    """What the scene writes when its output is a terminal of 100 columns."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a POSIX thing")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    for name in (
        "NO_COLOR",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
        "FORCE_COLOR",
        "COLUMNS",
        "LINES",
    ):
        environment.pop(name, None)
    command = [sys.executable, "-c", scene, *arguments]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # Linux reports the end of the other side as an error
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0, output
    return output.decode()


@pytest.mark.slow
def test_a_terminal_shows_the_panel():
    screen = on_a_pty()
    for part in ("reading", "epoch 2/2", "2/10", "12/20", "left", "loss 1.5000 ↘", "the end"):
        assert part in screen, part
    assert "GPU 0" in screen and "97 % busy" in screen and "61 °C" in screen
    assert "evaluating" in screen and "3/4" in screen
    assert screen.count("Loss_Spike at step 12") >= 2, "above the panel and in it"
    assert "\x1b[2J" not in screen, "a control sequence of the data reached the screen"


@pytest.mark.slow
def test_quiet_on_a_terminal():
    screen = on_a_pty("quiet")
    assert "epoch" not in screen and "a line" not in screen and "reading" not in screen
    assert "Loss_Spike" in screen and "the end" in screen


@pytest.mark.slow
def test_text_is_broken_between_words_and_a_path_is_whole():
    words, path = "vector embeddings of a token " * 12, "/a-very-long/folder" * 9
    scene = f"""
from finetuning.common.terminal import Terminal
t = Terminal()
t.info({words!r})
t.table("Run", [("estimate", {words!r}), ("run", {path!r})])
"""
    shown = re.sub(r"\x1b\[[\d;]*m", "", on_a_pty(scene=scene))
    lines = shown.splitlines()
    assert {word for line in lines for word in line.split()} == {
        *words.split(),
        "Run",
        "estimate",
        "run",
        path,
    }
    assert all(len(line) <= 100 for line in lines if path not in line)
    assert sum(line.startswith(" " * 10) for line in lines) >= 3, "below the value, not the name"
    done = subprocess.run([sys.executable, "-c", scene], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [words, "Run", f"estimate  {words}", f"run       {path}"]


@pytest.mark.slow
def test_ctrl_c_leaves_the_panel_in_its_lines():
    """A terminal writes ^C behind the panel; in the last column that would be one more line."""
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    lines = console.render_lines(RunPanel(100, 0, 10), pad=False)
    assert all(sum(part.cell_length for part in line) <= 80 - len("^C") for line in lines)


@pytest.mark.slow
def test_without_a_terminal_there_are_few_plain_lines():
    command = [sys.executable, "-c", SCENE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a line of ours", "step 1/20  loss 1.5000", "the end"]
    assert done.stderr.splitlines() == ["warning: Loss_Spike at step 12: look at it"]
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_console_that_lacks_a_character_ends_no_run():
    code = "from finetuning.common.terminal import Terminal; Terminal().info('密码 ↘')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 0 and b"?? ?" in done.stdout, done.stderr


def test_other_ranks_are_silent(capfd):
    other = Terminal(is_main=False)
    with other.working("reading") as report:
        report(1, 2)
    other.info("x")
    other.warning("x")
    other.final("x")
    other.table("x", [("a", 1)])
    other.start_progress(2, 0, 2)
    other.advance(1, LOGGED)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_held_out_loss_is_always_a_plain_line(capfd):
    term = Terminal()
    term.start_progress(20, 0, 10)
    for step in range(3):
        term.advance(step, LOGGED | ({} if step else {"Eval/Loss": 7.3}))
    term.advance(3, {"Eval/Loss": 6.1})
    lines = capfd.readouterr().out.splitlines()
    assert (
        len(lines) == 2 and "held-out 7.3" in lines[0] and lines[1] == "step 3/20  held-out 6.1000"
    )


def test_long_work_leaves_a_line(capfd, monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_LINE_SECONDS", 0.0)
    with Terminal().working("loading the model"):
        pass
    assert capfd.readouterr().out == "loading the model: 0 s\n"


def test_the_log_has_the_lines_without_secrets(tmp_path, capfd):
    term = Terminal()
    term.open_log(tmp_path / "training.log")
    term.info("token=hf_abcdefghijklmnopqrstuvwxyz0123456789")
    term.advance(3, LOGGED)
    text = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert "hf_abc" not in text + capfd.readouterr().out and "loss 1.5000" in text


def test_time_left_goes_by_the_last_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    panel = RunPanel(100, 40, 10)
    now[0] += 60.0  # an evaluation before the first step is no part of the pace
    for step in (41, 42, 43, 44):
        assert panel.seconds_left() is None or step > 42
        now[0] += 2.0
        panel.advance(step, {})
    assert panel.seconds_left() == pytest.approx(2.0 * 56)
    panel.advance(30, {})  # rolled back to a checkpoint
    assert panel.seconds_left() is None
    now[0] += 3.0
    panel.advance(31, {})
    assert panel.seconds_left() == pytest.approx(3.0 * 69)


@pytest.mark.parametrize(("trend", "arrow"), [(-0.4, "↘"), (0.4, "↗"), (0.001, "→"), (None, "")])
def test_trend_arrow(trend, arrow):
    metrics = {"Training/Loss": 1.5} | ({} if trend is None else {"Monitoring/Loss_Trend": trend})
    assert trend_arrow(metrics) == arrow


def test_gpu_lines_are_few():
    metrics = {f"GPU_{i}/Utilization_Percent": 50.0 for i in range(12)}
    lines = gpu_lines(metrics)
    assert lines[0] == "GPU 0  50 % busy" and lines[-1] == "8 more GPUs" and len(lines) == 5
    assert gpu_lines({"Final_GPU_0/x": 1.0}) == []


GAUGES = {
    "Training/Loss": 1.25, "Eval/Loss": 2.5, "Training/Learning_Rate": 1e-3,
    "Training/Gradient_Norm": 3.25, "Throughput/Tokens_Per_Second": 1500.0,
}  # fmt: skip


@pytest.mark.parametrize("trend", [{}, {"Monitoring/Loss_Trend": -1.0}], ids=["unknown", "falls"])
def test_steps_are_shown_in_chinese(capsys, trend: dict):
    """Lines and panel, with and without a held-out loss; no word of them is English."""
    gpus = {f"GPU_{i}/{name}": 40.0 for i in range(9) for name in ("Temperature_C", "Power_W")}
    gpus |= {"GPU_0/Utilization_Percent": 98.0, "GPU_0/Memory_Usage_Percent": 70.0}
    language.use("zh")
    try:
        shown = Terminal()
        shown.start_progress(total=2, done=0, steps_per_epoch=2)
        for kept in ({"Eval/Loss"}, {"Training/Loss"}, set(GAUGES) - {"Eval/Loss"}, set(GAUGES)):
            shown.advance(2, {tag: GAUGES[tag] for tag in kept})
        shown.stop_progress()
        panel = RunPanel(100, 40, 10)
        panel.advance(41, GAUGES | gpus | trend)
        Console(width=200).print(panel)
    finally:
        language.use("en")
    said = capsys.readouterr().out
    assert "第 2/2 步  损失 1.2500  留出 2.5000  学习率 1.00e-03  梯度 3.25" in said
    assert "忙碌 98 %  显存 70 %" in said and "个 GPU" in said
    assert ("损失 1.2500 ↘" in said) == bool(trend)
    assert not re.search("[a-z]{3}", said.replace("token", "")), said


def test_durations():
    assert [duration(s) for s in (5, 65, 3723.4)] == ["0:05", "1:05", "1:02:03"]


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"])
def test_colours_forced_into_a_file_move_no_cursor(variable, monkeypatch, capsys):
    """CI and container images set it: a log gets the rare plain lines, not two frames a second."""
    monkeypatch.setenv(variable, "1")
    terminal = Terminal()
    with terminal.working("reading"):
        terminal.info("a line that is " + "very " * 60 + "long")
    terminal.start_progress(total=2, done=0, steps_per_epoch=2)
    terminal.advance(1, {"Training/Loss": 2.0})
    terminal.advance(2, {"Training/Loss": 1.0})
    terminal.stop_progress()
    said = capsys.readouterr().out
    assert "step 2/2  loss 1.0000" in said and len(said.splitlines()) == 3
    assert not re.search(r"\x1b\[\d*[A-HJKST?]", said), "a cursor that moves"


def test_a_terminal_that_goes_away_ends_no_run(tmp_path, monkeypatch):
    """As after `| head`, or when the terminal of a run in the background is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1, encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        terminal = Terminal()
        terminal.open_log(tmp_path / "training.log")
        terminal.info("first")
        terminal.start_progress(total=1, done=0, steps_per_epoch=1)
        terminal.advance(1, {"Training/Loss": 1.0})
        terminal.final("done")
    said = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert "can't be written any more: [Errno 32] Broken pipe" in said
    assert said.count("can't be written") == 1 and "done" in said


def test_what_was_said_before_there_was_a_log_file_is_in_it(tmp_path, capsys):
    terminal = Terminal(quiet=True)
    terminal.warning("an early warning")
    terminal.open_log(tmp_path / "training.log")
    terminal.info("later")
    lines = (tmp_path / "training.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["warning: an early warning", "later"]
