"""Input made to explode: it is refused in one line, in seconds, and in far less than a gigabyte.

Each attack is read by a process of its own, which says how long it took and how large it grew.
"""

import gzip
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import zstandard

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit", "head"),
    [
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
    ],
)
def test_a_bomb_is_refused(tmp_path, name, unit, head):
    path = gz(tmp_path / name, unit, head=head)
    assert path.stat().st_size < 6 * 2**20
    said = attacked(path)
    assert any(
        sign in said for sign in ("unpacks to more than", "MiB", "lines", "broken", "longer")
    ), said


@pytest.mark.slow
def test_a_zst_bomb_is_refused(tmp_path):
    writer = zstandard.ZstdCompressor(level=3)
    with open(tmp_path / "a.jsonl.zst", "wb") as file, writer.stream_writer(file) as out:
        for _ in range(160):
            out.write(RECORD_LINE * (2**20 // len(RECORD_LINE)))
    assert "unpacks to more than 128 MiB" in attacked(tmp_path / "a.jsonl.zst", seconds=5)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "value"), [(20_000, "A" * 2**20), (2000, "B" * 50 * 2**20)])
def test_a_dictionary_of_parquet_is_no_bomb(tmp_path, rows, value):
    path = parquet(tmp_path / "a.parquet", rows, value)
    assert path.stat().st_size < 2**20
    assert "unpacks to more than" in attacked(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part", "unit"),
    [
        ("a.xlsx", "xl/worksheets/sheet1.xml",
         b"<worksheet><sheetData>|<row><c/></row>|</sheetData></worksheet>"),
        ("b.xlsx", "xl/sharedStrings.xml", b"<sst>|<si><t>a</t></si>|</sst>"),
        ("a.docx", "word/document.xml",
         b'<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>|<w:p/>|'
         b"</w:body></w:document>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mib", [30, 300])
def test_an_office_file_is_no_bomb(tmp_path, name, part, unit, mib):
    if name.endswith("xlsx"):
        write_file(tmp_path / "good.xlsx", {"sheets": {"问答": [["问题", "答案"], ["问", "答"]]}})
    else:
        write_file(tmp_path / "good.docx", {"paragraphs": ["问：甲"]})
    rest = parts_of(tmp_path / f"good{Path(name).suffix}", part)
    said = attacked(deflated(tmp_path / name, part, unit, mib, rest))
    assert "unpacks to" in said or "holds" in said or "samples" in said, said
