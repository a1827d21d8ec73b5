"""Files to a list of samples: exact counts, large data through Arrow files, the cache, and hostile input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetuning.common.errors import UserError
from finetuning.readers import arrow_samples, dataset, opening
from finetuning.readers.arrow_samples import ArrowSamples
from finetuning.readers.dataset import read_samples
from tests.helpers.read_text import GOOD, PLAIN, TOOL_CALL

ROOT = Path(__file__).resolve().parents[2]

# ---- real files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "thinking"),
    [
        ("crypto_qa/enhanced_QA1.md", 9, 9),
        ("crypto_qa/enhanced_QA2.md", 10, 10),
        ("crypto_qa/enhanced_QA3.md", 11, 11),
        ("crypto_qa/enhanced_QA4.md", 18, 18),
        ("formats/alpaca_zh_1000.json", 1000, 0),
        ("formats/sharegpt_toolcall_zh_100.json", 100, 0),
        ("formats/messages_parts_100.jsonl", 100, 0),
        ("formats/messages_reasoning_parts_50.jsonl", 50, 50),
    ],
)
def test_counts_of_real_files(shared_data, name, count, thinking):
    found = read_samples([str(shared_data / name)])
    assert list(found.samples_per_file.values()) == [count]
    assert found.broken == ()
    assert sum(bool(sample.thinking) for sample in found.samples) == thinking
    assert all(sample.line > 0 for sample in found.samples)


# ---- large data -------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """Two files that count as large data, in chunks of a few kilobytes, one record broken."""
    monkeypatch.setattr(dataset, "LARGE_DATA", 1)
    monkeypatch.setattr(opening, "CHUNK", 4000)
    monkeypatch.setattr(dataset, "CHUNK", 4000)
    monkeypatch.setattr(opening, "BLOCK", 1000)
    folder = tmp_path / "large"
    folder.mkdir()
    tool_turn = {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]}
    records = [
        {
            "messages": [
                {"role": "system", "content": "系统"},
                {"role": "user", "content": f"问{i}"},
                tool_turn,
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": f"答{i}", "reasoning_content": "想" * (i % 50)},
            ],
            "difficulty": i % 4 + 1,
        }
        for i in range(300)
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    lines[200] = lines[200][:-1]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.md").write_text(PLAIN + "### Q2: 二\nA2: 乙### Q3: 三\nA3: 丙", encoding="utf-8")
    return folder


def test_large_data_equal_small(large, tmp_path, monkeypatch):
    seen = []
    found = read_samples(
        [str(large)], cache_dir=tmp_path / "cache", progress=lambda *x: seen.append(x)
    )
    monkeypatch.setattr(dataset, "LARGE_DATA", 2**30)
    small = read_samples([str(large)])
    assert isinstance(found.samples, ArrowSamples)
    assert isinstance(small.samples, list)
    assert list(found.samples) == small.samples
    assert [found.samples[i] for i in range(len(found.samples))] == small.samples
    assert found.samples[-1] == small.samples[-1]
    assert found.samples[3:9:2] == small.samples[3:9:2]
    assert found.samples[37:245] == small.samples[37:245]
    assert found.samples[5:5] == found.samples[9:3] == []
    for name in ("broken", "samples_per_file", "fingerprint", "remarks"):
        assert getattr(found, name) == getattr(small, name)
    assert found.broken[0].line == 201
    assert list(found.samples.sources()) == [sample.source for sample in small.samples]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(IndexError):
        found.samples[len(found.samples)]


def test_large_texts_make_smaller_batches(large, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_samples, "_BATCH_CHARACTERS", 500)
    found = read_samples([str(large)], cache_dir=tmp_path / "cache").samples
    monkeypatch.setattr(dataset, "LARGE_DATA", 2**30)
    rows = [batch.num_rows for batch in found._batches]
    assert max(rows) < 20
    assert len(rows) < 0.75 * len(found), (
        "after the first full batch they do not become one sample each"
    )
    assert list(found) == read_samples([str(large)]).samples


@pytest.mark.slow
def test_large_data_need_no_pandas(large, tmp_path):
    program = (
        "import sys, pathlib; from finetuning.readers import dataset as samples; samples.LARGE_DATA = 1; "
        f"read = samples.read_samples([{str(large)!r}], cache_dir=pathlib.Path({str(tmp_path)!r})); "
        "assert len(list(read.samples)) == len(read.samples) > 300; "
        "assert type(read.samples).__name__ == 'ArrowSamples' and read.samples[5]; "
        "assert 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are counted from /proc")
def test_samples_taken_one_by_one_do_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LARGE_DATA", 1)
    record = json.dumps({"question": "问", "thinking": "想" * 2000, "answer": "答"})
    (tmp_path / "a.jsonl").write_text((record + "\n") * 5000, encoding="utf-8")
    found = read_samples([str(tmp_path / "a.jsonl")], cache_dir=tmp_path / "cache").samples
    before = resident_file_bytes()
    for i in range(0, 5000, 2):
        assert found[i].question == "问"
    assert resident_file_bytes() - before < 5000 * 6000 / 4


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssFile:")[2].split()[0])


@pytest.mark.slow
def test_workers_change_nothing(large, tmp_path):
    one = read_samples([str(large)], cache_dir=tmp_path / "one")
    two = read_samples([str(large)], cache_dir=tmp_path / "two", workers=2)
    assert list(one.samples) == list(two.samples)
    assert (one.broken, one.fingerprint) == (two.broken, two.fingerprint)
    parts = [sorted(p.name for p in (tmp_path / n / "samples").glob("*/*")) for n in ("one", "two")]
    assert parts[0] == parts[1]
    assert len(parts[0]) > 5


@pytest.mark.slow
def test_remarks_of_records_are_told_once_a_file(large, tmp_path, monkeypatch):
    line = json.dumps({"prompt": "问", "query": "多", "answer": "长" * 50, "input": "nan"})
    for name in ("c.jsonl", "d.jsonl"):
        (large / name).write_text(f"{GOOD}\n" + f"{line}\n" * 500, encoding="utf-8")
    found = read_samples([str(large)], cache_dir=tmp_path / "cache", workers=2)
    assert len(list((tmp_path / "cache").glob("samples/*/*.arrow"))) > 10
    told = [r for r in found.remarks if r.text.startswith("not used: query")]
    assert [(Path(r.source).name, r.line) for r in told] == [("c.jsonl", 2), ("d.jsonl", 2)]
    counted = [r.text for r in found.remarks if r.text.startswith("“nan” in input")]
    assert counted == ["“nan” in input is read as no value (500 records, first here)"] * 2
    monkeypatch.setattr(dataset, "LARGE_DATA", 2**30)
    assert read_samples([str(large)]).remarks == found.remarks


def test_cache(large, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = read_samples([str(large)], cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_write_part", None)  # a second reading needs no writing
        again = read_samples([str(large)], cache_dir=cache)
    assert list(again.samples) == list(first.samples)
    part = sorted(cache.glob("samples/*/part-*.arrow"))[-1]
    damaged = part.read_bytes()[:100]
    part.unlink()  # and not in place, since `first` has the file mapped
    part.write_bytes(damaged)
    assert list(read_samples([str(large)], cache_dir=cache).samples) == list(first.samples)
    with open(large / "b.md", "a", encoding="utf-8") as file:
        file.write("### Q4: 四\nA4: 丁")
    assert len(read_samples([str(large)], cache_dir=cache).samples) == len(first.samples) + 1
    assert not list(cache.glob("samples/.building*"))


def test_cached_samples_are_those_of_the_same_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LARGE_DATA", 1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"问题": "一", "别问": "二", "answer": "答"}\n', encoding="utf-8")
    for column, question in [("问题", "一"), ("别问", "二"), ("问题", "一")]:
        columns = {"question": column}
        read = read_samples([str(path)], columns=columns, cache_dir=tmp_path / "cache")
        assert [sample.question for sample in read.samples] == [question]


def test_what_is_cached_is_named_by_all_code_that_makes_it():
    """A file of the readers, and what it imports; but for what keeps, shares out and refuses."""
    files = {path.stem: path for path in Path(dataset.__file__).parent.glob("[!_]*.py")}
    assert set(dataset._READERS) == set(files)
    found = "".join(path.read_text(encoding="utf-8") for path in files.values())
    imported = set(re.findall(r"^ *from finetuning\.([\w.]+) import", found, re.MULTILINE))
    imported -= {f"readers.{name}" for name in files}
    others = {"common.cache", "common.errors", "common.paths", "common.workers", "config"}
    assert imported - others == set(dataset._MAKERS)


def test_unwritable_cache(large, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't write the cache"):
        read_samples([str(large)], cache_dir=tmp_path / "file")


@pytest.mark.slow
def test_import_is_cheap():
    heavy = ("pyarrow", "datasets", "torch", "zstandard")
    code = (
        f"import sys, finetuning.readers.dataset; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
