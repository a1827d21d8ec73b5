"""Nobody waits long for a run that is asked to end, wherever it is, and no process of it stays.

uv run pytest -m "not long" tests/runs/test_waiting.py

Real processes: Ctrl-C goes to all of a terminal's, SIGTERM and SIGKILL to the program alone.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.helpers.ranks import TORCHRUN

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SECONDS, AFTER_KILL = 2.0, 5.0  # for a machine of its own
BUSY = 2.0  # times as long where other tests share the cores

# The program as it is, but a signal comes so many seconds after one of its phases began.
LAUNCH = """
import os, signal, sys, threading, time
phase, delay, name, note, *arguments = sys.argv[1:]
from finetuning.common import terminal
from finetuning.readers import dataset
dataset.LARGE_DATA = 0  # with workers
working, begun = terminal.Terminal.working, []
def send():
    time.sleep(float(delay))
    with open(note, "w") as file:
        file.write(str(time.time()))
    number = getattr(signal, name)
    os.killpg(0, number) if name == "SIGINT" else os.kill(os.getpid(), number)
def watched(self, what):
    if what.startswith(phase) and not begun:
        begun.append(threading.Thread(target=send, daemon=True).start())
    return working(self, what)
terminal.Terminal.working = watched
sys.argv = ["direct_finetuning_with_existing_modules.py", *arguments]
from direct_finetuning_with_existing_modules import main, process
if __name__ == "__main__":
    process.exit_process(main(arguments))
"""


@dataclass(frozen=True)
class Ended:
    """code: the exit code; seconds: after the signal; left: its processes that still lived after 5 s."""

    code: int
    seconds: float
    out: str
    err: str
    left: list[str]


def alive(session: int) -> list[str]:
    """Command lines of the processes in a session."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        try:
            of_session = os.getsid(process.pid) == session
        except OSError:
            continue
        if of_session and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or [])[:200])
    return found


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Path:
    """Enough to read, compare, tokenize and describe that each takes seconds."""
    draw, path = random.Random(3), tmp_path_factory.mktemp("many") / "many.jsonl"
    letters = "密钥分组杂凑签名证书随机协议曲线填充轮函数明文算法安全标准离散对数整数公钥认证完整性消息摘要"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(12_000):
            row = {
                n: "".join(draw.choices(letters, k=k))
                for n, k in (("question", 20), ("thinking", 300), ("answer", 80))
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="session")
def kept_until_tokens(tmp_path_factory) -> Path:
    """A cache for runs that end while they tokenize: what comes before is done once."""
    return tmp_path_factory.mktemp("until-tokens")


@pytest.fixture
def interrupted(tmp_path, tiny_model, kept_until_tokens) -> Callable[..., Ended]:
    """Start the program on some data and send it a signal in a phase."""

    def run(phase: str, delay: float, name: str, data: Path, *more: str) -> Ended:
        script, note = tmp_path / "launch.py", tmp_path / "note"
        script.write_text(LAUNCH, encoding="utf-8")
        cache = kept_until_tokens if phase == "tokenizing" else tmp_path / "cache"
        places = ["--output-dir", str(tmp_path / "out"), "--cache-dir", str(cache)]
        given = ["--model-name", str(tiny_model), "--data-path", str(data), "--device", "cpu"]
        options = [*given, *places, "--workers", "2", "--max-steps", "30", *more]
        process = subprocess.Popen(
            [sys.executable, str(script), phase, str(delay), name, str(note), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        try:
            out, err = process.communicate(timeout=300)
            seconds = time.time() - float(note.read_text())
            deadline = time.monotonic() + AFTER_KILL
            while (left := alive(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            process.kill()
        return Ended(process.returncode, seconds, out, err, left)

    return run


def check(ended: Ended, codes: set[int]) -> None:
    assert ended.code in codes, (ended.out[-2000:], ended.err[-2000:])
    assert ended.seconds < SECONDS * BUSY, ended.seconds
    assert ended.left == []
    assert "Traceback" not in ended.out + ended.err and "BrokenProcess" not in ended.out + ended.err


LARGE = [("reading", 0.2), ("reading", 1.2), ("looking", 0.5), ("tokenizing", 1.5)]
SMALL = [("getting", 0.0), ("trying", 0.05), ("loading", 0.0)]


@pytest.mark.parametrize(("phase", "delay"), LARGE)
def test_ctrl_c_while_much_is_read_ends_the_program_and_its_workers(
    phase, delay, many, interrupted
):
    ended = interrupted(phase, delay, "SIGINT", many, "--num-probes", "0")
    check(ended, {130})
    assert ended.err.strip() == "error: SIGINT: interrupted before the first step"


@pytest.mark.parametrize(("phase", "delay"), SMALL)
def test_ctrl_c_before_the_first_step(phase, delay, tiny_data, interrupted):
    check(interrupted(phase, delay, "SIGINT", tiny_data, "--num-probes", "0"), {130})


@pytest.mark.parametrize("phase", ["describing", "evaluation", "saving"])
def test_ctrl_c_later_leaves_a_checkpoint(phase, tiny_data, tmp_path, interrupted):
    probes = ["--num-probes", "2", "--probe-max-new-tokens", "4000", "--save-steps", "5"]
    ended = interrupted(phase, 0.3, "SIGINT", tiny_data, *probes)
    check(ended, {0})
    assert "--resume latest" in ended.out and list((tmp_path / "out/checkpoints").iterdir())


def test_ctrl_c_while_workers_describe_much_data(many, interrupted):
    """Workers hear of Ctrl-C too, as all of a terminal's processes do."""
    check(interrupted("describing", 2.0, "SIGINT", many, "--num-probes", "0"), {0})


def test_ctrl_c_while_the_report_is_written(tiny_data, tmp_path, interrupted):
    ended = interrupted("writing", 0.3, "SIGINT", tiny_data, "--num-probes", "0")
    check(ended, {0})
    assert "no report.html: a signal came" in ended.err
    (status,) = (tmp_path / "out").glob("training_logs/*/status.json")
    assert json.loads(status.read_text())["status"] == "completed"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize(
    ("phase", "delay"), [("reading", 1.2), ("tokenizing", 1.5), ("writing", 0.3)]
)
def test_no_process_stays(name, phase, delay, many, tiny_data, interrupted):
    data = tiny_data if phase == "writing" else many
    ended = interrupted(phase, delay, name, data, "--num-probes", "0")
    assert ended.left == [] and "Traceback" not in ended.out + ended.err
    assert ended.code in {-signal.SIGKILL, 128 + signal.SIGTERM, 0}


def test_ranks_end_with_their_launcher(tmp_path, tiny_model, tiny_data, cache_dir):
    """SIGKILL for torchrun: its ranks end; they were orphans that trained on."""
    out = tmp_path / "out"
    script = str(ROOT / "direct_finetuning_with_existing_modules.py")
    launch = [*TORCHRUN, "--nproc-per-node", "2"]
    given = ["--model-name", str(tiny_model), "--data-path", str(tiny_data), "--device", "cpu"]
    places = ["--output-dir", str(out), "--cache-dir", str(cache_dir), "--num-probes", "0"]
    process = subprocess.Popen(
        [*launch, script, *given, *places, "--max-steps", "100000", "--eval-fraction", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 180
        while not any("step 2" in p.read_text() for p in out.glob("training_logs/*/training.log")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.kill()
        process.wait()
        deadline = time.monotonic() + AFTER_KILL * BUSY
        while (left := alive(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    finally:
        for child in psutil.process_iter():
            try:
                if os.getsid(child.pid) == process.pid:
                    child.kill()
            except (OSError, psutil.NoSuchProcess):
                continue
