"""docs/data.md, written from the cases that the tests of the readers go through.

uv run python scripts/update_data_guide.py            rewrites the file
uv run python scripts/update_data_guide.py --check    exit code 1 where it is not up to date
"""

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetuning.common.bounds import DOCUMENT  # noqa: E402
from finetuning.common.text import clean_line  # noqa: E402
from finetuning.readers.records import SAMPLE_KEYS  # noqa: E402
from tests.helpers.reading_cases import Case, all_cases  # noqa: E402

GUIDE = ROOT / "docs" / "data.md"
HEAD = f"""# What is read, what is told, what is refused

`scripts/update_data_guide.py` writes this page from `tests/readers/cases/`, and the tests go through the
same cases: what stands here is what happens. `--check-data` shows all that is told, by file and line.

**How a column is understood.** A name is taken to words, whatever its case, separators, width and script
(`modelAnswer`, `MODEL-ANSWER`, `問題`). Its last telling word says what it holds: `answer_reasoning` and
`答案解析` are reasonings, `参考答案` is an answer. A name that is about a text (`question_id`, `答案长度`)
holds none. `--columns FIELD NAME` overrules all of this; the fields are
{", ".join(f"`{key}`" for key in SAMPLE_KEYS)}.

**What is told.** Every value that no reader used is told once a file, with an example, the longest text
first; numbers, ids, dates and addresses are not. So is everything that was read otherwise than it stands.
A record that can't be read is broken: it is left out and counted (`--max-broken-fraction`). A record that
says of itself that it is wrong or weighs nothing is left out and told. A file of which nothing can be
read ends the run with one line and exit code 2; in a folder, a text without a question is passed over and
told.

**What is not read.** `.xls`, `.doc`, `.pdf` and others are refused by name, with what to save them as. A
`.xlsx` or `.docx` may unpack to {DOCUMENT}. Data of the hub are given as
`hf://datasets/owner/name[:configuration][:split]`; no other path asks the hub. In a folder with files for
training and for tests only the former are read.

"""


def guide() -> str:
    """The whole page."""
    parts = [HEAD]
    for theme, cases in groupby(all_cases(), key=lambda case: case.theme):
        parts.append(
            f"## {theme}\n\n| what lies there | what becomes of it | what is told |\n|---|---|---|\n"
        )
        parts += [_row(case) for case in cases]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _row(case: Case) -> str:
    inputs = [f"`{name}`: {_content(content)}" for name, content in case.files.items()]
    flags = [f"`--columns {field} {name}`" for field, name in case.columns.items()]
    lies = "<br>".join([f"**{_escaped(case.title)}**", *flags, *inputs])
    expected = case.expected
    if "error" in expected:
        return f"| {lies} | refused | {_escaped(expected['error'])} |\n"
    became = "<br>".join(_sample(sample) for sample in expected["samples"])
    told = [f"broken: {text}" for text in expected.get("broken", [])] + expected.get("remarks", [])
    return f"| {lies} | {became} | {'<br>'.join(map(_escaped, told))} |\n"


def _content(content: Any) -> str:
    if isinstance(content, str):
        return _code(content)
    if "encoding" in content:
        return f"({content['encoding']}) {_code(content['text'])}"
    for name, form in (("sheets", "sheets"), ("paragraphs", "paragraphs"), ("rows", "rows")):
        if name in content:
            return f"({form}) {_code(str(content[name]))}"
    return "(bytes)"


def _code(text: str) -> str:
    text = clean_line(text.replace("\r\n", " ⏎ ").replace("\n", " ⏎ "), 160).removesuffix(" ⏎")
    return f"`` {text.replace('|', chr(92) + '|')} ``"


def _sample(sample: dict[str, Any]) -> str:
    names = {"question": "Q", "thinking": "T", "answer": "A", "system": "system"}
    shown = {names.get(name, name): value for name, value in sample.items()}
    return ", ".join(
        f"{name}: {_escaped(clean_line(str(value), 60))}" for name, value in shown.items()
    )


def _escaped(text: str) -> str:
    for mark in "\\|`*_<>[]":
        text = text.replace(mark, "\\" + mark)
    return text


def main() -> int:
    """Write the page, or check it."""
    text = guide()
    if "--check" in sys.argv[1:]:
        if GUIDE.read_text(encoding="utf-8") != text:
            print("docs/data.md is not up to date; run scripts/update_data_guide.py")
            return 1
        return 0
    GUIDE.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
