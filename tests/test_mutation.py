"""The tool that plants bugs: what it plants, which tests it tries, and what it says of blind tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from finetuning.config import DirectTrainingConfig
from tests.mutation.bugs import bugs_of, bugs_of_list, defaults_of_settings
from tests.mutation.trial import stages_for

ROOT = Path(__file__).parents[1]


def planted(text: str, **settings: object) -> set[str]:
    return {bug.planted(text) for bug in bugs_of("some.py", text, settings)}


@pytest.mark.parametrize(
    "text, bug",
    [
        ("total += loss", "pass"),
        ("total += loss", "total = loss"),
        ("state.epoch = 0", "pass"),
        ("mean = total / count", "mean = (total)"),
        ("warm = step < warmup", "warm = (step <= warmup)"),
        ("if last or due:\n    log()", "if ((due)):\n    log()"),
        ("if last or due:\n    log()", "if last or due:\n    pass"),
        ("key = [text, template, seed]", "key = [text, seed]"),
        ("key = {'a': 1, 'b': 2}", "key = {'a': 1, }"),
        ("adamw(parameters, betas=betas, eps=eps)", "adamw(parameters, eps=eps)"),
        ("loss = all_ranks(own)", "loss = (own)"),
        ("good = [x for x in rows if finite(x)]", "good = [x for x in rows if True]"),
        ("rate = max(a, b)", "rate = min(a, b)"),
        ("clip(config.max_grad_norm)", "clip(1.0)"),
        ("温度 = '高' if 上限 > 85 else ''", "温度 = '高' if 上限 > 86 else ''"),
        ("for x in rows:\n    if x:\n        continue", "for x in rows:\n    if x:\n        pass"),
    ],
)
def test_a_kind_of_bug(text: str, bug: str) -> None:
    assert bug in planted(text, max_grad_norm=1.0)


def test_messages_annotations_and_assertions_get_none() -> None:
    text = 'def f(a: int | None = None):\n    assert a == 3, a + 1\n    raise ValueError(f"{a + 1} of 7")\n'
    assert planted(text) == set()


def test_every_bug_of_the_program_compiles_and_changes_its_line() -> None:
    settings = defaults_of_settings(DirectTrainingConfig)
    assert settings["adam_beta2"] == 0.999 and settings["lr_schedule"] == "cosine"
    path = "finetuning/training/optimizer.py"
    text = (ROOT / path).read_text(encoding="utf-8")
    bugs = bugs_of(path, text, settings)
    assert len({bug.kind for bug in bugs}) >= 12
    for bug in bugs:
        changed = bug.planted(text)
        ast.parse(changed)
        assert changed != text
        assert text.splitlines()[: bug.line - 1] == changed.splitlines()[: bug.line - 1]


def test_a_list_is_found_by_its_text() -> None:
    texts = {"finetuning/a.py": "x = 1\ny = 2\n", "finetuning/b.py": "y = 2\n"}
    entry = {"id": "A1", "file": "b.py", "old": "y = 2", "new": "y = 3", "breaks": "three"}
    (bug,) = bugs_of_list([entry], texts)
    assert (bug.path, bug.line, bug.planted(texts[bug.path])) == ("finetuning/b.py", 1, "y = 3\n")
    with pytest.raises(LookupError, match="A1: its text stands 0 times"):
        list(bugs_of_list([entry | {"old": "z"}], texts))


def test_the_nearest_tests_come_first_and_none_twice() -> None:
    tests = [
        "tests/data/test_split.py", "tests/runs/test_reference.py", "tests/training/test_engine.py",
        "tests/training/test_optimizer.py",
    ]  # fmt: skip
    stages = stages_for("finetuning/training/optimizer.py", tests, thorough=True)
    assert stages[0].files == ("tests/training/test_optimizer.py",)
    tried = [(file, stage.marked) for stage in stages for file in stage.files]
    assert len(tried) == len(set(tried)) == 2 * len(tests)


@pytest.mark.slow
def test_a_bug_is_seen_where_a_test_looks_and_only_there(tmp_path: Path) -> None:
    """A small repository with one function that is tested and one that is not."""
    for source in (ROOT / "tests/mutation").glob("*.py"):
        target = tmp_path / "tests/mutation" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    files = {
        "finetuning/__init__.py": "",
        "finetuning/data/__init__.py": "",
        "finetuning/data/mean.py": "def mean(total, count):\n    return total / count\n\n\n"
        "def double(value):\n    return value * 2\n",
        "tests/__init__.py": "",
        "tests/data/__init__.py": "",
        "tests/data/test_mean.py": "from finetuning.data.mean import double, mean\n\n\n"
        "def test_mean():\n    assert mean(6, 3) == 2\n\n\ndef test_double():\n    assert double(2)\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "bugs.json").write_text(
        '[{"id": "A", "file": "mean.py", "old": "total / count", "new": "total", "breaks": "no mean"},'
        ' {"id": "B", "file": "mean.py", "old": "value * 2", "new": "value", "breaks": "not doubled"}]'
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "tests.mutation", "--list", "bugs.json", "--jobs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    verdicts = [line.split()[0] for line in done.stdout.splitlines() if " s  finetuning/" in line]
    assert verdicts == ["killed", "SURVIVED"], done.stdout
    assert "FAILED tests/data/test_mean.py::test_mean" in done.stdout
    last = done.stdout.splitlines()[-1].split()
    assert last == ["all", "2", "1", "50%"]
    # What was planted is gone with the copy; the repository itself was never changed.
    assert (tmp_path / "finetuning/data/mean.py").read_text(encoding="utf-8") == files[
        "finetuning/data/mean.py"
    ]
