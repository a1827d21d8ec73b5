"""Windows and macOS can import and run every module, as far as this shows on another system.

The sources are read, and a run is made where POSIX modules, calls and signals are absent. Neither system
itself is at hand.

    uv run pytest -m "not long" tests/runs/test_portability.py
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuning.events.reading import read_run

ROOT = Path(__file__).parents[2]
MODULES = sorted([*ROOT.glob("*.py"), *(ROOT / "finetuning").rglob("*.py")])
FILES = [*MODULES, *sorted(ROOT.glob("scripts/*.py"))]
POSIX_MODULES = {
    "crypt", "curses", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource", "spwd",
    "syslog", "termios", "tty",
}  # fmt: skip
POSIX_OS = {
    "O_DIRECTORY", "O_NOFOLLOW", "chown", "fchmod", "fork", "forkpty", "getegid", "geteuid", "getgid",
    "getloadavg", "getpgid", "getuid", "killpg", "mkfifo", "nice", "posix_fadvise", "sched_getaffinity",
    "sched_setaffinity", "setsid", "statvfs", "sysconf", "uname", "wait4",
}  # fmt: skip
EVERYWHERE = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_module_level(child)


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {node.module.split(".")[0]}
    return set()


MASKS = {"SIG_BLOCK", "SIG_SETMASK"}  # where there is pthread_sigmask


def attributes(tree: ast.Module, module: str) -> set[str]:
    """Names that are read as `module.name`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == module
    }


def asked_for(tree: ast.Module) -> set[str]:
    """Names whose existence the module asks for: hasattr(x, "name"), getattr(x, "name", default)."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    names = {
        call.args[1].value
        for call in calls
        if call.func.id in ("hasattr", "getattr")
        and len(call.args) > 1
        and isinstance(call.args[1], ast.Constant)
    }
    return names | (MASKS if "pthread_sigmask" in names else set())


def test_no_posix_module_is_needed_to_import(subtests):
    for path in FILES:
        with subtests.test(path=path):
            names = {name for node in at_module_level(parsed(path)) for name in imported(node)}
            assert not names & POSIX_MODULES


def test_what_some_systems_lack_is_asked_for_first(subtests):
    for path in FILES:
        if path.name == "supervisor.py":  # a program of its own, which is started on Linux alone
            continue
        with subtests.test(path=path):
            tree = parsed(path)
            found = attributes(tree, "os") & POSIX_OS
            found |= {n for n in attributes(tree, "signal") if n.startswith("SIG")} - EVERYWHERE
            assert not found - asked_for(tree)


def test_text_is_read_and_written_as_utf_8(subtests):
    """A Windows machine in China would else use GBK."""
    for path in FILES:
        with subtests.test(path=path):
            wrong = []
            for node in ast.walk(parsed(path)):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                given = {keyword.arg for keyword in node.keywords}
                mode = next((k.value for k in node.keywords if k.arg == "mode"), None)
                if name == "open" and isinstance(node.func, ast.Name) and len(node.args) > 1:
                    mode = node.args[1]
                binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
                texts = name in ("write_text",) or (name == "read_text" and not node.args)
                opens = name == "open" and isinstance(node.func, ast.Name) and not binary
                if (texts or opens) and "encoding" not in given:
                    wrong.append(node.lineno)
            assert not wrong, [f"{path.name}:{line}" for line in wrong]


def test_the_checks_see_what_they_look_for():
    bad = ast.parse(
        "import fcntl\nimport os, signal\nos.fork()\nsignal.SIGHUP\ndef f(): import pty\n"
    )
    assert {n for node in at_module_level(bad) for n in imported(node)} >= {"fcntl", "os"}
    assert "pty" not in {n for node in at_module_level(bad) for n in imported(node)}
    assert attributes(bad, "os") == {"fork"} and attributes(bad, "signal") == {"SIGHUP"}
    asked = ast.parse('hasattr(signal, "SIGHUP"); getattr(os, "fork", None)')
    assert asked_for(asked) == {"SIGHUP", "fork"}


ELSEWHERE = """
import builtins, importlib, os, signal, sys

root, modules, posix, lacking, signals, arguments = eval(sys.argv[1])
sys.path.insert(0, root)
import finetuning.common.process, torch, transformers, peft, datasets  # they may need what this system has
import matplotlib.pyplot, psutil, tensorboard, transformers.generation

usual = builtins.__import__

def import_elsewhere(name, globals=None, locals=None, fromlist=(), level=0):
    asker = (globals or {}).get("__file__") or ""
    if name.split(".")[0] in posix and asker.startswith(root) and ".venv" not in asker:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return usual(name, globals, locals, fromlist, level)

builtins.__import__ = import_elsewhere
for name in lacking:
    delattr(os, name) if hasattr(os, name) else None
for name in dir(signal):
    if name.startswith("SIG") and name not in signals:
        delattr(signal, name)
for name in modules:
    importlib.import_module(name)
from direct_finetuning_with_existing_modules import main
sys.exit(main(arguments))
"""
# Libraries of this system still call these where they would call another thing on Windows.
LIBRARIES_NEED = {"fchmod", "statvfs", "uname", "sysconf", "sched_getaffinity"}
BLOCKING = {"SIG_BLOCK", "SIG_SETMASK", "SIG_UNBLOCK"}


@pytest.mark.slow
def test_imports_and_trains_without_what_windows_lacks(
    tiny_model: Path, tiny_data: Path, cache_dir: Path, tmp_path: Path
):
    """Every module, and a run from data to adapter, where POSIX modules, calls and signals are absent."""
    run = [
        *("--model-name", str(tiny_model), "--data-path", str(tiny_data), "--max-steps", "2"),
        *("--cache-dir", str(cache_dir), "--output-dir", str(tmp_path / "out"), "--quiet"),
        *("--probe-max-new-tokens", "4", "--logging-steps", "1"),
    ]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    lacking = POSIX_OS - LIBRARIES_NEED
    task = (str(ROOT), modules, POSIX_MODULES, lacking, EVERYWHERE | BLOCKING, run)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, repr(task)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run_dir,) = (tmp_path / "out" / "tensorboard_logs").iterdir()
    assert len(read_run(run_dir)["Training/Loss"]) == 2
    assert (tmp_path / "out" / "final_model" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_module_that_needs_posix_would_be_noticed(tmp_path: Path):
    """The control: the same, with one module that imports fcntl."""
    (tmp_path / "needs_posix.py").write_text("import fcntl\n", encoding="utf-8")
    task = (str(tmp_path), ["needs_posix"], POSIX_MODULES, (), EVERYWHERE | BLOCKING, [])
    script = re.sub(r"import finetuning.common.process, .*\nimport matplotlib.*\n", "", ELSEWHERE)
    done = subprocess.run(
        [sys.executable, "-c", script, repr(task)], capture_output=True, text=True
    )
    assert "No module named 'fcntl'" in done.stderr
