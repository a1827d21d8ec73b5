"""Input made to explode: it is refused in one line, in seconds, and in far less than a gigabyte.

Each attack is read by a process of its own, which says how long it took and how large it grew.
"""

import errno
import gzip
import json
import os
import re
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from finetuning.common.bounds import (
    BROKEN,
    COLUMNS,
    LINES,
    NAME,
    NAMES,
    OPEN_FILES,
    PARAGRAPHS,
    RECORD,
    TAGS,
    TEXT,
    UNPACKED,
)  # fmt: skip
from finetuning.common.errors import UserError
from finetuning.readers import arrow_samples, dataset, names, office, opening
from finetuning.readers.dataset import read_samples
from finetuning.readers.names import layout, meaning
from tests.helpers.generated_records import outcome
from tests.helpers.read_text import GOOD
from tests.helpers.reading_cases import write_file

ROOT = Path(__file__).parents[2]
MOST_SECONDS, MOST_MIB = 20, 800  # CPU; of the whole process
READ = """
import pathlib, resource, sys, time
from finetuning.common.errors import UserError
from finetuning.readers.dataset import read_samples
start = time.process_time()
try:
    found = read_samples(sys.argv[1:], cache_dir=pathlib.Path(sys.argv[1]).parent / "cache")
    said = f"{len(found.samples)} samples, {len(found.broken)} broken"
except UserError as error:
    said = str(error)
status = pathlib.Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
print(time.process_time() - start, peak, said)
"""


def attacked(path: Path, *, seconds: float = MOST_SECONDS, files: int = 0) -> str:
    """What reading a file comes to, within the limits."""

    def limited() -> None:
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8", preexec_fn=limited, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    spent, peak, said = done.stdout.split(" ", 2)
    assert float(spent) < seconds, f"{spent} s: {said}"
    assert int(peak) < MOST_MIB, f"{peak} MiB: {said}"
    return said.strip()


def gz(path: Path, unit: bytes, mib: int = 160, head: bytes = b"") -> Path:
    with gzip.open(path, "wb", 6) as file:
        file.write(head)
        block = unit * (2**20 // len(unit))
        for _ in range(mib):
            file.write(block)
    return path


def parquet(path: Path, rows: int = 20_000, value: str = "A" * 2**20) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    answers = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    table = pa.table({"question": pa.array([f"问{i}" for i in range(rows)]), "answer": answers})
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)
    return path


def deflated(path: Path, part: str, unit: bytes, mib: int, rest: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in rest.items():
            archive.writestr(name, content)
        with archive.open(part, "w", force_zip64=True) as file:
            head, unit, tail = unit.split(b"|")
            file.write(head)
            for _ in range(mib):
                file.write(unit * (2**20 // len(unit)))
            file.write(tail)
    return path


def parts_of(path: Path, without: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name != without}


RECORD_LINE = '{"question": "问", "answer": "答"}\n'.encode()


BOMBS = {
    name: (unit, head)
    for name, unit, head in (
        ("a.csv.gz", b",", b"question,answer\n"),
        ("b.csv.gz", b'""', b'question,answer\n"'),
        ("c.csv.gz", b"q,a\n", b"question,answer\n"),
        ("a.jsonl.gz", b"\0 ", b"\xff\xfe"),
        ("b.jsonl.gz", b"x", b""),
        ("c.jsonl.gz", b"{\n", b""),
        ("d.jsonl.gz", RECORD_LINE, b""),
        ("a.json.gz", b"[", b""),
        ("b.json.gz", b" ", b"["),
        ("a.md.gz", b"# a\n", b""),
        ("b.txt.gz", b"\n", b""),
        ("c.txt.gz", "密".encode("gb18030"), b""),
        ("d.md.gz", b"### Q1: a\nA1: b\n", b""),
        ("e.txt.gz", "问：甲\n答：乙\n".encode(), b""),
    )
}
IN_CI = ("b.csv.gz", "c.jsonl.gz", "e.txt.gz")  # all of them would take two minutes


def by_time(names: Iterable[str]) -> list:
    marks = {True: pytest.mark.slow, False: pytest.mark.long}
    return [pytest.param(name, marks=marks[name in IN_CI]) for name in names]


@pytest.mark.parametrize("name", by_time(BOMBS))
def test_a_bomb_is_refused(tmp_path, name):
    unit, head = BOMBS[name]
    path = gz(tmp_path / name, unit, head=head)
    assert path.stat().st_size < 6 * 2**20
    assert f"{name} unpacks to more than 128 MiB, over 100 times its size" in attacked(path)


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_bomb_is_refused_by_a_small_limit(tmp_path, monkeypatch, name):
    monkeypatch.setattr(opening, "UNPACKED", replace(UNPACKED, limit=2**20))
    unit, head = BOMBS[name]
    path = gz(tmp_path / name, unit, mib=2, head=head)
    with pytest.raises(UserError, match=f"{name} unpacks to more than 1 MiB, over 100 times"):
        read_samples([str(path)])


@pytest.mark.slow
def test_a_zst_bomb_is_refused(tmp_path):
    writer = zstandard.ZstdCompressor(level=3)
    with open(tmp_path / "a.jsonl.zst", "wb") as file, writer.stream_writer(file) as out:
        for _ in range(160):
            out.write(RECORD_LINE * (2**20 // len(RECORD_LINE)))
    assert "unpacks to more than 128 MiB" in attacked(tmp_path / "a.jsonl.zst", seconds=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "value"),
    [(20_000, "A" * 2**20), (2000, "B" * 50 * 2**20), (100, "长" * 2**19)],
)
def test_a_dictionary_of_parquet_is_no_bomb(tmp_path, rows, value):
    path = parquet(tmp_path / "a.parquet", rows, value)
    assert path.stat().st_size < 2**20
    assert "unpacks to more than" in attacked(path)


OFFICE = {
    name: (part, unit)
    for name, part, unit in (
        ("a.xlsx", "xl/worksheets/sheet1.xml",
         b"<worksheet><sheetData>|<row><c/></row>|</sheetData></worksheet>"),
        ("b.xlsx", "xl/sharedStrings.xml", b"<sst>|<si><t>a</t></si>|</sst>"),
        ("a.docx", "word/document.xml",
         b'<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>|<w:p/>|'
         b"</w:body></w:document>"),
    )
}  # fmt: skip


def office_bomb(path: Path, mib: int) -> Path:
    part, unit = OFFICE[path.name]
    good = path.with_name(f"good{path.suffix}")
    if path.suffix == ".xlsx":
        write_file(good, {"sheets": {"问答": [["问题", "答案"], ["问", "答"]]}})
    else:
        write_file(good, {"paragraphs": ["问：甲"]})
    return deflated(path, part, unit, mib, parts_of(good, part))


@pytest.mark.parametrize(
    ("name", "mib", "said"),
    [
        pytest.param("a.xlsx", 30, "holds no sample; no record in it", marks=pytest.mark.long),
        pytest.param(
            "a.xlsx", 300, "unpacks to 300 MiB, more than 128 MiB", marks=pytest.mark.long
        ),
        pytest.param("b.xlsx", 30, "1 samples, 0 broken", marks=pytest.mark.slow),
        pytest.param(
            "b.xlsx", 300, "unpacks to 300 MiB, more than 128 MiB", marks=pytest.mark.slow
        ),
        pytest.param("a.docx", 30, " holds 5,267,2.. tags and 5,242,840 p", marks=pytest.mark.slow),
        pytest.param(
            "a.docx", 300, "unpacks to 300 MiB, more than 128 MiB", marks=pytest.mark.long
        ),
    ],
)
def test_an_office_file_is_no_bomb(tmp_path, name, mib, said):
    """b.xlsx names its texts in thirty MiB that none of its two rows asks for."""
    assert re.search(said, attacked(office_bomb(tmp_path / name, mib)))


@pytest.mark.parametrize(("name", "bound"), [("TAGS", TAGS), ("PARAGRAPHS", PARAGRAPHS)])
def test_tags_and_paragraphs_are_bounded(tmp_path, monkeypatch, name, bound):
    write_file(tmp_path / "a.docx", {"paragraphs": ["问：甲", "答：乙", "。"]})
    assert len(read_samples([str(tmp_path / "a.docx")]).samples) == 1
    monkeypatch.setattr(office, name, replace(bound, limit=2))
    with pytest.raises(
        UserError, match=rf"a.docx holds [\d,]+ tags and 3 paragraphs.* 2 {bound.unit}"
    ):
        read_samples([str(tmp_path / "a.docx")])


# ---- bounds of what is not packed ------------------------------------------------------------------


def test_columns_are_bounded(tmp_path):
    count = 20_000
    header = ",".join(["question", "answer", *(f"c{i}" for i in range(count))])
    (tmp_path / "a.csv").write_text(f"{header}\n问,答{',1' * count}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a.csv:1: 20,002 columns, more than 4,096 columns"):
        read_samples([str(tmp_path / "a.csv")])
    record = json.dumps(
        {"question": "问", "answer": "答", **{f"c{i}": 1 for i in range(COLUMNS.limit)}}
    )
    (tmp_path / "b.jsonl").write_text(f"{record}\n{GOOD}\n", encoding="utf-8")
    found = read_samples([str(tmp_path / "b.jsonl")])
    assert len(found.samples) == 1 and "4,098 columns" in found.broken[0].reason


def test_names_are_bounded():
    """What is found out about names is kept for few of them, and of each a beginning is understood."""
    before = names._kept_layout.cache_info().currsize
    long = tuple(f"{i}{'x' * NAMES.limit}" for i in range(3))
    assert layout(long).columns == {} and names._kept_layout.cache_info().currsize == before
    assert meaning("x" * 10**7 + " answer") == meaning("x" * NAME.limit)


def test_texts_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "TEXT", replace(TEXT, limit=1000))
    monkeypatch.setattr(opening, "LINES", replace(LINES, limit=50))
    for name, text, told in (
        ("a.txt", "问：甲\n答：" + "乙" * 1000, "more than 1,000 characters of text"),
        ("b.md", "\n" * 60, "60 lines, more than 50 lines"),
        ("c.txt", "问：甲\n答：乙\n" + "\n" * 40, ""),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        if told:
            with pytest.raises(UserError, match=f"{name} holds {told}"):
                read_samples([str(tmp_path / name)])
        else:
            assert len(read_samples([str(tmp_path / name)]).samples) == 1


def test_broken_records_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BROKEN", replace(BROKEN, limit=20))
    (tmp_path / "a.jsonl").write_text("{\n" * 30 + GOOD, encoding="utf-8")
    with pytest.raises(UserError, match=r"a.jsonl:1: more than 20 records from here on are broken"):
        read_samples([str(tmp_path / "a.jsonl")])


def test_a_line_of_csv_is_bounded(tmp_path):
    (tmp_path / "a.csv").write_text(
        f"question,answer\n问,{'答' * (RECORD.limit + 1)}\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"a.csv:2: a line longer than 16 MiB"):
        read_samples([str(tmp_path / "a.csv")])


@pytest.mark.parametrize("keys", [2000, 200_000])
def test_a_record_with_a_key_twice_is_told_in_linear_time(tmp_path, keys):
    record = ", ".join(f'"k{i}": 1' for i in (*range(keys), keys - 1))
    (tmp_path / "a.jsonl").write_text(f"{{{record}}}\n{GOOD}\n", encoding="utf-8")
    start = time.process_time()
    found = read_samples([str(tmp_path / "a.jsonl")])
    assert f"duplicate key 'k{keys - 1}'" in found.broken[0].reason
    assert time.process_time() - start < 3


RUNS = ["A" + " " * 40_000, "问题" + " " * 40_000 + "x", "密" * 40_000, "# " * 20_000]


@pytest.mark.parametrize("text", RUNS, ids=range(len(RUNS)))
@pytest.mark.parametrize("suffix", ["md", "txt", "csv", "jsonl"])
def test_long_runs_take_linear_time(tmp_path, text, suffix):
    if suffix == "jsonl":
        content = json.dumps({"question": "问" + text, "thinking": text, "answer": text + "答"})
    elif suffix == "csv":
        content = f"question,answer\n问{text},{text}答\n"
    else:
        content = (
            f"### Q1: 问{text}\n{text}\nA1: {text}答\n"
            if suffix == "md"
            else f"问：{text}甲\n{text}\n答：{text}乙"
        )
    (tmp_path / f"a.{suffix}").write_text(content, encoding="utf-8")
    start = time.process_time()
    outcome(tmp_path / f"a.{suffix}")
    assert time.process_time() - start < 1


def test_thousands_of_labelled_questions_take_linear_time(tmp_path):
    spent = []
    for count in (2000, 8000):
        text = "".join(f"{i}、问：第{i}个？\n解析：想。\n答：第{i}个。\n\n" for i in range(count))
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        times = []
        for _ in range(3):  # the least of them: others use the machine, too
            start = time.process_time()
            assert len(read_samples([str(tmp_path / "a.txt")]).samples) == count
            times.append(time.process_time() - start)
        spent.append(min(times))
    assert spent[1] < 8 * spent[0], spent


# ---- one broken sample, not the end -----------------------------------------------------------------


def test_wrong_types_of_a_field_break_one_record(tmp_path):
    values = [5, True, 1.5, "x", {"a": 1}, [1], [[1]], [["问"]], [["问", 5]], [{"role": 1}]]
    roles = (
        "history",
        "messages",
        "tools",
        "system",
        "thinking",
        "options",
        "context",
        "difficulty",
        "weight",
    )
    lines = [
        json.dumps({"question": "问", "answer": "答", role: v}) for role in roles for v in values
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, GOOD]), encoding="utf-8")
    found = read_samples([str(tmp_path / "a.jsonl")])
    assert len(found.samples) + len(found.broken) >= len(lines) // 2
    assert "history must be a list of [question, answer] pairs" in found.broken[0].reason


def test_what_python_can_not_hold_in_an_unused_column_is_no_fault(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    late = pa.array([10**18, 0], pa.timestamp("us"))
    inside = pa.StructArray.from_arrays([late], ["made"])
    table = pa.table(
        {"question": ["问", "问二"], "answer": ["答", "答二"], "made": late, "more": inside}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read_samples([str(tmp_path / "a.parquet")])
    assert [sample.answer for sample in found.samples] == ["答", "答二"] and not found.broken


# ---- many files -------------------------------------------------------------------------------------


def many_files(folder: Path, count: int, characters: int) -> Path:
    folder.mkdir()
    for i in range(count):
        record = {"question": f"第{i}个问题？", "answer": "答" * characters}
        (folder / f"{i}.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_many_files_need_few_open_ones(tmp_path):
    folder = many_files(tmp_path / "many", 1200, 2000)
    assert "1200 samples" in attacked(folder, files=OPEN_FILES.limit + 32)


def test_too_many_open_files_are_called_so(tmp_path, monkeypatch):
    folder = many_files(tmp_path / "many", 2, 10)

    def full(*arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for place, data in ((opening, 2**30), (arrow_samples, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(dataset, "LARGE_DATA", data)
            patch.setattr(place, "open", full, raising=False)
            with pytest.raises(UserError, match=r"too many files are open.*ulimit -n"):
                read_samples([str(folder)], cache_dir=tmp_path / "cache")
