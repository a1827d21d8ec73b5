"""Which files a path, a folder or a pattern means, and which paths are refused."""

import os
from pathlib import Path

import pytest

from finetuning.common.errors import UserError
from finetuning.readers.dataset import read_samples
from tests.helpers.read_text import JSONL, PLAIN, read


def test_folder_glob_and_repetition(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "sub" / "a.jsonl").write_text(JSONL, encoding="utf-8")
    (tmp_path / "README.md").write_text("# about this folder", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not data", encoding="utf-8")
    (tmp_path / ".hidden.md").write_text("x", encoding="utf-8")
    found = read_samples([str(tmp_path), str(tmp_path / "*.md"), str(tmp_path / "b.md")])
    folder = tmp_path.as_posix()
    assert found.samples_per_file == {f"{folder}/b.md": 1, f"{folder}/sub/a.jsonl": 7}
    assert {Path(r.source).name: r.text for r in found.skipped} == {
        "README.md": "skipped: it describes the folder",
        "notes.txt": "skipped: no question was found in it",
    }
    assert set(found.skipped) <= set(found.remarks)


def test_many_skipped_files_of_a_kind_are_told_as_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(JSONL, encoding="utf-8")
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    (tmp_path / "b.pdf").write_bytes(b"x")
    told = {Path(r.source).name: r.text for r in read_samples([str(tmp_path)]).skipped}
    assert told.pop("b.pdf").startswith("skipped: this kind is not read; copy its")
    assert told == {tmp_path.name: "skipped: 30 .png files, a kind that is not read"}


def test_lock_files_of_office_are_no_data(tmp_path):
    (tmp_path / "a.md").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "~$a.md").write_bytes(b"\x00\x01lock")
    for path in (tmp_path, tmp_path / "*.md"):
        assert [*read_samples([str(path)]).samples_per_file] == [f"{tmp_path.as_posix()}/a.md"]


def test_paths_that_give_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path, reason in [
        ("missing.md", "there is no missing.md"),
        ("data/missing", "there is no data/missing"),
        ("dat/raw", "no folder dat in .*hf://datasets/owner/name is a dataset of the hub"),
        ("data/my_qa.jsonl", "there is no data/my_qa.jsonl in"),
        ("dtaa", "is data meant"),
        ("hf://datasets/x", "a dataset of the hub is hf://datasets/owner/name"),
        ("data", "holds no"),
        ("*.md", "no data file matches"),
        ("a\0b", "is no path"),
        ("", "is no path"),
        ("x" * 5000, "can't look at"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_samples([path])
    with pytest.raises(UserError, match="no data path given"):
        read_samples([])
    for name, content, reason in [
        ("a.md", "", "is empty"),
        ("b.md", "只有文字\n", "holds no sample"),
        ("c.jsonl", "\n\n", "holds no sample"),
        ("d.json", "[]", "holds no sample"),
        ("e.csv", "question,answer\n", "holds no sample"),
        ("f.pdf", "x", "copy its questions .* readable are .md"),
        ("f.xls", "x", "save it as .xlsx; readable are .md"),
        ("f.txt", "x", "holds no sample; a question looks like"),
        (
            "g.jsonl",
            "{}\n{}\n",
            "no sample can be read, 2 broken; the first: .*g.jsonl:1: an empty record",
        ),
    ]:
        with pytest.raises(UserError, match=reason):
            read(tmp_path, name, content)


def test_a_file_in_a_folder_that_holds_nothing_is_skipped_and_told(tmp_path):
    """Empty, blank, without a record; one that was named itself is refused (above)."""
    (tmp_path / "a.md").write_text(PLAIN, encoding="utf-8")
    nothing = {"b.jsonl": "", "c.csv": "", "d.md": "", "e.jsonl": "\n\n", "f.json": "[]"}
    nothing |= {"i.json": '{"data": []}', "j.json": '{"version": 2, "data": [], "name": "qa"}'}
    nothing |= {"g.csv": "question,answer\n", "h.xlsx": ""}
    for name, content in nothing.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    in_folder = read_samples([str(tmp_path)])
    told = {os.path.basename(r.source): r.text for r in in_folder.skipped}
    for name, content in nothing.items():
        assert told[name] == f"skipped: {'no record is in it' if content else 'it is empty'}"
    matched = read_samples([str(tmp_path / "[abcdh].*")])
    assert sorted(os.path.basename(r.source) for r in matched.skipped) == [
        name for name, content in nothing.items() if not content
    ]
    assert len(in_folder.samples) == len(matched.samples) == 1
    for name in nothing:
        with pytest.raises(UserError):
            read_samples([str(tmp_path / name)])
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "a.jsonl").write_text("")
    for empty in (folder, folder / "*", folder / "*.jsonl"):
        with pytest.raises(UserError, match=r"(holds no|no data file matches) .*; empty files: 1"):
            read_samples([str(empty)])
    (folder / "b.pdf").write_text("x")
    with pytest.raises(UserError, match=r"matches .*; 1 files of other kinds .*; empty files: 1"):
        read_samples([str(folder / "*")])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX special files")
def test_hostile_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.md")
    os.symlink("/dev/zero", tmp_path / "zero.md")
    os.symlink(tmp_path / "loop.md", tmp_path / "loop.md")
    for name in ("pipe.md", "zero.md"):
        with pytest.raises(UserError, match="no regular file"):
            read_samples([str(tmp_path / name)])
    with pytest.raises(UserError, match="can't look at"):
        read_samples([str(tmp_path / "loop.md")])
    with pytest.raises(UserError):
        read_samples([str(tmp_path)])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.md").write_text(PLAIN, encoding="utf-8")
    os.symlink(folder, folder / "self")
    assert len(read_samples([str(folder)]).samples) == 1
