"""F27 and F28: models, templates and adapters that ask for too much; workers when their parent ends."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import direct_finetuning_with_existing_modules as program
from finetuning.common import workers
from finetuning.common.errors import exit_code
from finetuning.data import chat_template
from finetuning.model import resolve

from . import orphans
from .checkpoints import copy_of_stopped, two_checkpoints
from .hostile import replacing
from .rig import Rig, fingerprint, fork, replaced, wait_until
from .tally import Row, Tally, Trial

# -----------------------------------------------------------------------------
# F27: what asks for too much

ROOM = (
    12 << 30
)  # bytes of address space, so that a protection that is gone does not take the machine along
SECONDS = 60  # of the processor
KNOWS_THE_DATA = "{%% if messages[0].content|length > 12 %%}{{ 'x' * %d }}{%% endif %%}"


def _set(**lines: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | lines))

    return change


def _template(size: int) -> Callable[[Path], None]:
    """Harm to what is longer than a probe, in front of the model's own template."""

    def change(model: Path) -> None:
        for path in (model / "chat_template.jinja", model / "tokenizer_config.json"):
            if not path.is_file():
                continue
            if path.suffix == ".jinja":
                path.write_text(KNOWS_THE_DATA % size + path.read_text())
            elif "chat_template" in (content := json.loads(path.read_text())):
                content["chat_template"] = KNOWS_THE_DATA % size + content["chat_template"]
                path.write_text(json.dumps(content))

    return change


MODELS = {
    "a billion layers": _set(num_hidden_layers=10**9),
    "a hidden state of a billion": _set(hidden_size=10**9),
    "a vocabulary of 10^12": _set(vocab_size=10**12),
    "a billion labels": _set(num_labels=10**9),
    "heads that multiply": _set(num_attention_heads=50_000, num_key_value_heads=50_000),
    "a template that knows the data": _template(3 * 10**9),
}


def in_bounds(rig: Rig, arguments: list[str], fired: bool, wanted: int) -> Trial:
    """A run that must end with this exit code, soon and in little memory."""
    place = rig.place("f27-run")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def action() -> int:
        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        return program.main(arguments)

    outcome = fork(place / "console.txt", action).wait()
    grown = outcome.peak_mb - before
    problems = [f"exit {outcome.code}: {outcome.output[-300:]}"] if outcome.code != wanted else []
    problems += ["a traceback"] if "Traceback" in outcome.output else []
    problems += [f"{grown:.0f} MB more"] if grown > 1500 else []
    problems += [f"{outcome.cpu_seconds:.0f} s"] if outcome.cpu_seconds > 25 else []
    shutil.rmtree(place, ignore_errors=True)
    return fired, problems


def greedy_model(rig: Rig, change: Callable[[Path], None]) -> Trial:
    """A changed copy of the model folder is refused."""
    place = rig.place("f27")
    shutil.copytree(rig.model, place / "model")
    change(place / "model")
    fired = fingerprint(place / "model") != fingerprint(rig.model)
    arguments = replacing("--model-name", str(place / "model"), rig.arguments(place / "out"))
    return in_bounds(rig, [*arguments, "--max-steps", "1"], fired, 2)


def adapter_with(rig: Rig, lines: dict, wanted: int) -> Trial:
    """A run that starts from an adapter whose configuration says something else."""
    output = copy_of_stopped(rig, "f27a")
    folder = max((output / "checkpoints").glob("checkpoint-*"))
    path = folder / "adapter_config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | lines))
    place = rig.place("f27-out")
    arguments = [*rig.arguments(place / "out"), "--init-adapter", str(folder), "--max-steps", "1"]
    return in_bounds(rig, arguments, path.read_text() != whole, wanted)


def f27(rig: Rig, tally: Tally, count: int) -> None:
    """Configurations, a template and adapters."""
    for name, change in list(MODELS.items())[:count]:
        tally.attempt(name, lambda c=change: greedy_model(rig, c))
    endless = {"target_modules": r"((\w|\.|\w\.)+)+!"}
    tally.attempt("modules by an endless expression", lambda: adapter_with(rig, endless, 0))
    pattern = {"rank_pattern": {r"((\w|\.|\w\.)+)+!": 4}}
    tally.attempt("ranks by an endless expression", lambda: adapter_with(rig, pattern, 2))
    tally.attempt("a rank of a billion", lambda: adapter_with(rig, {"r": 10**9}, 2))


def sizes_are_not_compared() -> None:
    """Mutant: a configuration may say what it likes."""
    replaced(resolve, "check_sizes", lambda config, path, files: None)


def templates_have_no_limits() -> None:
    """Mutant: a conversation may take all there is."""
    replaced(chat_template, "within_limits", lambda action: action())


# -----------------------------------------------------------------------------
# F28: workers when their parent ends


def of_session(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            inside = os.getsid(process.pid) == session
        except OSError:
            continue
        if inside and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def work_for(seconds: float) -> None:
    """What a worker is at."""
    threading.Event().wait(seconds)


def ended_parent(rig: Rig, name: str, wanted: int) -> Trial:
    """Two workers at work for a minute when a signal comes: code, no process after 5 s, no traceback."""
    place = rig.place("f28")

    def action() -> int:
        return exit_code(lambda: list(workers.in_order(work_for, [(60.0,)] * 4, 2)))

    child = fork(place / "console.txt", action)
    there = wait_until(lambda: len(of_session(child.pid)) >= 3, 30)
    wait_until(lambda: False, 0.5)  # until each is at its work
    number = getattr(signal, name)
    if name == "SIGINT":  # as a terminal sends it
        os.killpg(child.pid, number)
    else:
        child.kill(number)
    began = time.monotonic()
    gone = wait_until(lambda: not set(of_session(child.pid)) - {child.pid}, 5)
    outcome = child.wait(30)
    problems = [] if gone else ["workers are left after 5 s"]
    problems += [f"exit {outcome.code}"] if outcome.code != wanted else []
    problems += [f"{time.monotonic() - began:.1f} s"] if time.monotonic() - began > 7 else []
    problems += ["a traceback: " + outcome.output[-300:]] if "Traceback" in outcome.output else []
    shutil.rmtree(place, ignore_errors=True)
    return there, problems


def f28(rig: Rig, tally: Tally, count: int) -> None:
    """Ctrl-C for all, SIGTERM and SIGKILL for the parent alone."""
    for _ in range(count):
        for name, code in (("SIGINT", 130), ("SIGTERM", -15), ("SIGKILL", -9)):
            tally.attempt(name, lambda n=name, c=code: ended_parent(rig, n, c))


def workers_outlive_their_parent() -> None:
    """Mutant: a worker is not told whose it is."""
    replaced(workers, "begin_worker", orphans.begin_worker)


ROWS = [
    Row(
        "F27",
        "configurations, templates and adapters that ask for too much",
        f27,
        full=9,
        quick=9,
        mutants={
            "sizes are not compared": sizes_are_not_compared,
            "templates have no limits": templates_have_no_limits,
        },
        mutant_count=9,
        needs=(two_checkpoints,),
    ),
    Row(
        "F28",
        "Ctrl-C, SIGTERM and SIGKILL while workers are at work",
        f28,
        full=10,
        quick=1,
        mutants={"workers outlive their parent": workers_outlive_their_parent},
    ),
]
