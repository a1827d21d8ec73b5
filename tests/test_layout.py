"""The order of the house as one table: who imports whom, which library is used where, how large things get.

uv run pytest tests/test_layout.py
"""

import ast
import functools
import graphlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file imports from its own room and from the rooms named behind it.
ROOMS = {
    "common": "",
    "config": "common",
    "readers": "common config",
    "data": "common config readers",
    "analysis": "common config readers data",
    "model": "common config readers data",
    "training": "common config readers data analysis model",
    "evaluation": "common config readers data analysis model",
    "events": "common",
    "monitoring": "common events",
    "runs": "common config readers data analysis model training evaluation monitoring events",
    "root": "common config readers data analysis model training evaluation monitoring events runs",
}
WITHOUT_TORCH = ("readers", "monitoring", "events")  # when they are imported
# At the root. What is started by people is imported by nothing; two files show names of others to users.
PROGRAMS = {
    "direct_finetuning_with_existing_modules", "ask", "export", "compare_runs", "convergence",
    "sweep",
}  # fmt: skip
PUBLIC = {"tb_logger", "dataset_stats"}
ROOT_FILES = {f"{name}.py" for name in PROGRAMS | PUBLIC} | {"test_tensorboard_integration.py"}
AT_THE_ROOT = tuple(sorted(f"{name}.py" for name in PROGRAMS | {"dataset_stats"}))
# Library: the only folders and files that import it.
LIBRARIES = {
    "peft": tuple(
        f"finetuning/model/{name}.py"
        for name in ("adapters", "adapter_config", "saving", "fused_lora")
    ),
    "gguf": ("finetuning/model/gguf_package.py",),
    "tensorboard": ("finetuning/events/",),
    "pynvml": ("finetuning/monitoring/",),
    "openpyxl": ("finetuning/readers/office.py",),
    "docx": ("finetuning/readers/office.py",),
    "fsspec": ("finetuning/common/remote.py",),
    "tyro": (
        "finetuning/command_line.py",
        "finetuning/common/arguments.py",
        "finetuning/common/chinese_help.py",
        "finetuning/runs/report.py",
        *AT_THE_ROOT,
    ),
    "rich": (
        "finetuning/common/terminal.py",
        "finetuning/analysis/report.py",
        "finetuning/runs/comparison.py",
        *AT_THE_ROOT,
    ),
}
THE_WHOLE_CONFIGURATION = (
    *("finetuning/config.py", "finetuning/command_line.py", "finetuning/runs/"),
    *AT_THE_ROOT,
)
# Sizes.
WRITTEN = (
    "*.py",
    *(f"{folder}/**/*.py" for folder in ("finetuning", "tests", "benchmarks", "scripts")),
)
LINES_OF_A_FILE = 500
LINES_OF_A_FUNCTION = 50
PARAMETERS, FUNCTIONS_WITH_MORE = 8, 3
ATTRIBUTES_FIRST_SET_OUTSIDE_INIT = 5
# Names of ours that would hide a well-known module.
TAKEN = {"datasets", "logging", "statistics", "types", "profile", "tokenize", "trl", "evaluate"}

FILES = {
    path.relative_to(ROOT).as_posix(): path
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "finetuning").rglob("*.py")])
    if not path.name.startswith("test_")
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
MODULES = {
    name.removesuffix(".py").replace("/", "."): name
    for name in FILES
    if not name.endswith("__init__.py")
}


def room_of(file: str) -> str:
    """`finetuning/data/packing.py` lies in data, `finetuning/config.py` in config, `ask.py` at the root."""
    parts = file.split("/")
    return "root" if len(parts) == 1 else "config" if len(parts) == 2 else parts[1]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a file is imported: not the bodies of functions, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child) or isinstance(child, (ast.FunctionDef, ast.Lambda)):
            continue
        yield child
        yield from at_import_time(child)


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, str]]:
    """Module and imported name of every import; for a whole module the name is empty."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import: {ast.unparse(node)}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in MODULES else (node.module, alias.name)


@functools.cache
def all_imports(file: str) -> tuple[tuple[str, str], ...]:
    return tuple(imports(ast.walk(TREES[file])))


def ours(file: str) -> set[str]:
    """Files of ours that a file imports, anywhere in it."""
    return {MODULES[module] for module, _ in all_imports(file) if module in MODULES}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{file}:{node.lineno} {node.name}", node


def defined(file: str) -> set[str]:
    """Names that a file gives a value itself, at its top."""
    names = set()
    for node in at_import_time(TREES[file]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names | {node.name for node in TREES[file].body if isinstance(node, ast.FunctionDef)}


# -----------------------------------------------------------------------------
# Imports


def test_the_root_holds_what_people_use():
    assert {path.name for path in ROOT.glob("*.py")} == ROOT_FILES
    told = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(ROOT_FILES) == 9 and "At the root are nine files." in told


def test_a_file_imports_from_rooms_to_its_left_only():
    wrong = []
    for file in FILES:
        room = room_of(file)
        allowed = {room, *ROOMS[room].split()}
        wrong += [f"{file} -> {other}" for other in ours(file) if room_of(other) not in allowed]
    assert not wrong


def test_no_import_cycle():
    list(graphlib.TopologicalSorter({file: ours(file) for file in FILES}).static_order())


def test_no_module_imports_a_program():
    programs = {f"{name}.py" for name in PROGRAMS}
    assert not [f"{file} -> {other}" for file in FILES for other in ours(file) & programs]


def test_every_program_ends_in_the_same_way():
    """The interpreter's own end waits for threads that may never end."""
    for name in AT_THE_ROOT:
        (last,) = ast.parse((ROOT / name).read_text(encoding="utf-8")).body[-1].body
        assert ast.unparse(last).startswith("process.exit_process("), name


def test_some_rooms_import_no_torch():
    wrong = []
    for start in (file for file in FILES if room_of(file) in WITHOUT_TORCH):
        seen, waiting = set(), [start]
        while waiting:
            file = waiting.pop()
            seen.add(file)
            for module, _ in imports(at_import_time(TREES[file])):
                if module.split(".")[0] in ("torch", "transformers", "peft"):
                    wrong.append(f"{start}: {file} imports {module}")
                if module in MODULES and MODULES[module] not in seen:
                    waiting.append(MODULES[module])
    assert not wrong


def test_a_name_is_imported_from_the_file_that_defines_it():
    wrong = [
        f"{file}: {name} is not defined in {module}"
        for file in FILES
        for module, name in all_imports(file)
        if name and module in MODULES and module not in PUBLIC
        if name not in defined(MODULES[module])
    ]
    assert not wrong


def test_no_private_name_crosses_a_file():
    wrong = []
    for file, tree in TREES.items():
        modules = {m.split(".")[-1] for m, name in all_imports(file) if m in MODULES and not name}
        wrong += [f"{file}: {n}" for m, n in all_imports(file) if m in MODULES and n[:1] == "_"]
        wrong += [
            f"{file}:{node.lineno} {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr)
            if isinstance(node.value, ast.Name) and node.value.id in modules
        ]
    assert not wrong


def test_init_files_are_empty():
    assert not [
        name for name, path in FILES.items() if path.name == "__init__.py" and path.stat().st_size
    ]


def test_a_library_is_imported_in_its_rooms_only():
    wrong = []
    for library, places in LIBRARIES.items():
        users = [f for f in FILES if library in {m.split(".")[0] for m, _ in all_imports(f)}]
        wrong += [f"{user} imports {library}" for user in users if not user.startswith(places)]
    assert not wrong


def test_the_configuration_travels_into_no_module():
    texts = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
    users = [name for name, text in texts.items() if re.search(r"\bDirectTrainingConfig\b", text)]
    assert not [user for user in users if not user.startswith(THE_WHOLE_CONFIGURATION)]


def test_no_name_hides_a_known_module():
    names = {module for module in MODULES if "." not in module}
    assert not names & (TAKEN | set(sys.stdlib_module_names))


# -----------------------------------------------------------------------------
# Sizes


def test_files_are_short():
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()
    }
    long = {name: n for name, n in lines.items() if n > LINES_OF_A_FILE}
    assert not long


def test_functions_are_short():
    lengths = {place: node.end_lineno - node.lineno + 1 for place, node in functions()}
    assert not {place: n for place, n in lengths.items() if n > LINES_OF_A_FUNCTION}


def test_functions_have_few_parameters():
    counts = {}
    for place, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if not (given and given[0].arg == "ctx"):  # torch.autograd calls those by position
            counts[place] = len([a for a in given if a.arg not in ("self", "cls")])
    more = {place: n for place, n in counts.items() if n > PARAMETERS}
    assert len(more) <= FUNCTIONS_WITH_MORE, more


def attributes_set(function: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_an_object_is_complete_after_its_init():
    classes = [
        (file, node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    complete: dict[tuple[str, str], set[str]] = {}
    for file, node in classes:
        names = {n.id for n in at_import_time(node) if isinstance(n, ast.Name)}
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        first = (m for m in methods if m.name in ("__init__", "__post_init__", "__setstate__"))
        complete[file, node.name] = names.union(*map(attributes_set, first))
    late = []
    for file, node in classes:
        bases = {ast.unparse(base) for base in node.bases}
        inherited = (found for (_, name), found in complete.items() if name in bases)
        known = complete[file, node.name].union(*inherited)
        for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
            late += [f"{file} {node.name}.{name}" for name in attributes_set(method) - known]
    assert len(set(late)) <= ATTRIBUTES_FIRST_SET_OUTSIDE_INIT, sorted(set(late))


# -----------------------------------------------------------------------------
# Tests


HANGS = """
import subprocess, sys

def test_waits():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]):
        raise ValueError

def test_passes():
    pass
"""


@pytest.mark.slow
def test_a_test_that_hangs_fails_and_the_others_go_on(tmp_path: Path, pytestconfig):
    """A server that did not end held all of them for hours."""
    assert 0 < float(pytestconfig.getini("timeout")) <= 900
    (tmp_path / "test_it.py").write_text(HANGS)
    ours = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-n", "1"]
    command = [sys.executable, "-m", "pytest", *ours, "-o", "timeout=2", str(tmp_path)]
    outside = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert "Failed: Timeout (>2.0s)" in done.stdout and "1 failed, 1 passed" in done.stdout


# -----------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    "arguments",
    [["check", "--no-cache"], ["format", "--check", "--no-cache"]],
    ids=["lint", "format"],
)
def test_ruff_is_content(arguments: list[str]):
    ruff = [sys.executable, "-m", "ruff", *arguments, "--quiet", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_statement_does_one_thing():
    """Several calls in a tuple, or a choice whose value nobody takes, are statements of their own."""
    found = []
    for path in itertools.chain(*map(ROOT.glob, WRITTEN)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Tuple, ast.IfExp)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_public_functions_have_types_and_docstrings():
    bare = []
    for file, tree in TREES.items():
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                bare.append(f"{file} {node.name}: no docstring")
            if isinstance(node, ast.FunctionDef):
                args = [*node.args.args, *node.args.kwonlyargs]
                if node.returns is None or any(a.annotation is None for a in args):
                    bare.append(f"{file} {node.name}: types missing")
    assert not bare


def test_every_module_says_what_it_is():
    assert not [name for name in MODULES.values() if not ast.get_docstring(TREES[name])]


def test_documents_name_every_room():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in sorted(ROOT_FILES) if name not in readme]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in sorted((ROOT / "finetuning").glob("*/__init__.py"))]
    assert rooms and set(rooms) == ROOMS.keys() - {"config", "root"}
    beside = [file.removeprefix("finetuning/") for file in FILES if room_of(file) == "config"]
    names = [*ROOT_FILES, *beside, *(f"{room}/" for room in rooms)]
    assert not [name for name in sorted(names) if name not in text and name != "__init__.py"]


def test_architecture_has_a_row_for_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = re.split(r"^\*\*`(\w+)/`\*\*", text.partition("\n## Rooms\n")[2], flags=re.MULTILINE)
    rows = dict(zip(parts[1::2], parts[2::2], strict=True))
    listed = {
        f"{room}/{name}"
        for room, part in rows.items()
        for row in re.findall(r"^\| (`[^|]+) \|", part, re.MULTILINE)
        for name in re.findall(r"`(\w+\.py)`", row)
    }
    there = {
        file.removeprefix("finetuning/")
        for file in MODULES.values()
        if room_of(file) not in ("root", "config")
    }
    assert listed == there


def test_nothing_of_this_machine_is_tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert "uv.lock" not in done.stdout.split()
