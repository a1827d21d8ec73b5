"""Generated records, and files of every form that hold them."""

import csv
import io
import json
from pathlib import Path

from hypothesis import strategies as st

from finetuning.common.errors import UserError
from finetuning.readers.dataset import SampleSet, read_samples
from finetuning.readers.values import NOTHING, is_absent, is_switch
from tests.helpers.reading_cases import write_file

HANZI = "密钥算法分组杂凑签名证书验证输出比特长度标准随机数加密解密协议身份鉴别"
SENTENCE = st.text(HANZI, min_size=6, max_size=30).map(lambda text: text + "。")
# Whatever a spreadsheet, a CSV and JSON can all hold; a word such as `on`, `nan` or `-` stands for no text.
ANY_TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"], include_characters="\n\t"),
    min_size=1,
    max_size=40,
).filter(
    lambda text: (
        text.strip()
        and not text.lstrip().startswith("=")
        and "_x" not in text
        and not (is_absent(text) or is_switch(text) or text.strip() in NOTHING)
    )
)
RECORD = st.fixed_dictionaries({"question": ANY_TEXT, "thinking": ANY_TEXT, "answer": ANY_TEXT})
LINES = st.lists(SENTENCE, min_size=1, max_size=3).map("\n".join)
PLAIN = st.fixed_dictionaries({"question": SENTENCE, "thinking": LINES, "answer": LINES})
NAMES = st.one_of(
    st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12),
    st.text("甲乙丙丁戊己庚辛壬癸子丑寅卯", min_size=1, max_size=5),
).filter(lambda name: name.strip("_") and len(name.strip("_")) > 1)


def written(folder: Path, form: str, records: list[dict]) -> Path:
    """The records as a file of a form."""
    path, names = folder / f"a.{form}", list(records[0])
    records = [{name: record[name] for name in names} for record in records]
    if form == "jsonl":
        write_file(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    elif form == "json":
        write_file(path, json.dumps({"data": records}, ensure_ascii=False, indent=1))
    elif form == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(names)
        writer.writerows(record.values() for record in records)
        write_file(path, out.getvalue())
    elif form == "xlsx":
        rows = [list(record.values()) for record in records]
        write_file(path, {"sheets": {"问答": [names, *rows]}})
    elif form in ("messages", "sharegpt"):
        path = folder / f"{form}.jsonl"
        lines = map(_messages if form == "messages" else _sharegpt, records)
        write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    elif form == "parquet":
        write_file(path, {"rows": records})
    else:
        _write_text(path, form, records)
    return path


def _messages(record: dict) -> dict:
    final = {
        "role": "assistant",
        "content": record["answer"],
        "reasoning_content": record["thinking"],
    }
    return {"messages": [{"role": "user", "content": record["question"]}, final]}


def _sharegpt(record: dict) -> dict:
    said = f"<think>\n{record['thinking']}\n</think>\n\n{record['answer']}"
    turns = [{"from": "human", "value": record["question"]}, {"from": "gpt", "value": said}]
    return {"conversations": turns}


def _write_text(path: Path, form: str, records: list[dict]) -> None:
    if form == "docx":
        labels = {"question": "问", "thinking": "思考", "answer": "答"}
        lines = [f"{label}：{r[name]}" for r in records for name, label in labels.items()]
        write_file(path, {"paragraphs": [line for text in lines for line in text.split("\n")]})
    elif form == "txt":
        blocks = [
            f"{i}、问：{r['question']}\n思考：{r['thinking']}\n答：{r['answer']}\n"
            for i, r in enumerate(records, 1)
        ]
        write_file(path, {"text": "\r\n".join(blocks), "encoding": "gb18030"})
    else:
        blocks = [
            f"**问题{i}：{r['question']}**\n\n**思考过程**：{r['thinking']}\n\n**答案**：{r['answer']}\n\n---\n"
            for i, r in enumerate(records, 1)
        ]
        write_file(path, "# 密评\n\n" + "\n".join(blocks))


def outcome(path: Path, **options) -> SampleSet | str:
    """What is read, or the error without the names of the files."""
    try:
        return read_samples([str(path)], **options)
    except UserError as error:
        return str(error)


def ids(found: SampleSet | str) -> list[str]:
    assert not isinstance(found, str), found
    return [sample.id for sample in found.samples]
