"""Command lines of the programs: their pages and their faults in the language of the reader."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ask
import compare_runs
import convergence
import dataset_stats
import export
import sweep
from finetuning.command_line import CommandLine, parse_command_line
from finetuning.common import arguments, language
from finetuning.common.arguments import parsed
from finetuning.common.chinese_help import help_text
from finetuning.common.errors import UserError
from finetuning.config import DirectTrainingConfig
from finetuning.runs import report
from tests.helpers.mixed_text import is_mixed

MAIN = "direct_finetuning_with_existing_modules.py"
PROGRAMS = {
    "ask.py": ask.Ask,
    "compare_runs.py": compare_runs.main,
    "convergence.py": convergence.Options,
    "dataset_stats.py": dataset_stats.main,
    "export.py": export.Export,
    "sweep.py": sweep.Sweep,
    f"python -m {report.REPORT}": report.main,
    MAIN: CommandLine,
}


@pytest.fixture(autouse=True)
def english_again() -> Iterator[None]:
    yield
    language.use("en")


def read(program: str, words: list[str]) -> Any:
    """As the program reads its command line."""
    return (
        parse_command_line(words) if program == MAIN else parsed(program, PROGRAMS[program], words)
    )


def names_of(kind: Callable) -> list[str]:
    """Of all options; those of settings stand for themselves."""
    settings = [field.name for field in dataclasses.fields(DirectTrainingConfig)]
    names = list(inspect.signature(kind).parameters)
    return [*names, *settings] if "training" in names else names


def test_every_option_has_its_meaning_in_chinese():
    names = {program.split(" ")[-1].removesuffix(".py"): kind for program, kind in PROGRAMS.items()}
    options = {
        f"{n}.{option}"
        for n, kind in names.items()
        if kind is not CommandLine  # whose options are among the settings
        for option in inspect.signature(kind).parameters
    }
    assert language.meanings("options_zh.tsv").keys() == names.keys() | options


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_page_is_in_the_language_of_the_reader(program: str, capsys: pytest.CaptureFixture):
    for chosen in ("zh", "en"):
        with pytest.raises(SystemExit) as end:
            read(program, ["--help", f"--language={chosen}"])
        page = capsys.readouterr().out
        assert end.value.code == 0 and "--language" in page and program in page
        assert ("用法：" in page) == (chosen == "zh")
    language.use("zh")
    page = help_text(program, PROGRAMS[program])
    names = set(names_of(PROGRAMS[program])) - {"training"}
    assert not [name for name in names if name not in page.replace("-", "_")]
    assert not [line for line in page.splitlines() if is_mixed(line)]
    meanings = [line for line in page.splitlines() if line.startswith("      ")]
    assert meanings and all(language.CHINESE.search(line) for line in meanings)


@pytest.mark.parametrize("program", PROGRAMS)
def test_completions_of_a_shell_are_printed(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    option = names_of(PROGRAMS[program])[-1].replace("_", "-")
    for shell in arguments.SHELLS:
        with pytest.raises(SystemExit) as end:
            read(program, ["--language", "zh", "--tyro-print-completion", shell])
        assert not end.value.code and option in capsys.readouterr().out
    script = tmp_path / "script"
    with pytest.raises(SystemExit) as end:
        read(program, ["--tyro-write-completion", "bash", str(script)])
    assert not end.value.code and option in script.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=f"^--tyro-write-completion {tmp_path}: can't be written"):
        read(program, ["--tyro-write-completion", "bash", str(tmp_path)])


def test_words_become_options_or_a_call():
    options = parsed("ask.py", ask.Ask, ["--language", "zh", "问题", "--max-new-tokens", "5"])
    assert options == ask.Ask(question="问题", max_new_tokens=5) and language.current() == "zh"
    call = parsed("dataset_stats.py", dataset_stats.main, ["a", "b", "--workers", "2"])
    assert call.args == (("a", "b"),) and call.keywords["workers"] == 2
    assert dataclasses.asdict(parsed("sweep.py", sweep.Sweep, []))["seeds"] == (42,)


def test_the_locale_is_followed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    parsed("sweep.py", sweep.Sweep, [])
    assert language.current() == "zh"


FAULTS = [
    ("export.py", ["--language", "de"], "--language is 'de', must be 'auto', 'zh' or 'en'"),
    (MAIN, ["--language"], "--language is '', must be 'auto', 'zh' or 'en'"),
    (f"python -m {report.REPORT}", ["a", "b"], "unknown option 'b'"),
    (
        "sweep.py",
        ["--tyro-print-completion", "cmd"],
        "--tyro-print-completion is 'cmd', must be 'bash' or 'zsh' or 'fish'",
    ),
    ("export.py", [], "missing: --output"),
    ("export.py", ["--output"], "Missing value for argument '--output'. Expected 1 values"),
    (
        "export.py",
        ["--output", "a", "--format", "x"],
        "invalid choice 'x' for argument '--format'.",
    ),
    ("ask.py", ["--compar"], "unknown option '--compar' (did you mean '--compare'?)"),
    ("ask.py", ["a", "b"], "unknown option 'b'"),
    ("ask.py", ["--seed", "x"], "--seed is 'x', must be a whole number; --help"),
    ("ask.py", ["--seed", "x", "q"], "--seed is 'x', must be a whole number; --help"),
    ("ask.py", ["--temperature=x"], "--temperature is 'x', must be a number; --help"),
    (MAIN, ["--learning_rate", "x"], "--learning-rate is 'x', must be a number or 'auto'; --help"),
    (MAIN, ["--data-weights", "1", "a"], "--data-weights is '1 a', must be a number, or several;"),
    (MAIN, ["--columns", "a"], "--columns is 'a', must be pairs of a text and a text; --help"),
    (MAIN, ["--max-steps", "abc"], "--max-steps is 'abc', must be a whole number; --help"),
    (MAIN, ["--max-steps"], "Missing value for argument '--max-steps'."),
    (MAIN, ["--precision", "fp17"], "invalid choice 'fp17' for argument '--precision'."),
]


@pytest.mark.parametrize(("program", "words", "told"), FAULTS)
def test_a_fault_is_one_line(program: str, words: list[str], told: str):
    with pytest.raises(UserError) as caught:
        read(program, words)
    line = f"error: {caught.value}"
    assert line.startswith(f"error: command line: {told}") and "\n" not in line and "│" not in line
    language.use("zh")
    shown = language.translated(line)
    assert shown.startswith("错误：命令行：") and not is_mixed(shown)
    assert not language.is_prose(shown)
