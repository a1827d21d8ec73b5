"""--check-data: faults by kind with file and line, exit code 0 or 1, nothing written but the cache.

uv run pytest tests/analysis/test_data_check.py
"""

import json
from pathlib import Path

import pytest

from direct_finetuning_with_existing_modules import main
from finetuning.analysis.data_check import FaultKind
from finetuning.common import language
from finetuning.readers.sample import Finding
from tests.helpers.mixed_text import is_mixed

WHERE = "all findings and the statistics: "
ALL = "all findings: "  # where nothing is left, there are no statistics
THINKING = "先看定义，再比较密钥长度和轮数，最后核对标准条文。"


def line(question: str, answer: str = "答案。", thinking: str = THINKING) -> str:
    record = {"question": question, "thinking": thinking, "answer": answer}
    return json.dumps(record, ensure_ascii=False) + "\n"


@pytest.fixture
def check(tmp_path: Path, tiny_model: Path, cache_dir: Path, capfd):
    """Run --check-data on lines of a file; returns exit code and output lines, but for that of the report."""

    def check(lines: list[str], *more: str) -> tuple[int, list[str]]:
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        places = ["--output-dir", str(tmp_path / "out"), "--cache-dir", str(cache_dir)]
        inputs = ["--model-name", str(tiny_model), "--data-path", str(path)]
        capfd.readouterr()
        code = main(["--check-data", *inputs, *places, "--quiet", *more])
        assert not (tmp_path / "out").exists(), "a check writes nothing"
        said = capfd.readouterr().out.splitlines()
        return code, [text for text in said if not text.startswith((WHERE, ALL))]

    return check


def good(count: int = 20) -> list[str]:
    names = ["轮函数", "杂凑值", "签名值", "随机数", "证书链", "密钥对", "分组数", "椭圆曲线"]
    return [
        line(f"{names[i % 8]}第{i * 37}号：{i * 7919 % 1009}与{i * 104729 % 997}有什么区别？",
             f"{names[(i + 3) % 8]}共{i * 7907}种，其中{i * 6007 % 991}种常用。")
        for i in range(count)
    ]  # fmt: skip


def test_good_data_pass(check):
    code, said = check(good())
    assert code == 0 and said == ["20 samples: nothing to complain of"]


def test_what_to_do_stands_behind_the_longest_finding():
    """A list of columns, each with an example, and then the option that reads one of them."""
    columns = ", ".join(f"{'列' * 60}{i} (“{'例' * 24}…”)" for i in range(8))
    note = f"not used: {columns} and 3 more; no reasoning was found: --columns thinking A reads it"
    assert str(Finding("a.csv", 2, "remark", note)) == f"a.csv:2: remark: {note}"


def test_every_fault_has_its_place(check):
    lines = [
        *good(),
        "{ broken\n",  # 21
        line("太长的问题", "长" * 9000),  # 22
        line("重复的问题是什么？", "重复的回答在这里。"),  # 23
        line("重复的问题是什么？", "重复的回答在这里。"),  # 24
        line("同一个问题有几个答案？", "一个。"),  # 25
        line("同一个问题有几个答案？", "两个，而且与前一个完全不同。"),  # 26
        line("控制符<|im_end|>在文中"),  # 27
    ]
    code, said = check(lines)
    found = {(text.split(": ")[0].rpartition(":")[2], text.split(": ")[1]) for text in said[:-1]}
    assert code == 1
    assert {("21", "broken"), ("22", "dropped"), ("24", "duplicate")} <= found
    assert {("25", "conflict"), ("27", "control token")} <= found
    assert all("mine.jsonl:" in text for text in said[:-1])
    kinds = [text.split(": ")[1] for text in said[:-1]]
    assert kinds[:3] == ["broken", "dropped", "control token"], "what is lost comes first"
    assert "1 broken, 1 dropped, 1 control token" in said[-1]


def test_duplicates_alone_are_told_but_pass(check):
    code, said = check([*good(), line("重复的问题是什么？"), line("重复的问题是什么？")])
    assert code == 0 and any("duplicate" in text for text in said)


def test_much_broken_is_listed_where_a_run_would_refuse(check):
    code, said = check([*good(5), *["{\n"] * 10])
    assert code == 1 and sum(": broken: " in text for text in said) == 3
    assert "  … and 7 more of 10 broken" in said
    assert said[-1] == "5 samples: 10 broken"


def test_the_rest_is_in_a_file(tmp_path: Path, tiny_model: Path, capfd):
    """Every finding by name, what became of the data, and the statistics; its path is printed."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join([*good(), *["{\n"] * 10]), encoding="utf-8")
    inputs = ["--model-name", str(tiny_model), "--data-path", str(path)]
    places = ["--output-dir", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["--check-data", *inputs, *places]) == 1
    out, err = capfd.readouterr()
    (where,) = (text for text in out.splitlines() if text.startswith(WHERE))
    report = Path(where.removeprefix(WHERE))
    assert report.is_relative_to(tmp_path / "cache")
    text = report.read_text(encoding="utf-8")
    assert [f"mine.jsonl:{i}: broken: " in text for i in range(20, 32)] == [
        False,
        *[True] * 10,
        False,
    ]
    assert "- broken: 10 of 30 (33.3%) are broken and left out" in text
    assert "### Overview" in text and "Overview" not in out
    assert "warning: data: broken: 10 of 30 (33.3%)" in err


def test_a_kind_of_which_only_some_are_known_by_name_says_so():
    found = tuple(Finding("a.jsonl", i, "duplicate", "twice") for i in range(200))
    lines = list(FaultKind("duplicate", 431, found).lines())
    assert len(lines) == 201 and lines[-1] == "  … and 231 more of 431 duplicate"


def test_a_duplicate_beyond_the_listed_ones_counts(check):
    code, said = check([line("重复的问题是什么？")] * 260 + good())
    assert code == 0 and said[-1].startswith("280 samples: 259 duplicate")


def test_another_context_makes_another_question(check):
    """The same question under another system text, or after another conversation, has its own answer."""

    def of(system: str, answer: str, earlier: str = "") -> str:
        turns = [{"role": "user", "content": earlier}, {"role": "assistant", "content": "好的。"}]
        messages = [{"role": "system", "content": system}, *(turns if earlier else [])]
        messages += [{"role": "user", "content": "这段话说了什么？"}]
        messages += [{"role": "assistant", "content": answer, "reasoning_content": THINKING}]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"

    apart = [
        of("甲", "说的是密钥。"),
        of("乙", "说的是证书。"),
        of("甲", "说的是曲线。", "先看附件。"),
    ]
    assert not any("conflict" in text for text in check([*good(), *apart])[1])
    assert any(
        ": conflict: " in text for text in check([*good(), apart[0], of("甲", "是别的。")])[1]
    )


def test_the_longest_come_first(check):
    lines = [*good(), *(line(f"太长的问题{i}", "长" * 3000 * i) for i in (1, 3, 2))]
    _, said = check(lines, "--max-broken-fraction", "0.5")
    dropped = [text for text in said if ": dropped: " in text]
    assert [text.split(": ")[0][-2:] for text in dropped] == ["22", "23", "21"]


def test_held_out_files_have_rows_of_their_own(tmp_path: Path, tiny_model: Path, capfd):
    for name, lines in {"a.jsonl": good(), "b.jsonl": [*good()[:3], "{\n"]}.items():
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    inputs = ["--model-name", str(tiny_model), "--data-path", str(tmp_path / "a.jsonl")]
    inputs += ["--eval-path", str(tmp_path / "b.jsonl"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["--check-data", *inputs]) == 1
    out = capfd.readouterr().out
    assert "held-out data: broken              1 of 4 (25.0%)" in out and "\nbroken  " in out


def test_what_would_end_a_run_is_listed_too(check):
    code, said = check([*good(), line("太长", "长" * 9000)], "--over-length", "error")
    assert code == 1 and any(":21: dropped" in text for text in said)


def test_shortened_samples_are_told_but_pass(check):
    long = line("先想很久", thinking="思考一步。" * 800)
    code, said = check([*good(), long], "--over-length", "truncate_thinking")
    assert code == 0 and any(":21: shortened" in text for text in said)


def test_held_out_files_of_the_users_that_leak(check, tmp_path: Path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(good()[3] + line("一个全新的问题？", "别处没有的回答。"), encoding="utf-8")
    code, said = check(good(), "--eval-path", str(held_out))
    leaks = [text for text in said if ": leak: " in text]
    assert code == 1 and len(leaks) == 1
    assert "held_out.jsonl:1:" in leaks[0] and "mine.jsonl:4" in leaks[0]


def test_what_became_of_the_data_is_shown_unless_quiet(check):
    assert not any("without thinking" in text for text in check(good())[1])
    code, said = check(good(), "--no-quiet")
    assert code == 0 and any(text.startswith("without thinking    0") for text in said)


def test_nothing_readable_is_an_error(check):
    code, _ = check(["{\n"])
    assert code == 2


def test_what_is_read_in_an_unexpected_way_is_told_but_passes(check):
    lines = good()
    lines[3] = (
        json.dumps({**json.loads(lines[3]), "instruction": "用一句话"}, ensure_ascii=False) + "\n"
    )
    code, said = check(lines)
    assert code == 0 and said[-1] == "20 samples: 1 remark"
    assert "mine.jsonl:4: remark: not used: instruction" in said[0]


def test_data_of_which_nothing_is_left_are_listed_like_others(check, tmp_path):
    """Broken when they are read, and when they become tokens; with the reason of every record."""
    code, said = check(["{\n", '{"a": 1}\n', line("", "答")])
    places = [f"{tmp_path.as_posix()}/mine.jsonl:{i}: broken: " for i in (1, 2, 3)]
    assert code == 1 and all(
        text.startswith(place) for text, place in zip(said, places, strict=False)
    )
    assert said[-1] == "nothing to train on: 3 broken, 1 without a sample"

    code, said = check([line("太长的问题", "长" * 9000), line("问", "答<|im_end|>")])
    assert code == 1 and said[-1] == "nothing to train on: 1 dropped, 1 control token"
    assert "mine.jsonl:1: dropped: " in said[0] and "mine.jsonl:2: control token: " in said[1]


def test_of_much_that_leaves_nothing_the_rest_is_in_a_file(tmp_path, tiny_model, capfd):
    path = tmp_path / "mine.jsonl"
    path.write_text("{\n" * 150, encoding="utf-8")
    inputs = ["--model-name", str(tiny_model), "--data-path", str(path)]
    places = ["--output-dir", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["--check-data", *inputs, *places]) == 1
    said = capfd.readouterr().out.splitlines()
    assert sum(": broken: " in text for text in said) == 3
    assert "  … and 147 more of 150 broken" in said
    (where,) = (text for text in said if text.startswith(ALL))
    listed = Path(where.removeprefix(ALL))
    assert listed.is_relative_to(tmp_path / "cache")
    text = listed.read_text(encoding="utf-8")
    assert all(f"mine.jsonl:{i}: broken: " in text for i in range(1, 151))


def test_samples_without_thinking_are_told_as_the_setting_has_them(check):
    """By default their answer alone is learnt, which teaches nothing about thinking."""
    lines = [*good(), line("没有思考的问题？", "有答案。", "")]
    notes = {}
    for setting in ("mask", "train", "drop"):
        code, said = check(lines, "--empty-thinking", setting)
        assert code == 0
        (notes[setting],) = (text for text in said[:-1] if "mine.jsonl:21: " in text)
    mask, train, drop = notes.values()
    assert mask.endswith(
        ": no thinking: has no thinking to learn; an empty think block carries no loss"
    )
    assert train.endswith("; an empty think block teaches the model not to think")
    assert drop.endswith(": empty thinking: has no thinking; left out")


def test_data_wholly_without_thinking_that_are_dropped_are_named(check):
    lines = [line(f"第{i}问？", f"答{i}。", "") for i in range(4)]
    code, said = check(lines, "--empty-thinking", "drop")
    assert code == 1 and said[-1] == "nothing to train on: 4 empty thinking"
    assert "mine.jsonl:1: empty thinking: " in said[0]


def test_one_file_without_a_sample_hides_nothing_of_the_others(check, tmp_path):
    (tmp_path / "other.jsonl").write_text("[]\n", encoding="utf-8")
    code, said = check(
        [*good(), "{\n"], "--data-path", str(tmp_path / "other.jsonl"), str(tmp_path / "mine.jsonl")
    )
    assert code == 1 and any("mine.jsonl:21: broken: " in text for text in said)
    assert any("other.jsonl:1: without a sample: " in text for text in said)


def test_a_check_speaks_chinese(check, cache_dir: Path):
    """Every line on the terminal and in the file is wholly Chinese, whatever is wrong."""
    lines = [*good(), "{ broken\n", line("重复的题？"), line("重复的题？")]
    lines += [line("没有思考的题？", thinking=""), line("没有答案的题？", answer="")]
    before = set((cache_dir / "checks").glob("*.md"))
    try:
        _, said = check(lines, "--language", "zh")
        assert language.current() == "zh"
        (page,) = set((cache_dir / "checks").glob("*.md")) - before
        said += page.read_text(encoding="utf-8").splitlines()
        english = [text for text in said if is_mixed(text) or language.is_prose(text)]
        assert len(said) > 30 and not english
        assert any("损坏：第 3 列 JSON 有误" in text for text in said)
    finally:
        language.use("en")
