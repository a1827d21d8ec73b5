"""Signals that end a process: which are taken, what was ignored, and what a second one does.

uv run pytest tests/common/test_process.py
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuning.common.process import Interrupted, StopSignal
from finetuning.common.workers import in_order

ROOT = Path(__file__).parents[2]

NAMES = [name for name in StopSignal.NAMES if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def all_as_usual() -> Iterator[None]:
    """A runner in the background of a script may itself ignore some of them."""
    before = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in NAMES}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_leaves_its_name_once_there_is_something_to_save(name: str):
    with StopSignal() as stop:
        stop.wait_for_loop()
        send(name)
        assert stop.name == name
    assert signal.getsignal(getattr(signal, name)) == signal.SIG_DFL, "the handler was given back"


@pytest.mark.parametrize("name", NAMES)
def test_before_that_it_ends_the_process_with_its_exit_code(name: str):
    with StopSignal() as stop, pytest.raises(Interrupted, match=name) as raised:
        send(name)
    assert raised.value.code == 128 + getattr(signal, name) and stop.name == name


@pytest.mark.parametrize("name", NAMES)
def test_what_was_ignored_at_the_start_stays_ignored(name: str):
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_IGN)
    with StopSignal() as stop:
        send(name)
        assert signal.getsignal(number) == signal.SIG_IGN and not stop.name
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        ("SIGINT", "SIGINT", True),
        ("SIGTERM", "SIGTERM", True),
        ("SIGTERM", "SIGINT", True),
        ("SIGUSR1", "SIGTERM", False),  # a scheduler's warning, then its time limit
        ("SIGXCPU", "SIGXCPU", False),  # the kernel repeats it each second
    ],
)
def test_a_second_signal_of_a_person_ends_at_once(first, second, ends, monkeypatch):
    with StopSignal() as stop:
        stop.wait_for_loop()
        send(first)
        send(first)  # the launcher passes on what the terminal has sent
        now = time.monotonic() + 1
        monkeypatch.setattr(time, "monotonic", lambda: now)
        if ends:
            with pytest.raises(Interrupted, match="without saving"):
                send(second)
            assert signal.getsignal(getattr(signal, second)) == signal.SIG_DFL, "the third kills"
        else:
            send(second)
        assert stop.name == first


def test_a_block_can_be_left_at_once_and_what_follows_sees_the_name():
    done = []
    with StopSignal() as stop:
        stop.wait_for_loop()
        with stop.at_once():
            send("SIGTERM")
            done.append("the rest of the block")
        assert not done and stop.name == "SIGTERM"
        send("SIGTERM")  # the launcher's; it ends nothing here


@pytest.mark.parametrize(
    ("first", "second"), [("SIGINT", "SIGINT"), ("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGUSR1")]
)
def test_a_block_is_left_by_a_signal_that_follows_another(first, second, monkeypatch):
    """As a loop that has ended for the first one may wait in it; no more than the block is left."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    done = []
    with StopSignal() as stop:
        stop.wait_for_loop()
        send(first)
        with stop.at_once():
            send(first)  # the launcher passes on what the terminal has sent
            done.append("after the launcher's")
            now[0] += 1
            send("SIGXCPU")  # the kernel repeats it each second
            done.append("after the kernel's")
            send(second)
            done.append("after a second one")
        send(second)  # the launcher's
        assert done == ["after the launcher's", "after the kernel's"] and stop.name == first


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [True, False])
def test_the_imports_leave_an_ignored_ctrl_c_ignored(ignored: bool):
    script = (
        "import signal\n"
        "from finetuning.common import process\n"
        "process.imports_begin()\n"
        "during = signal.getsignal(signal.SIGINT)\n"
        "process.imports_are_done()\n"
        "print(during is signal.SIG_IGN, signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert done.stdout.split() == [str(ignored)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "SIGINT"])
def test_other_signals_within_the_imports_are_one_line_and_later_as_usual(name: str):
    script = (
        "import os, signal\n"
        "from finetuning.common import process\n"
        "process.imports_begin()\n"
        "process.imports_are_done()\n"
        f"assert signal.getsignal(signal.{name}) is signal.SIG_DFL\n"
        "process.imports_begin()\n"
        f"os.kill(os.getpid(), signal.{name})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr == "interrupted before anything was to save\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["compare_runs.py", "convergence.py", "dataset_stats.py", "sweep.py"]
)
def test_ctrl_c_within_the_imports_of_a_small_program_is_one_line(program: str, tmp_path: Path):
    source, script = (ROOT / program).read_text(encoding="utf-8"), tmp_path / "script.py"
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"
    source = source.replace("process.imports_are_done()", interrupt, 1)
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{source}", encoding="utf-8")
    words = ["lora-r=4"] * (program == "sweep.py")  # which looks at them before the last imports
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted before anything was to save\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"), [("ask.py", ["q"]), ("export.py", ["--output", "nowhere"])]
)
def test_ctrl_c_within_the_imports_of_a_program_is_one_line(program, words, tmp_path):
    """The signal comes within the import of torch; the rest of the program does not run."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    source = (ROOT / program).read_text(encoding="utf-8")
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    script = tmp_path / "script.py"
    source = source.replace("import torch\n", f"{interrupt}\nimport torch\n", 1)
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{source}", encoding="utf-8")
    command = [sys.executable, str(script), *words, "--adapter", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.splitlines() == [
        "starting: the libraries are being loaded",
        "interrupted before anything was to save",
    ]


def wait_long(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.slow
def test_workers_do_not_hold_up_the_end():
    """A worker in the middle of minutes of work ends when nobody wants the result any more."""
    results = in_order(wait_long, [(0.0,), *[(600.0,)] * 6], 2)
    assert next(results) > 0
    began = time.monotonic()
    with pytest.raises(Interrupted):
        results.throw(Interrupted(signal.SIGTERM, second=False))
    assert time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a signal at the parent's death")
def test_workers_end_with_a_parent_that_is_killed():
    script = (
        "import os\nfrom finetuning.common.workers import in_order\n"
        "from tests.common.test_process import wait_long\n"
        "if __name__ == '__main__':\n"
        "    results = in_order(wait_long, [(0.0,), *[(600.0,)] * 6], 2)\n"
        "    print(next(results), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    worker, deadline = int(done.stdout), time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["process.exit_process", "sys.exit"])
@pytest.mark.parametrize(
    ("code", "heard", "expected"), [(3, True, 3), (3, False, 120), (0, False, 120)]
)
def test_a_program_whose_words_nobody_reads_ends_as_pythons_do(end, code, heard, expected):
    """Without the interpreter's own end as with it."""
    script = "import sys; from finetuning.common import process; print('x'); sys.stdin.read(); "
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}{end}({code})"],
        cwd=ROOT,
        env=buffered,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        if not heard:
            child.stdout.close()
        child.stdin.close()
        assert child.wait(60) == expected
