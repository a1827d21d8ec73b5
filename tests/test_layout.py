"""The house stays liveable: imports point downwards, libraries have their rooms, the linter is content.

uv run pytest tests/test_layout.py
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in ROOT.glob("*.py") if not path.stem.startswith("test_")}
ENTRY = "direct_finetuning_with_existing_modules"
PROGRAMS = {ENTRY, "ask", "export", "compare_runs"}  # started by people, imported by no module

# Library -> the only modules that may import it.
ROOMS = {
    "peft": {"model_loading", "fast_lora"},
    "tensorboard": {"event_file", "event_values", "step_writer"},
    "pynvml": {"gpu_gauges", "visible_gpus", "system_monitor"},
    "tyro": {"training_config", "dataset_stats", "convergence", "loss_curves", *PROGRAMS, "report"},
    "rich": {"terminal", "dataset_report", "dataset_stats", "convergence", *PROGRAMS, "report"},
}
# Names of ours that would hide a standard or well-known module.
TAKEN = {"datasets", "logging", "statistics", "types", "profile", "tokenize", "trl", "evaluate"}


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def test_no_import_cycle():
    graph = {name: imported & MODULES.keys() for name, imported in IMPORTS.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_module_imports_a_program():
    for name, imported in IMPORTS.items():
        assert not (imported & PROGRAMS) or name in PROGRAMS, name


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_is_imported_in_its_rooms_only(library: str):
    users = {name for name, imported in IMPORTS.items() if library in imported}
    assert users <= ROOMS[library], users - ROOMS[library]


def test_the_configuration_travels_into_no_module():
    users = {name for name, imported in IMPORTS.items() if "training_config" in imported}
    assert users <= PROGRAMS


def test_no_name_hides_a_known_module():
    assert not MODULES.keys() & (TAKEN | set(sys.stdlib_module_names))


@pytest.mark.parametrize(
    "arguments",
    [["check", "--no-cache"], ["format", "--check", "--no-cache"]],
    ids=["lint", "format"],
)
def test_ruff_is_content(arguments: list[str]):
    ruff = [sys.executable, "-m", "ruff", *arguments, "--quiet", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_public_functions_have_types_and_docstrings():
    bare = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                bare.append(f"{name}.{node.name}: no docstring")
            if isinstance(node, ast.FunctionDef):
                args = [*node.args.args, *node.args.kwonlyargs]
                if node.returns is None or any(a.annotation is None for a in args):
                    bare.append(f"{name}.{node.name}: types missing")
    assert not bare


def test_every_module_says_what_it_is():
    assert not [
        n for n, p in MODULES.items() if not ast.get_docstring(ast.parse(p.read_text("utf-8")))
    ]


def test_documents_name_every_file():
    for document in ("README.md", "docs/architecture.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        missing = [path.name for path in MODULES.values() if path.name not in text]
        assert not missing, f"{document}: {missing}"


def test_nothing_of_this_machine_is_tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert "uv.lock" not in done.stdout.split()
