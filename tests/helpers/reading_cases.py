"""The cases of `tests/readers/cases/*.toml`: small inputs as people have them, and what becomes of each."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.common.errors import UserError
from finetuning.readers.dataset import read_samples

CASES = Path(__file__).resolve().parents[1] / "readers" / "cases"


@dataclass(frozen=True)
class Case:
    """One input and its outcome."""

    theme: str
    title: str
    files: dict[str, Any]
    """Name to content: text, or a table by its form (`encoding`, `sheets`, `paragraphs`, `rows`, `bytes`)."""
    expected: dict[str, Any]
    columns: dict[str, str]

    def write(self, folder: Path) -> Path:
        """Write the input; what is given as `--data-path`: the file, or the folder of several."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
        names = list(self.files)
        return folder / names[0] if len(names) == 1 else folder

    def outcome(self, folder: Path) -> dict[str, Any]:
        """What becomes of it: samples, and what is told, as `expected` has them."""
        path = self.write(folder)
        try:
            found = read_samples([str(path)], columns=self.columns or None)
        except UserError as error:
            return {"error": str(error).replace(f"{folder}/", "").replace(str(folder), "FOLDER")}
        shown = {"samples": [_fields(sample) for sample in found.samples]}
        for kind in ("broken", "remarks"):
            told = [str(item).replace(f"{folder.as_posix()}/", "") for item in getattr(found, kind)]
            shown.update({kind: told} if told else {})
        return shown


def _fields(sample: Any) -> dict[str, Any]:
    names = ("question", "thinking", "answer", "system", "tools", "difficulty")
    fields = {name: value for name in names if (value := getattr(sample, name))}
    for name in ("history", "tool_turns", "tool_calls"):
        if value := getattr(sample, name):
            fields[name] = json.dumps(value, ensure_ascii=False)
    return fields


def write_file(path: Path, content: Any) -> None:
    """Write a file as its content says."""
    if isinstance(content, str):
        path.write_bytes(content.encode())
    elif "encoding" in content:
        path.write_bytes(content["text"].encode(content["encoding"]))
    elif "bytes" in content:
        path.write_bytes(bytes.fromhex(content["bytes"]))
    elif "sheets" in content:
        _write_excel(path, content["sheets"])
    elif "paragraphs" in content:
        _write_word(path, content["paragraphs"])
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(content["rows"]), path)


def _write_excel(path: Path, sheets: dict[str, list[list[Any]]]) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)


def _write_word(path: Path, paragraphs: list[Any]) -> None:
    """A paragraph is a text, [style, text] (`bold` is none of Word's), or a table as a list of rows."""
    import docx

    document = docx.Document()
    for item in paragraphs:
        if isinstance(item, str):
            document.add_paragraph(item)
        elif isinstance(item[0], list):
            table = document.add_table(rows=len(item), cols=len(item[0]))
            for row, cells in zip(table.rows, item, strict=True):
                for cell, text in zip(row.cells, cells, strict=True):
                    cell.text = text
        elif item[0] == "bold":
            document.add_paragraph().add_run(item[1]).bold = True
        else:
            document.add_paragraph(item[1], style=item[0])
    document.save(path)


def all_cases() -> list[Case]:
    """Every case, in the order of the files and of their places there."""
    found = []
    for path in sorted(CASES.glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for case in content["case"]:
            made = (case["files"], case["expected"], case.get("columns", {}))
            found.append(Case(content["theme"], case["title"], *made))
    return found
