"""Markdown to samples: every variation of headings, markers and reasoning, and what is told of the rest."""

import pytest

from finetuning.readers.dataset import read_samples
from tests.helpers.read_text import PLAIN, only, read, remarks, texts


def test_real_markdown_equals_an_independent_reading(shared_data):
    """The answers by a plain scan of these files' lines, whose markers all stand at line starts."""
    for path in sorted((shared_data / "crypto_qa").glob("*.md")):
        answers, inside = [], False
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.startswith("A") and ":" in line and line[1 : line.index(":")].isdigit():
                answers.append([line.split(":", 1)[1]])
                inside = True
            elif line.startswith("#"):
                inside = False
            elif inside:
                answers[-1].append(line)
        expected = ["\n".join(lines).strip() for lines in answers]
        assert [sample.answer for sample in read_samples([str(path)]).samples] == expected


def test_markdown_variations(tmp_path, subtests):
    for text in [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.rstrip("\n"),
        PLAIN.replace("Q1: ", "Q1：").replace("A1: ", "A1："),
        PLAIN.replace("Q1: ", "Q1:"),
        PLAIN.replace("### Q1", "###Q1"),
        PLAIN.replace("### Q1", "#### Q1"),
        PLAIN.replace("### Q1", "## Q1"),
        PLAIN.replace("### Q1: 问", "### **Q1: 问**").replace("问**", "问"),
        PLAIN.replace("Q1: 问", "Q1:\n问"),
        PLAIN.replace("thinking>", "think>"),
        PLAIN.replace("thinking>", "Thinking>"),
        PLAIN.replace("A1: ", ""),
        PLAIN.replace("A1: ", "**A1:** "),
        PLAIN.replace("A1: ", "A: "),
        PLAIN.replace("A1: ", "答："),
        PLAIN.replace("A1: 答", "A1:\n\n答"),
        PLAIN.replace("<thinking>", "A1: <thinking>").replace("\nA1: 答", "\n答"),
        "# 标题\n\n说明\n\n## 一类\n\n" + PLAIN + "\n## 二类\n",
        PLAIN + "\n---\n\n# 尾\n",
    ]:
        with subtests.test(text=text):
            assert texts(only(tmp_path, "a.md", text)) == ("问", "想一\n\n想二", "答")


def test_markdown_without_thinking(tmp_path):
    text = "### Q1: 一\n\nA1: 甲\n\n乙\n\n### Q2: 二\nA2: 丙\n\n### Q3: 三\n丁\n"
    found = read(tmp_path, "a.md", text)
    assert [texts(s) for s in found.samples] == [
        ("一", "", "甲\n\n乙"),
        ("二", "", "丙"),
        ("三", "", "丁"),
    ]
    assert [sample.line for sample in found.samples] == [1, 7, 10]
    assert [(r.line, r.text) for r in found.remarks] == [(10, "Q3 has no answer marker A3:")]


def test_markdown_glued_heading_with_question_on_the_next_line(tmp_path):
    text = PLAIN.rstrip() + "### Q2:\n问二\n\n<thinking>\n思\n</thinking>\n\nA2: 答二"
    found = read(tmp_path, "a.md", text)
    assert [texts(s)[2] for s in found.samples] == ["答", "答二"]
    assert found.samples[1].question == "问二"
    assert "not on a line of its own" in found.remarks[0].text


def test_markdown_answer_keeps_lines_that_only_look_like_markers(tmp_path):
    text = "### Q7: 选哪个？\nA: RSA\nB: SM2\n\nA7: 选 B\nA类: 说明\nAES: 分组密码\n"
    sample = only(tmp_path, "a.md", text)
    assert sample.question == "选哪个？\nA: RSA\nB: SM2"
    assert sample.answer == "选 B\nA类: 说明\nAES: 分组密码"


def test_markdown_headings(tmp_path):
    """A comment in a code fence ends no answer, a heading in the reasoning neither."""
    text = (
        "### Q1: 一\n<think>\n## 分析\n想\n</think>\nA1: 甲\n```sh\n# 注释\nls\n```\n### 小结\n乙\n"
        "## 第二类\n\n散落的文字\n\n### Q2: 二\nA2: 丙\n```\n# 未闭合\n"
    )
    found = read(tmp_path, "a.md", text)
    assert found.samples[0].thinking == "## 分析\n想"
    assert found.samples[0].answer == "甲\n```sh\n# 注释\nls\n```\n### 小结\n乙"
    assert found.samples[1].answer == "丙\n```"
    assert any("第二类" in remark.text for remark in found.remarks)


def test_markdown_difficulty(tmp_path):
    text = (
        "## 难度 2 对称\n\n### Q1: 一\nA1: 甲\n\n### Q2: 二\n难度：4\nA2: 乙\n\n## 难度3\n"
        "### Q3: 三\nA3: 丙\n\n## 其他\n### Q4: 四\nA4: 丁\n"
    )
    found = read(tmp_path, "a.md", text)
    assert [sample.difficulty for sample in found.samples] == [2, 4, 3, None]
    assert found.samples[1].question == "二"


def test_markdown_of_line_separators_and_other_characters_is_untouched(tmp_path):
    answer = "甲\u2028乙\u0085丙\u200b\u202e丁\x0b戊\x0c己\u3000庚"
    assert only(tmp_path, "a.md", f"### Q1: 问\nA1: {answer}\n").answer == answer


def test_broken_markdown_is_listed(tmp_path, subtests):
    for body, reason in [
        ("<thinking>\n想\n\nA2: 答", "<thinking> is never closed"),
        ("想\n</thinking>\n\nA2: 答", "stray </thinking>"),
        ("<think>\n<think>\n想\n</think>\n\nA2: 答", "<think> inside a <think> block"),
        ("<think>\n想\n</think>\n</think>\nA2: 答", "stray </think> after"),
        ("<think>想</thinking>\n\nA2: 答", "<think> is closed by </thinking>"),
        ("<think>想</think><think>再想</think>\n\nA2: 答", "stray <think> after"),
        ("<think>想</think>\n\nA2:\n", "empty answer"),
        ("<think>想</think>\n", "empty answer"),
        ("A2: \n\n## 下一类\n", "empty answer"),
        ("A2: 先答<think>想</think>", "text before <think>"),
        ("A2: 答\0案", "NUL"),
    ]:
        with subtests.test(body=body):
            text = f"### Q1: 一\nA1: 甲\n\n### Q2: 二\n\n{body}\n\n### Q3: 三\nA3: 丙\n"
            found = read(tmp_path, "a.md", text)
            assert [sample.answer for sample in found.samples] == ["甲", "丙"]
            (broken,) = found.broken
            assert (broken.source, broken.line) == (str(tmp_path / "a.md"), 4)
            assert reason in broken.reason


def test_empty_thinking_and_wrong_number_are_remarked(tmp_path):
    text = "### Q1: 一\n<think>\n\n</think>\nA1: 甲\n\n### Q2: 二\nA3: 乙\n"
    found = read(tmp_path, "a.md", text)
    assert len(found.samples) == 2
    assert [r.text for r in found.remarks] == [
        "Q1 has an empty thinking block",
        "Q2 is answered by A3",
    ]


def test_markdown_questions_of_other_names(tmp_path, subtests):
    for heading, marker in [
        ("### q2: ", "a2: "),
        ("### 问题2: ", "答案2: "),
        ("### 问题2：", "答2："),
        ("### 问2 ", "**答案2：**"),
        ("### **问题 2：** ", "答："),
        ("## 问题2: ", "<thinking>\n想\n</thinking>\n答: "),
        ("# 第二章\n\n### 问题1: ", "答："),
    ]:
        with subtests.test(heading=heading):
            text = f"### Q1: 甲\nA1: 答甲\n\n{heading}乙\n{marker}答乙\n\n### Q3: 丙\nA3: 答丙\n"
            found = read(tmp_path, "a.md", text)
            thinking = "想" if "想" in marker else ""
            pairs = [("甲", "", "答甲"), ("乙", thinking, "答乙"), ("丙", "", "答丙")]
            assert [texts(sample) for sample in found.samples] == pairs
            assert [sample.line for sample in found.samples[:2]] == [1, 6 if "章" in heading else 4]
            assert not found.broken and not found.remarks


def test_markdown_of_other_names_alone(tmp_path):
    text = (
        "# 一\n### 问题1：甲\n答案1：答甲\n### 问题2：乙\n答：答乙\n# 二\n### 问题1：丙\n答：答丙\n"
    )
    found = read(tmp_path, "a.md", text)
    assert [texts(s)[::2] for s in found.samples] == [
        ("甲", "答甲"),
        ("乙", "答乙"),
        ("丙", "答丙"),
    ]
    assert not found.remarks


def test_what_an_answer_swallows_is_told(tmp_path, subtests):
    for part, line, shown in [
        ("### 问题1：现状\n密钥硬编码", 4, "### 问题1：现状"),  # no reply follows
        ("```\n### 问题8：现状\n答：甲\n```\nA8: 乙", 8, "A8: 乙"),
        ("### 问题1：现状\n答：密钥硬编码", 4, "### 问题1：现状 答：密钥硬编码"),  # counted anew
        ("### 8. 丙\n回答：答丙", 4, "### 8. 丙 回答：答丙"),
        ("乙\n\n### 3 \n丙", 6, "### 3"),
        ("**Q8: 丙？**\n丙", 4, "**Q8: 丙？**"),
        ("A8: 答丙", 4, "A8: 答丙"),
        ("### 1. 丙\n答：答丙", 4, "### 1. 丙 答：答丙"),
    ]:
        with subtests.test(part=part):
            found = read(
                tmp_path, "a.md", f"### Q7: 甲\nA7: 答甲\n\n{part}\n\n### Q9: 丁\nA9: 答丁\n"
            )
            assert [sample.question for sample in found.samples] == ["甲", "丁"]
            assert found.samples[0].answer.endswith(part)
            assert remarks(found) == [(line, f"“{shown}” is read as part of the answer to Q7")]


def test_parts_of_an_answer_are_its_own(tmp_path, subtests):
    for part in [
        "### 1. 背景\n甲\n### 2. 做法\n乙\n### 8. 结语",
        "### 问题描述\n甲\n### 第一步\n乙",
        "```\n### 8. 注释\nA8: 注释\n```",
        "因此\n答案: B\na8: 首项\n### 选项\nA: RSA",
    ]:
        with subtests.test(part=part):
            found = read(tmp_path, "a.md", f"### Q7: 甲\nA7: 答甲\n\n{part}\n")
            assert found.samples[0].answer == f"答甲\n\n{part}"
            assert not found.remarks


def test_questions_of_other_names_inside_the_reasoning_or_before_the_first(tmp_path):
    thinking = "## 分析\n### 问题8：一\n答：甲\n### 问题9：二\n答：乙"
    text = f"# 题\n### 3. 丢\n答：失\n\n### Q7: 问\n<think>\n{thinking}\n</think>\nA7: 答\n"
    found = read(tmp_path, "a.md", text)
    assert [texts(sample) for sample in found.samples] == [("问", thinking, "答")]
    assert remarks(found) == [(2, "“### 3. 丢 答：失” is not read as a question")]


def test_lower_case_and_bare_markers_cut_no_question(tmp_path):
    text = "### Q7: 数列\na1: 2\na2: 3\nA: 选项\n答：和为5\n\nA9: 别的\n"
    sample = read(tmp_path, "a.md", text).samples[0]
    assert texts(sample)[::2] == ("数列\na1: 2\na2: 3\nA: 选项", "和为5\n\nA9: 别的")


@pytest.mark.parametrize("answer", ["A1: 答甲", "答甲"])
def test_tags_in_the_next_section_are_not_the_answers(tmp_path, answer):
    for section in ("说明<think>标签", "<think>\n想\n</think>\n答: 乙", "</thinking>"):
        text = f"### Q1: 甲\n{answer}\n\n# 第二章\n{section}\n\n### Q2: 乙\nA2: 答乙\n"
        found = read(tmp_path, "a.md", text)
        assert [texts(s) for s in found.samples] == [("甲", "", "答甲"), ("乙", "", "答乙")]
        assert not any("empty thinking" in text for _, text in remarks(found))
        assert remarks(found)[-1] == (1, "text under “# 第二章” belongs to no question")


def test_full_width_tags_in_markdown_are_told(tmp_path):
    found = read(tmp_path, "a.md", PLAIN.replace("<", "＜").replace(">", "＞"))
    assert "Q1: ＜think＞ with full-width brackets" in found.remarks[0].text
