"""Command lines of the programs: their pages and their faults in the language of the reader."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator

import pytest

import ask
import compare_runs
import convergence
import dataset_stats
import export
import sweep
from finetuning.command_line import parse_command_line
from finetuning.common import language
from finetuning.common.arguments import help_text, parsed
from finetuning.common.errors import UserError
from tests.helpers.mixed_text import is_mixed

PROGRAMS = {
    "ask.py": ask.Ask,
    "compare_runs.py": compare_runs.main,
    "convergence.py": convergence.Options,
    "dataset_stats.py": dataset_stats.main,
    "export.py": export.Export,
    "sweep.py": sweep.Sweep,
}


@pytest.fixture(autouse=True)
def english_again() -> Iterator[None]:
    yield
    language.use("en")


def test_every_option_has_its_meaning_in_chinese():
    names = {program.removesuffix(".py"): kind for program, kind in PROGRAMS.items()}
    options = {
        f"{n}.{option}"
        for n, kind in names.items()
        for option in inspect.signature(kind).parameters
    }
    assert language.meanings("options_zh.tsv").keys() == names.keys() | options


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_page_is_in_the_language_of_the_reader(program: str, capsys: pytest.CaptureFixture):
    kind = PROGRAMS[program]
    for chosen in ("zh", "en"):
        with pytest.raises(SystemExit) as end:
            parsed(program, kind, ["--help", f"--language={chosen}"])
        page = capsys.readouterr().out
        assert end.value.code == 0 and "--language" in page and f"{program}" in page
        assert bool(language.CHINESE.search(page)) == (chosen == "zh")
    language.use("zh")
    page = help_text(program, kind)
    assert all(name in page.replace("-", "_") for name in inspect.signature(kind).parameters)
    assert not [line for line in page.splitlines() if is_mixed(line)]


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
    ("export.py", [], "missing: --output"),
    ("export.py", ["--output"], "Missing value for argument '--output'. Expected 1 values"),
    (
        "export.py",
        ["--output", "a", "--format", "x"],
        "invalid choice 'x' for argument '--format'.",
    ),
    ("ask.py", ["--compar"], "unknown option '--compar' (did you mean '--compare'?)"),
    ("ask.py", ["a", "b"], "unknown option 'b'"),
    ("ask.py", ["--seed", "x"], "Error parsing --seed: "),
    ("", ["--max-steps", "abc"], "Error parsing --max-steps: "),
    ("", ["--max-steps"], "Missing value for argument '--max-steps'."),
    ("", ["--precision", "fp17"], "invalid choice 'fp17' for argument '--precision'."),
]


@pytest.mark.parametrize(("program", "words", "told"), FAULTS)
def test_a_fault_is_one_line(program: str, words: list[str], told: str):
    parse: Callable = parse_command_line
    if program:
        parse = lambda words: parsed(program, PROGRAMS[program], words)  # noqa: E731
    with pytest.raises(UserError) as caught:
        parse(words)
    line = f"error: {caught.value}"
    assert line.startswith(f"error: command line: {told}") and "\n" not in line and "│" not in line
    language.use("zh")
    shown = language.translated(line)
    assert shown.startswith("错误：命令行：") and not is_mixed(shown)
    assert not language.is_prose(shown)
