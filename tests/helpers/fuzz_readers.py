"""Damaged files of every kind through the readers: each gives samples or one clear line, soon and in little
memory.

    python -m tests.helpers.fuzz_readers SECONDS [SEED]

A process of its own: what hangs for 5 s ends it with a traceback, and so does a crash of a library. The input
that did it stays in the folder that is named first.
"""

import faulthandler
import gzip
import io
import json
import random
import sys
import tempfile
import time
import zipfile
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import zstandard

from finetuning.common.errors import UserError
from finetuning.readers.dataset import read_samples
from tests.helpers.read_text import GOOD, JSONL, PLAIN, RECORDS, TOOL_CALL
from tests.helpers.reading_cases import all_cases, write_file

HANGS = 5  # seconds
MOST_MIB = 1024
CHAT = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "问"},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "想"}]},
            {"role": "assistant", "content": "<think>想</think>答", "tool_calls": [TOOL_CALL]},
        ],
        "tools": [{"name": "f"}],
    }
)
TABLE = [["问题", "答案"], ["问", "答"]]


def office_bytes(name: str, content: dict) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder) / name, content)
        return (Path(folder) / name).read_bytes()


def rows_table() -> pa.Table:
    rows = [json.loads(GOOD), {**json.loads(GOOD), "made": datetime(2024, 1, 1)}]
    return pa.Table.from_pylist([{**row, "messages": None, "n": i} for i, row in enumerate(rows)])


def parquet_bytes(**options: object) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(rows_table(), out, **options)
    return out.getvalue()


def arrow_bytes(form: object) -> bytes:
    out = io.BytesIO()
    with form(out, rows_table().schema) as writer:
        writer.write_table(rows_table())
    return out.getvalue()


SEEDS = {
    ".md": [
        PLAIN.encode(),
        "**问题1：一**\n**思考**：想\n**答案**：甲\n\n|问题|答案|\n|---|---|\n|二|乙|\n".encode(),
        ("## 难度 2\n" + PLAIN + "### Q2：二\n难度: 3\n```\n# x\n```\n").encode(),
    ],
    ".json": [json.dumps(RECORDS).encode(), f"[{CHAT}, {GOOD}]".encode()],
    ".jsonl": [JSONL.encode(), f"{CHAT}\n{GOOD}\n".encode(), f"{CHAT}\n".encode("utf-16")],
    ".csv": ['question,answer\n问,"答\n案"\n'.encode(), b"messages,tools\n[],[]\n"],
    ".txt": [
        "1、问：一\n思考：想\n答：甲\n\n2、问：二\n答：乙\n".encode(),
        "一？\n答：甲\n".encode("gb18030"),
    ],
    ".xlsx": [office_bytes("a.xlsx", {"sheets": {"问答": TABLE}})],
    ".docx": [office_bytes("a.docx", {"paragraphs": ["问：一", "答：甲", TABLE]})],
    ".parquet": [parquet_bytes(), parquet_bytes(compression="zstd", use_dictionary=False)],
    ".arrow": [arrow_bytes(pa.ipc.new_stream), arrow_bytes(pa.ipc.new_file)],
    ".csv.gz": [gzip.compress("问题;答案\n问;答\n".encode("gb18030"))],
    ".md.gz": [gzip.compress(PLAIN.encode("utf-16"))],
    ".tsv": ["问题\t答案\t思考\n问\t答\t想\n".encode("utf-16-le")],
    ".jsonl.gz": [gzip.compress(JSONL.encode())],
    ".jsonl.zst": [zstandard.compress(JSONL.encode())],
}
SPLICES = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"NaN", b"1e999",
    b"<think>", b"</think>", b"<thinking>", b"</thinking>", b"### Q1:", b"A1:", b"## ", b"```",
    "### 问题2: ".encode(), "答1：".encode(), b"### 3.", b'"input":', b'"history":', b"\t", b";",
    b"\r", b"\xe2\x80\xa8", b"{", b"}", b"[", b"]", b'"', b",", b"null", b"9" * 5000, b"[" * 3000,
    b'{"role":', b'"from"', b'"content":', b'"value":', b"\n", b"true", b"\\", b"-",
]  # fmt: skip
KEYS = """
question answer thinking system history tools messages conversations input context options label weight
difficulty images instruction output role content 问题 答案 思考 选项 对话 reasoning_steps chosen rejected
text value tool_calls function_call from loss mask
""".split()  # noqa: SIM905
ODD_TEXTS = [
    "",
    " ",
    "问",
    "nan",
    "true",
    "<think>",
    "</think>",
    "[1]",
    "{}",
    "1" * 30,
    "\0",
    "user",
]


def any_value(rng: random.Random, depth: int = 0) -> object:
    """A value of JSON, of a shape that a reader may take for something else."""
    kinds = [
        lambda: rng.choice(ODD_TEXTS),
        lambda: rng.choice([None, True, False, 0, 5, -1, 1e308, 2**70]),
    ]
    if depth < 4:
        kinds += [
            lambda: [any_value(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: any_record(rng, depth + 1),
        ] * 2
    return rng.choice(kinds)()


def any_record(rng: random.Random, depth: int = 0) -> dict:
    return {rng.choice(KEYS): any_value(rng, depth) for _ in range(rng.randrange(1, 6))}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Data with some bytes taken out, put in, doubled or changed."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randint(0, len(data)), rng.randint(0, 20)
        kind = rng.randrange(5)
        if kind == 0:
            source = rng.randint(0, len(data))
            data[at : at + length] = data[source : source + 200]
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at : at + length] = rng.choice(SPLICES)
        elif kind == 3 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        else:
            data[at : at + length] = rng.randbytes(rng.randrange(20))
    return bytes(data)


def damaged(suffix: str, data: bytes, rng: random.Random) -> bytes:
    """A file with damage inside what is packed, or to the package."""
    if rng.random() < 0.4:
        return mutated(data, rng)
    if suffix in (".xlsx", ".docx") and zipfile.is_zipfile(io.BytesIO(data)):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            hit = rng.choice(old.namelist())
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, mutated(content, rng) if name == hit else content)
        return out.getvalue()
    if suffix.endswith(".gz"):
        return gzip.compress(mutated(gzip.decompress(data), rng), 1)
    if suffix.endswith(".zst"):
        return zstandard.compress(mutated(zstandard.decompress(data), rng))
    return mutated(data, rng)


def cases() -> list[tuple[str, bytes]]:
    """(suffix, content) of all that is tried: the seeds, and the files of the readers' cases."""
    found = [(suffix, data) for suffix, contents in SEEDS.items() for data in contents]
    with tempfile.TemporaryDirectory() as folder:
        for case in all_cases():
            for name, content in case.files.items():
                path = Path(folder) / Path(name).name
                write_file(path, content)
                found.append(("".join(path.suffixes[-2:]), path.read_bytes()))
    return found


def check(path: Path) -> None:
    """Read a file; an AssertionError, or any error but UserError, is a fault."""
    try:
        found = read_samples([str(path)])
    except UserError as error:
        assert "\n" not in str(error), error
        assert path.name in str(error) or "readable are" in str(error), error
        return
    assert len(found.samples) == sum(found.samples_per_file.values()) > 0
    for sample in found.samples:
        assert len(sample.id) == 16 and sample.question and (sample.answer or sample.tool_calls)
        json.dumps(sample.messages(), ensure_ascii=False).encode()
    assert all(item.line > 0 and item.reason for item in found.broken)


def peak_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def fuzz(seconds: float, seed: int, folder: Path) -> int:
    """Damage files and read them for so long; how many were tried."""
    rng, known, tried = random.Random(seed), cases(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tried += 1
        if rng.random() < 0.25:
            records = [any_record(rng) for _ in range(3)]
            lines = [json.dumps(r, ensure_ascii=False) for r in records]
            suffix, data = ".jsonl", "\n".join([*lines, GOOD]).encode()
        else:
            suffix, data = rng.choice(known)
            data = damaged(suffix, data, rng)
        path = folder / f"fuzz{suffix}"
        path.write_bytes(data)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        check(path)
        faulthandler.cancel_dump_traceback_later()
        path.unlink()
    return tried


def main() -> None:
    """Say what is tried, where, and how much."""
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**32
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"seed {seed}, in {folder}", flush=True)
    tried = fuzz(float(sys.argv[1]), seed, folder)
    folder.rmdir()
    print(f"{tried} inputs, {peak_mib()} MiB")
    assert peak_mib() < MOST_MIB


if __name__ == "__main__":
    main()
