"""The quick form of the fault suite, whole: every row, kind of trial and mutant; and the suite itself.

uv run pytest -m "not long" tests/runs/test_faults.py
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [f"F{number:02}" for number in range(1, 32)]
SECONDS = 2400  # after which it hangs; ten minutes on two processors that others use, too
PROGRAM = ("finetuning", "direct_finetuning_with_existing_modules", "tb_logger")

slow = pytest.mark.slow
needs_fork = pytest.mark.skipif(os.name == "nt", reason="the fault suite forks; Windows can't")


# -----------------------------------------------------------------------------
# The program under faults


def run_suite(path: Path, *options: str) -> tuple[list[dict], subprocess.CompletedProcess]:
    """Run the suite in a process of its own; its rows' numbers, and how it ended."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *options, "--json", str(path)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "FAULTS_WORK"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    output = f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode in (0, 1) and path.is_file(), output[-5000:]
    return json.loads(path.read_text()), done


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, dict]:
    """Row -> its numbers."""
    rows, done = run_suite(tmp_path_factory.mktemp("faults") / "tallies.json", "--quick")
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["tried"] == sum(tally["tried"] for tally in rows)
    clean = not last["lost"] and not last["void"] and all(all(t["mutants"].values()) for t in rows)
    assert (done.returncode == 0) == clean
    return {tally["row"]: tally for tally in rows}


@slow
@needs_fork
@pytest.mark.timeout(SECONDS + 60)
def test_every_row_is_in_the_quick_form(quick: dict[str, dict]):
    assert sorted(quick) == ROWS


@slow
@needs_fork
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("row", ROWS)
def test_nothing_is_lost_and_every_mutant_is_caught(quick: dict[str, dict], row: str):
    tally = quick[row]
    if tally["skipped"] and not tally["tried"]:
        pytest.skip("; ".join(tally["skipped"]))
    assert (tally["lost"], tally["void"]) == (0, 0), "\n".join(tally["faults"])
    assert tally["survived"] == tally["tried"] > 0
    assert tally["mutants"] and all(tally["mutants"].values()), tally["mutants"]


# -----------------------------------------------------------------------------
# The suite itself


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Of the suite; `injected_faults.py` is the alerts' benchmark, whose faults are slowness."""
    for path in sorted((ROOT / "benchmarks" / "faults").glob("*.py")):
        if path.name == "injected_faults.py":
            continue
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))


def names_of_the_program(tree: ast.Module) -> set[str]:
    """Names that are modules, classes or functions of the program, or modules of others."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return names


def owner(node: ast.expr) -> str:
    """`engine` of `engine.TrainingEngine.forward_backward`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_is_replaced_without_a_look_whether_it_is_there():
    """An assignment to a name that is gone would do nothing, and the trial would test nothing."""
    found = [
        f"{name}:{node.lineno} {ast.unparse(target)}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
        and owner(target) in names_of_the_program(tree) - {"sys"}
    ]
    assert found == []


def test_what_is_replaced_is_there():
    """The suite finds out by itself, after minutes."""
    gone = []
    for name, tree in trees():
        module = importlib.import_module(f"benchmarks.faults.{name.removesuffix('.py')}")
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "replaced"):
                continue
            place, attribute = node.args[:2]
            known = place.id if isinstance(place, ast.Name) else owner(place)
            if known in vars(module) and isinstance(attribute, ast.Constant):
                found = eval(ast.unparse(place), vars(module))
                if not hasattr(found, attribute.value):
                    gone.append(f"{name}:{node.lineno} {ast.unparse(place)}.{attribute.value}")
    assert gone == []


def test_no_private_name_of_the_program_is_used():
    found = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and owner(node) in names_of_the_program(tree) - {"os"}
    ]
    assert found == []


def test_no_trial_says_that_its_fault_came_without_having_looked():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Return)
        and isinstance(node.value, ast.Tuple)
        and isinstance(node.value.elts[0], ast.Constant)
        and node.value.elts[0].value is True
    ]
    assert found == []


def test_nothing_waits_for_seconds():
    """The one pause is that between two looks at what is waited for."""
    found = [
        f"{name} {function.name}"
        for name, tree in trees()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep"
    ]
    assert found == ["rig.py wait_until"]


def test_the_page_sums_up_its_own_rows():
    """Rows of a later day are put in by hand."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (F\d\d) \|[^|]*" + r"\| (\d+) " * 4 + r"\|", page, re.MULTILINE)
    assert [name for name, *_ in rows] == ROWS
    tried, survived, lost, void = (
        sum(map(int, column)) for column in list(zip(*rows, strict=True))[1:]
    )
    said = f"**{tried} trials: {survived} survived, {lost} lost, {void} void.**"
    assert said in page and survived == tried - lost - void


@slow
@needs_fork
def test_every_row_has_a_mutant_and_a_number_of_quick_trials():
    from benchmarks.faults.__main__ import all_rows

    rows = {row.id: row for row in all_rows()}
    assert sorted(rows) == ROWS
    assert [row.id for row in rows.values() if not row.mutants or row.quick < 1] == []


def program(wanted: int, *, factor: int = 1) -> int:
    return wanted * factor


@slow
@needs_fork
def test_a_mutant_that_could_not_be_called_ends_the_suite(monkeypatch):
    """It would break the program in a way of its own, and count as caught."""
    from benchmarks.faults.rig import replaced
    from benchmarks.faults.tally import SuiteError

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "program", program)  # undone at the end
    replaced(module, "program", lambda first, *, factor=1: 0)  # the first one may be called self
    for wrong in (lambda: 0, lambda wanted: 0, lambda wanted, other, *, factor=1: 0):
        with pytest.raises(SuiteError, match="is replaced by one that takes"):
            replaced(module, "program", wrong)
    with pytest.raises(SuiteError, match="has no gone"):
        replaced(module, "gone", None)


@slow
@needs_fork
def test_an_error_of_the_suite_itself_ends_it_and_is_no_loss():
    """A name that the program no longer has would else count as a fault that the program did not survive."""
    from benchmarks.faults.checkpoints import resealed
    from benchmarks.faults.rig import replaced
    from benchmarks.faults.tally import SuiteError, Tally

    tally = Tally("F00")
    tally.attempt("the program's own", lambda: json.loads(3))
    assert (tally.tried, tally.lost) == (1, 1)
    for name, trial in (
        ("a name that is gone", lambda: replaced(json, "gone", None)),
        ("a wrong call", lambda: resealed(None)),
    ):
        with pytest.raises(SuiteError, match=name):
            tally.attempt(name, trial)
    assert tally.tried == 1


@slow
@needs_fork
def test_an_error_of_the_suite_in_a_child_ends_it(tmp_path: Path):
    from benchmarks.faults.rig import fork, replaced
    from benchmarks.faults.tally import SuiteError

    with pytest.raises(SuiteError, match=r"json.* has no gone"):
        fork(tmp_path / "log", lambda: replaced(json, "gone", None)).wait()
    assert fork(tmp_path / "log", lambda: json.loads(3)).wait().code == 70


@slow
@needs_fork
def test_a_fault_that_did_not_come_is_void_and_the_suite_not_clean():
    from benchmarks.faults.report import is_clean
    from benchmarks.faults.tally import Tally

    tally = Tally("F00", mutants={"a mutant": "a trial: what caught it"})
    tally.attempt("a fault", lambda: (bool(tally), []))
    assert (tally.survived, tally.void) == (1, 0) and is_clean(tally)
    tally.attempt("a fault that did not come", lambda: (not tally, []))
    assert (tally.survived, tally.void) == (1, 1) and not is_clean(tally)
    assert not is_clean(Tally("F00", mutants={"a mutant": ""}))


@slow
@needs_fork
def test_a_stopped_child_is_waited_for_and_goes_on(tmp_path: Path):
    import signal

    from benchmarks.faults.rig import fork

    child = fork(tmp_path / "log", lambda: os.kill(os.getpid(), signal.SIGSTOP))
    assert child.stopped() and child.running()
    assert child.kill(signal.SIGCONT) and child.wait().code == 0
    assert not child.stopped()
