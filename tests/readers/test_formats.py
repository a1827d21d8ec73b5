"""Bytes to records: JSON, JSON Lines, CSV, Parquet and Arrow, in every encoding and compression."""

import codecs
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from finetuning.common.bounds import RECORD
from finetuning.common.errors import UserError
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import BrokenSample
from tests.helpers.read_text import GOOD, JSONL, PLAIN, RECORDS, only, read, remarks, texts


def test_broken_elements_of_an_array(tmp_path):
    text = f'[\n{GOOD},\n{{"question": "问", "answer": NaN}},\n3,\n{GOOD}\n]\n'
    found = read(tmp_path, "a.json", text)
    assert [sample.line for sample in found.samples] == [2, 5]
    assert [broken.line for broken in found.broken] == [3, 4]


def test_broken_json_document(tmp_path, subtests):
    for text, place in [
        (f"[{GOOD},\n{GOOD}", ":2:"),
        (f"[{GOOD},\n {GOOD[:-1]}]", ":2:"),
        (f"[{GOOD}\n{GOOD}]", ":2:"),
        (f"[{GOOD}]\n\nx", ":3:"),
        ("[" * 100_000, ":1:"),
        ("{", ":1:"),
    ]:
        with subtests.test(text=text):
            with pytest.raises(UserError, match="broken JSON") as error:
                read(tmp_path, "a.json", text)
            assert f"{tmp_path / 'a.json'}{place}" in str(error.value)


@pytest.mark.parametrize("text", [f"{GOOD}\n{GOOD}\n", f'{{"data": [{GOOD},{GOOD}]}}'])
def test_json_that_is_no_array(tmp_path, text):
    assert len(read(tmp_path, "a.json", text).samples) == 2


def test_long_elements_cross_the_window(tmp_path):
    records = [{"question": f"问{i}", "answer": "长" * 400_000} for i in range(5)]
    found = read(tmp_path, "a.json", json.dumps(records, ensure_ascii=False, indent=1))
    assert [s.question for s in found.samples] == [f"问{i}" for i in range(5)]
    assert [s.line for s in found.samples] == [2, 6, 10, 14, 18]


def test_overlong_line_is_skipped(tmp_path):
    long = '{"question": "' + "x" * (RECORD.limit * 2) + '", "answer": "答"}'
    found = read(tmp_path, "a.jsonl", f"{GOOD}\n{long}\n{GOOD}\n")
    assert [sample.line for sample in found.samples] == [1, 3]
    assert found.broken == (BrokenSample(str(tmp_path / "a.jsonl"), 2, "line longer than 16 MiB"),)


def test_an_integer_of_thousands_of_digits_breaks_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"n": {"9" * 5000}}}\n{GOOD}\n', encoding="utf-8")
    (broken,) = read_samples([str(path)]).broken
    assert broken.line == 1 and "an integer of 5000 digits" in broken.reason


def test_line_separators_inside_a_line(tmp_path):
    record = {"question": "问", "answer": "a\u2028b\u2029c\u0085d\x0be"}
    line = json.dumps(record, ensure_ascii=False).replace("\\u000b", "\\u000B")
    found = read(tmp_path, "a.jsonl", f"{line}\r\n{line}")
    assert [s.answer for s in found.samples] == [record["answer"]] * 2


# ---- encodings --------------------------------------------------------------------------------


def test_byte_order_marks(tmp_path, subtests):
    for encoding in ["utf-8", "utf-8-sig", "utf-16", "utf-32"]:
        for name, text in [
            ("a.md", PLAIN),
            ("a.jsonl", '{"question": "问", "thinking": "想一\\n\\n想二", "answer": "答"}\n'),
            ("a.json", '[{"question": "问", "thinking": "想一\\n\\n想二", "answer": "答"}]'),
            ("a.csv", 'question,thinking,answer\n问,"想一\n\n想二",答\n'),
        ]:
            with subtests.test(encoding=encoding, name=name):
                sample = only(tmp_path, name, text.encode(encoding))
                assert texts(sample) == ("问", "想一\n\n想二", "答")


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE])
def test_both_orders_of_utf16(tmp_path, mark):
    encoding = "utf-16-be" if mark == codecs.BOM_UTF16_BE else "utf-16-le"
    assert only(tmp_path, "a.md", mark + PLAIN.encode(encoding)).question == "问"


@pytest.mark.parametrize("name", ["a.md", "a.json", "a.csv"])
def test_wrong_encoding_is_refused_with_its_place(tmp_path, name):
    good = "### Q1: a\nA1: b\n" if name == "a.md" else "[\n" if name == "a.json" else "a,b\n1,2\n"
    content = good.encode() + b"\xc3\xdc\xff"  # neither UTF-8 nor GB18030 nor Big5
    with pytest.raises(UserError) as error:
        read(tmp_path, name, content)
    line = good.count("\n") + 1
    assert f"{name}:{line}: byte 0xc3 at offset {len(good)} is not UTF-8" in str(error.value)


def test_utf16_without_a_mark_is_read(tmp_path, subtests):
    for encoding in ["utf-16-le", "utf-16-be"]:
        for name in ["a.md", "a.jsonl", "a.json", "a.csv"]:
            with subtests.test(encoding=encoding, name=name):
                text = {
                    "a.md": PLAIN,
                    "a.csv": "问题,回答\n" + "什么是分组密码,一类密码\n" * 20,
                }.get(name, GOOD)
                found = read(tmp_path, name, text.encode(encoding))
                plain = read(tmp_path, f"plain-{name}", text)
                assert found.samples and found.fingerprint == plain.fingerprint
                assert (1, "read as UTF-16") in remarks(found)


def test_nul_bytes_that_are_no_utf16_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.jsonl begins with NUL bytes and is no UTF-16 text"):
        read(tmp_path, "a.jsonl", b"\0\0\0\0" + GOOD.encode() + b"\0\0\0")


def test_wrong_encoding_far_into_a_file(tmp_path):
    good = "### Q1: 问\nA1: 答\n" * 100_000
    with pytest.raises(UserError, match=f"at offset {len(good.encode())} is not UTF-8"):
        read(tmp_path, "a.md", good.encode() + b"\xff")


def test_wrong_encoding_in_one_line(tmp_path):
    content = f"{GOOD}\n".encode() + '{"question": "问"}\n'.encode("gb18030") + GOOD.encode()
    found = read(tmp_path, "a.jsonl", content)
    assert [sample.line for sample in found.samples] == [1, 3]
    offset = len(GOOD.encode()) + 1 + len('{"question": "')
    assert found.broken[0].reason == f"byte 0xce at offset {offset} is not UTF-8"


def test_every_container_gives_the_same_samples(tmp_path):
    table = pa.Table.from_pylist(RECORDS)
    (tmp_path / "a.jsonl").write_text(JSONL, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL.encode()))
    frames = zstandard.compress(JSONL[:100].encode()) + zstandard.compress(JSONL[100:].encode())
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "a.json.zst").write_bytes(zstandard.compress(json.dumps(RECORDS).encode()))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as w:
        w.write_table(table)
    rows = [[json.dumps(value, ensure_ascii=False) for value in r.values()] for r in RECORDS]
    quoted = [",".join('"' + json.loads(v).replace('"', '""') + '"' for v in row) for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["question,thinking,answer", *quoted]), "utf-8")
    (tmp_path / "a.tsv").write_text(
        "\n".join(["question\tthinking\tanswer", *(q.replace('","', '"\t"') for q in quoted)]),
        "utf-8",
    )
    markdown = "\n".join(
        f"### Q{i}: {r['question']}\n<think>\n{r['thinking']}\n</think>\nA{i}: {r['answer']}\n"
        for i, r in enumerate(RECORDS)
    )
    (tmp_path / "a.md").write_text(markdown, encoding="utf-8")
    found = {path.name: read_samples([str(path)]) for path in sorted(tmp_path.iterdir())}
    assert len(found) == 10
    assert {len(f.samples) for f in found.values()} == {7}
    assert len({f.fingerprint for f in found.values()}) == 1
    assert found["a.csv"].samples[1].line == 4  # a quoted line break counts as a line


@pytest.mark.parametrize("split", [False, True])
def test_saved_datasets(tmp_path, split):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    if split:
        data = datasets.DatasetDict({"train": data, "test": data.select([0])})
    data.save_to_disk(str(tmp_path / "saved"))
    found = read_samples([str(tmp_path / "saved")])
    assert [s.question for s in found.samples] == [r["question"] for r in RECORDS]


def test_damaged_containers(tmp_path, subtests):
    for name in ["a.jsonl.gz", "a.md.gz", "a.jsonl.zst", "a.parquet", "a.arrow"]:
        with subtests.test(name=name), pytest.raises(UserError, match=r"can't be read|no sample"):
            read(tmp_path, name, b"PAR1 this is no archive")


def test_cut_archive(tmp_path):
    whole = gzip.compress(JSONL.encode() * 100)
    with pytest.raises(UserError, match="can't be read to its end"):
        read(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2])


def test_csv_faults(tmp_path):
    found = read(tmp_path, "a.csv", "question,answer\n问,答\n问,答,多\n问\n")
    assert [(b.line, b.reason[:20]) for b in found.broken] == [
        (3, "more fields than the"),
        (4, "empty answer"),
    ]
    with pytest.raises(UserError, match="two columns are called 'answer'"):
        read(tmp_path, "b.csv", "question,answer,answer\n问,答,错\n")


def test_csv_by_the_separator_of_its_header(tmp_path, subtests):
    for mark in [",", "\t", ";"]:
        for name in ["a.csv", "a.tsv"]:
            with subtests.test(mark=mark, name=name):
                text = "question,thinking,answer\n问,想,答\n".replace(",", mark)
                assert texts(only(tmp_path, name, text)) == ("问", "想", "答")


def test_csv_with_a_comma_in_its_header_is_separated_by_commas(tmp_path):
    text = "question,answer;\tnote,answer\n问;\t一,多,答\n"
    assert texts(only(tmp_path, "a.csv", text)) == ("问;\t一", "", "答")


def test_csv_as_excel_leaves_it(tmp_path):
    text = "question,answer,,\n问,答,,\n,,,\n\n ,,,\n问,答,,多\n问,答,,又\n问,答,,,\n问,答,,,余\n"
    found = read(tmp_path, "a.csv", text)
    assert [sample.line for sample in found.samples] == [2, 6, 7, 8]
    assert [(b.line, b.reason) for b in found.broken] == [(9, "more fields than the header has")]
    told = "not used: column 4, which has no name in the header (“多”); "
    told += "--columns FIELD NAME says what a column is for"
    assert remarks(found) == [(6, told)]


def test_row_numbers_of_pandas_are_not_remarked(tmp_path):
    found = read(tmp_path, "a.csv", ",question,answer\n0,问,答\n1,问,答\n")
    assert len(found.samples) == 2 and not found.remarks
