"""Paths with ~, caches without a home, and names that a locale breaks.

uv run pytest tests/common/test_paths.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetuning.common import paths
from finetuning.common.errors import UserError
from finetuning.config import DirectTrainingConfig

ROOT = Path(paths.__file__).parents[2]


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user that the system does not know: then `expanduser` gives back what it got."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(paths.os.path, "expanduser", lambda path: path)


@pytest.mark.parametrize("name", ["output_dir", "cache_dir", "init_adapter", "model_name"])
def test_the_tilde_of_every_path_setting_is_the_home_directory(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DirectTrainingConfig(**{name: "~/a b"})
    assert getattr(config, name) == str(tmp_path / "a b")
    without_home(monkeypatch)
    with pytest.raises(UserError, match=f"{name} ~/a b: no home directory is known"):
        DirectTrainingConfig(**{name: "~/a b"})


def test_the_cache_goes_below_the_output_without_a_home_that_can_be_written(tmp_path, monkeypatch):
    name = "qwen3_thinking_finetuning"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DirectTrainingConfig().cache_path == tmp_path / ".cache" / name
    below_output = Path("here") / "cache"
    real = os.access
    monkeypatch.setattr(
        paths.os, "access", lambda path, mode: path != tmp_path and real(path, mode)
    )
    assert DirectTrainingConfig(output_dir="here").cache_path == below_output
    without_home(monkeypatch)
    assert DirectTrainingConfig(output_dir="here").cache_path == below_output
    assert DirectTrainingConfig(cache_dir="there").cache_path == Path("there")


def test_the_bundled_data_are_found_from_any_folder(tmp_path, monkeypatch):
    root = Path(paths.__file__).parents[2]
    monkeypatch.chdir(root)
    assert DirectTrainingConfig().data_path == ("data/raw",)
    monkeypatch.chdir(tmp_path)
    assert DirectTrainingConfig().data_path == (str(root / "data" / "raw"),)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    assert DirectTrainingConfig().data_path == (str(root / "data" / "raw"),), "not another's"


def test_a_name_that_the_locale_writes_otherwise_is_refused(monkeypatch):
    paths.check_name("/tmp/输出", "output_dir")
    for only_text in (False, True):
        with pytest.raises(UserError, match="UTF-8"):
            name = os.fsdecode("/tmp/输出".encode("gbk"))
            paths.check_name(name, "output_dir", only_text=only_text)
    monkeypatch.setattr(paths.os, "fsencode", lambda text: text.encode("gbk"))
    paths.check_name("/tmp/out", "output_dir")
    with pytest.raises(UserError, match=r"output_dir .*LC_ALL=C\.UTF-8"):
        paths.check_name("/tmp/输出", "output_dir")
    paths.check_name("/tmp/输出", "output_dir", only_text=True)


def test_a_name_that_the_locale_can_not_write_is_refused_with_what_to_do(tmp_path):
    """Only a file of settings can hold one; a command line is bytes, which any locale gives back."""
    settings = tmp_path / "run.toml"
    for line in (
        'data_path = ["~/数据/*.jsonl"]',
        'output_dir = "~/输出"',
        'general_path = ["通用"]',
    ):
        settings.write_text(f"{line}\n", encoding="utf-8")
        locale = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        script = (
            "import sys\nfrom finetuning.command_line import parse_command_line\n"
            "from finetuning.common.errors import exit_code\n"
            "from finetuning.readers.files import list_files\n"
            "def read():\n    found = parse_command_line(['--config', sys.argv[1]]).training\n"
            "    [list_files(path) for path in (*found.general_path, *found.data_path)]\n"
            "sys.exit(exit_code(read))"
        )
        command = [sys.executable, "-c", script, str(settings)]
        options = {"capture_output": True, "text": True, "cwd": ROOT}
        done = subprocess.run(command, env=os.environ | locale, **options)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "\\u" in done.stderr and "PYTHONUTF8=1 or LC_ALL=C.UTF-8" in done.stderr


def test_a_library_writes_beside_and_the_files_come_to_their_place(tmp_path, monkeypatch):
    with paths.utf8_twin(tmp_path) as place:
        assert place == tmp_path
    monkeypatch.setattr(paths, "is_utf8", lambda path: False)
    with paths.utf8_twin(tmp_path) as place:
        (place / "tokenizer.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"] and not place.exists()


def test_no_home_ends_in_an_exception():
    """A user of a container may have none: pathlib raises then, os.path leaves the ~ as it is."""
    programs = [*ROOT.glob("*.py"), *ROOT.glob("finetuning/**/*.py")]
    raising = re.compile(r"\)\.expanduser\(\)|\bPath\.home\(\)")
    assert len(programs) > 100
    assert not [str(p) for p in programs if raising.search(p.read_text(encoding="utf-8"))]


def test_a_place_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for file, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / ("a" * 300), "File name too long"),
        (Path(tmp_path.anchor), "Is a directory"),
    ):
        with pytest.raises(UserError, match=reason):
            paths.check_place(file, "--html")
    paths.check_place(tmp_path / "new" / "file", "--html")
