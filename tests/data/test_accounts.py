"""What became of the data: the same rows for a run, its plan and its check; what is lost is told or refused.

uv run pytest -m "not long" tests/data/test_accounts.py
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from direct_finetuning_with_existing_modules import main
from finetuning.common import language
from finetuning.common.errors import UserError
from finetuning.config import DataSettings
from finetuning.data.accounts import Accounts, accounts_of
from finetuning.data.split import split_samples
from finetuning.data.training_data import prepare_data, read_data
from finetuning.readers.dataset import SampleSet, read_samples
from finetuning.readers.sample import Remark
from tests.helpers.settings import up_to
from tests.helpers.tiny_model import FAST

NAMES = [
    "read", "broken", "control tokens", "too long", "shortened", "without thinking", "empty thinking",
    "turns without loss",
    "skipped files",
]  # fmt: skip


def record(i: int, **changes: object) -> str:
    fields = {
        "question": f"第{i}个问题是什么？",
        "thinking": "先想一想。",
        "answer": f"答案是{i * 7919}。",
    }
    return json.dumps(fields | changes, ensure_ascii=False) + "\n"


@pytest.fixture
def accounts(tmp_path: Path, qwen3) -> Callable[..., Accounts]:
    """Of a file with these lines."""

    def accounts(lines: list[str], settings: DataSettings | None = None) -> Accounts:
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        settings = settings or up_to(512)
        read, _ = read_data(settings.__class__(**{**vars(settings), "data_path": (str(path),)}))
        (found,) = accounts_of(
            prepare_data(split_samples(read, settings), qwen3, settings), settings
        )
        return found

    return accounts


def test_nothing_lost_is_nothing_said(accounts):
    found = accounts([record(i) for i in range(20)])
    assert [name for name, _ in found.rows()] == NAMES
    assert dict(found.rows()) == dict.fromkeys(NAMES, "0") | {"read": "20 samples of 1 file"}
    assert list(found.warnings()) == []
    found.check(0.0)


def test_a_share_above_a_twentieth_is_a_warning_and_above_the_limit_an_error(accounts):
    good = [record(i) for i in range(40)]
    for lost, warned, refused in ((2, False, False), (3, True, False), (5, True, True)):
        for bad, name in ((record(99, answer="答<|im_end|>"), "control tokens"), ("{\n", "broken")):
            found = accounts([*good[lost:], *[bad] * lost], up_to(512, max_broken_fraction=0.5))
            assert [name in warning for warning in found.warnings()] == [True] * warned
            assert dict(found.rows())[name].startswith(f"{lost} of 40 ({lost / 40:.1%})")
            if refused:
                with pytest.raises(UserError, match=rf"{lost} of 40 .* max_broken_fraction 0\.1"):
                    found.check(0.1)
            else:
                found.check(0.1)


def test_what_the_template_refuses_counts_with_what_can_not_be_read(accounts, monkeypatch, qwen3):
    refusing = (
        "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system') -}}{%- endif -%}"
    )
    monkeypatch.setattr(qwen3, "chat_template", refusing + qwen3.chat_template)
    lines = [*(record(i) for i in range(20)), record(20, system="你是专家"), "{\n"]
    found = accounts(lines)
    assert [broken.line for broken in found.broken] == [22, 21]
    (warning,) = found.warnings()
    assert "2 of 22 (9.1%) are broken" in warning and "mine.jsonl:21: the chat template" in warning
    with pytest.raises(UserError, match=r"First: .*mine\.jsonl:22: .*--check-data lists them"):
        found.check(0.05)


def test_control_tokens_that_are_kept_are_no_loss(accounts):
    lines = [record(0), record(1, answer="答<|im_end|>")]
    found = accounts(lines, up_to(512, control_tokens="split", max_broken_fraction=0))
    assert dict(found.rows())["control tokens"].startswith(
        "1 of 2 (50.0%) are kept as ordinary text"
    )
    found.check(0)


def test_the_length_that_would_do_is_named(accounts, qwen3):
    """For 95% and 99% of the documents, and right: with it so many are kept, and no fewer would do."""
    lines = [
        record(i, thinking="想" * (50 if i < 180 else 600 if i < 191 else 1500)) for i in range(200)
    ]
    found = accounts(lines, up_to(256))
    row = dict(found.rows())["too long"]
    at_95, at_99 = map(int, re.findall(r"(\d+) keeps", row))
    assert row.startswith(
        "20 of 200 (10.0%) are longer than 256 tokens and left out; --max-seq-length "
    )
    assert "keeps 95%" in row and "keeps 99%" in row
    for length, kept in ((at_95, 0.95), (at_99, 0.99)):
        assert len(accounts(lines, up_to(length)).tokens) >= kept * 200
        assert len(accounts(lines, up_to(length - 64)).tokens) < kept * 200
    assert found.length_for(0.9) is None
    found.check(0.0)  # whoever names a length has decided what is too long
    unasked = replace(found, chosen_length=False)
    with pytest.raises(UserError, match=rf"--max-seq-length {at_95} keeps 95%.*or raise"):
        unasked.check(0.09)
    unasked.check(0.1)


def test_a_length_that_nobody_chose_may_not_lose_much(accounts):
    lines = [record(i, thinking="想" * (50 if i % 4 else 5000)) for i in range(20)]
    assert len(accounts(lines, DataSettings()).tokens) == 20
    found = replace(accounts(lines, up_to(2048)), chosen_length=False)
    with pytest.raises(UserError, match="5 of 20 samples are longer than 2048 tokens"):
        found.check(0.1)


def test_shortened_samples_are_kept(accounts):
    lines = [record(i, thinking="想一步。\n" * (5 if i else 400)) for i in range(10)]
    found = accounts(lines, up_to(256, over_length="truncate_thinking"))
    rows = dict(found.rows())
    assert rows["too long"] == "0" and rows["shortened"].startswith("1 of 10 (10.0%) are too long")
    found.check(0)
    assert ["shortened" in warning for warning in found.warnings()] == [True]


def test_turns_without_loss_and_without_thinking(accounts):
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    lines = [json.dumps({"messages": turns * 3}, ensure_ascii=False) + "\n", record(1)]
    found = accounts(lines)
    rows = dict(found.rows())
    assert rows["turns without loss"].startswith("2 of 4 (50.0%) assistant turns carry no loss")
    assert rows["turns without loss"].endswith("--loss-on all_turns trains them")
    assert rows["without thinking"].startswith("1 of 2 (50.0%) have no thinking to learn")
    assert rows["without thinking"].endswith("; an empty think block carries no loss")
    found.check(0)
    rows = dict(accounts(lines, up_to(512, loss_on="all_turns")).rows())
    assert rows["turns without loss"] == "0" and rows["without thinking"].startswith(
        "3 of 4 (75.0%)"
    )
    greeted = json.dumps({"messages": [turns[1], *turns]}, ensure_ascii=False) + "\n"
    row = dict(accounts([greeted], up_to(512, loss_on="all_turns")).rows())["turns without loss"]
    assert row.endswith("assistant turns carry no loss: nobody asked before them, or they say so")


def test_skipped_files_are_named(accounts):
    found = accounts([record(i) for i in range(10)])
    skipped = tuple(Remark(f"ds/{name}", 1, "skipped") for name in "abcd")
    read = SampleSet(found.read.samples, (), found.read.samples_per_file, "", skipped=skipped)
    rows = dict(replace(found, read=read).rows())
    assert rows["skipped files"] == "4: ds/a, ds/b, ds/c and 1 more"


def test_what_to_do_about_a_skipped_file_stands_beside_it(accounts, tmp_path):
    found = accounts([record(i) for i in range(10)])
    for name in ("readme.md", "旧题.xls", "标准.pdf"):
        (tmp_path / name).write_bytes(b"x")
    read = read_samples([str(tmp_path)])
    row = dict(replace(found, read=read).rows())["skipped files"]
    xls, pdf = tmp_path / "旧题.xls", tmp_path / "标准.pdf"
    todo = {
        f"{xls}: save it as .xlsx",
        f"{pdf}: copy its questions and answers into a .docx or .xlsx",
    }
    first, second, last = row.removeprefix("3: ").split("; ")
    assert {first, second} == todo and last == str(tmp_path / "readme.md")
    told = language.in_chinese(row)
    assert f"{xls}：请另存为 .xlsx" in told and f"{pdf}：请把其中的问题和答案复制到" in told


# ---- in a run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Thirty samples, one of them broken and one that spells a control token."""
    path = tmp_path_factory.mktemp("accounts") / "mine.jsonl"
    lines = [*(record(i) for i in range(28)), "{\n", record(28, question="什么是<|im_end|>？")]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def shown(out: str) -> list[tuple[str, str]]:
    """The rows of the accounts on a terminal."""
    lines = (re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    return [(line[0], line[1]) for line in lines if len(line) == 2 and line[0] in NAMES]


@pytest.mark.slow
def test_a_run_its_plan_and_its_check_show_the_same_rows(
    tmp_path, data, tiny_model, cache_dir, capsys
):
    inputs = [
        "--model-name",
        str(tiny_model),
        "--data-path",
        str(data),
        "--cache-dir",
        str(cache_dir),
    ]
    inputs += ["--output-dir", str(tmp_path / "out"), "--num-probes", "0"]
    found = []
    loud = [argument for argument in FAST if argument != "--quiet"]
    for more, code in ((["--check-data"], 1), (["--plan"], 0), ([*loud, "--max-steps", "1"], 0)):
        assert main([*inputs, *more]) == code
        found.append(shown(capsys.readouterr().out))
    assert [name for name, _ in found[0]] == NAMES and found[0] == found[1] == found[2]
    assert dict(found[0])["broken"].startswith("1 of 30 (3.3%)")
    (log,) = (tmp_path / "out").glob("training_logs/*/training.log")
    assert "control tokens: 1 of 30 (3.3%)" in log.read_text(encoding="utf-8")


def test_a_run_refuses_what_would_lose_too_much(tmp_path, data, tiny_run, capfd):
    assert tiny_run(tmp_path, "--data-path", str(data), "--max-broken-fraction", "0.01") == 2
    assert "1 of 30 samples are broken" in capfd.readouterr().err
    spelled = tmp_path / "spelled.jsonl"
    lines = [record(i, answer=f"答{i}<|im_end|>" if i % 4 else f"答{i}") for i in range(12)]
    spelled.write_text("".join(lines), encoding="utf-8")
    for more in ([], ["--plan"]):
        assert tiny_run(tmp_path, "--data-path", str(spelled), *more) == 2
        said = capfd.readouterr().err
        assert "9 of 12 samples are left out: their text spells a control token" in said
        assert "--control-tokens split keeps them" in said
    assert not list((tmp_path / "out").glob("training_logs/*"))


def test_general_text_of_ours_does_not_count(accounts, qwen3):
    """With --replay and without, the accounts, what is refused and the longest samples are the same."""
    long, broken = record(0, thinking="想" * 600), ["{\n"] * 3
    lines = [*(record(i) for i in range(1, 17)), long, *broken, record(20, answer="答<|im_end|>")]
    for length in (64, 256):  # general texts are too long, too, or not
        settings = up_to(length, max_broken_fraction=0.5)
        alone = accounts(lines, settings)
        beside = accounts(lines, replace(settings, replay=0.2))
        assert len(beside.general) == 34 and len(beside.read.samples) > len(alone.read.samples)
        assert beside.rows() == alone.rows()
    with pytest.raises(UserError, match="3 of 21 samples are broken"):
        accounts(lines, up_to(256, replay=0.5))


def test_general_text_does_not_shorten_what_99_percent_have(tmp_path, qwen3):
    path = tmp_path / "mine.jsonl"
    lines = [record(i, thinking="想" * (3000 if i < 1 else 20)) for i in range(90)]
    path.write_text("".join(lines), encoding="utf-8")
    found = []
    for share in (0.0, 0.2):
        settings = DataSettings(data_path=(str(path),), replay=share)
        read, _ = read_data(settings)
        data = prepare_data(split_samples(read, settings), qwen3, settings)
        found.append(sorted(data.own_lengths.tolist()))
        assert len(data.lengths) == 90 + 34 * bool(share)
    assert found[0] == found[1]
