"""Excel and Word files that are damaged, hostile or merely large, beside those of the cases."""

import zipfile

import openpyxl
import pytest

from finetuning.common.bounds import DOCUMENT
from finetuning.common.errors import UserError
from finetuning.readers.dataset import read_samples
from tests.helpers.reading_cases import write_file

ROWS = [["问题", "答案"], ["SM3输出多少比特？", "256比特。"]]


def test_what_a_file_unpacks_to_is_bounded(tmp_path):
    """A bomb says how large it is; `zipfile` gives no more than what a part says."""
    for name in ("a.xlsx", "a.docx"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("[Content_Types].xml", "<Types/>")
            with archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as part:
                for _ in range(DOCUMENT.limit // 2**20 + 1):
                    part.write(bytes(2**20))
        assert (tmp_path / name).stat().st_size < 2**20
        with pytest.raises(UserError, match=r"unpacks to 129 MiB, more than 128 MiB"):
            read_samples([str(tmp_path / name)])


def test_a_part_that_lies_about_its_size_gives_no_more(tmp_path):
    """The size in the archive's directory is set to a hundredth."""
    path = tmp_path / "a.xlsx"
    write_file(path, {"sheets": {"问答": [ROWS[0], *(ROWS[1:] * 5000)]}})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("xl/worksheets/sheet1.xml").file_size
    at = data.rfind(size.to_bytes(4, "little"))
    data[at : at + 4] = (size // 100).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.xlsx can't be read"):
        read_samples([str(path)])


def test_damaged_files_are_refused_by_name(tmp_path, subtests):
    contents = {
        "a.xlsx": {"sheets": {"问答": ROWS}},
        "a.docx": {"paragraphs": ["问：甲", "答：乙"]},
    }
    for name, content in contents.items():
        path = tmp_path / name
        write_file(path, content)
        whole = path.read_bytes()
        for cut in (0.1, 0.5, 0.95):
            with subtests.test(name=name, cut=cut), pytest.raises(UserError, match=name) as error:
                path.write_bytes(whole[: int(cut * len(whole))])
                read_samples([str(path)])
            assert "\n" not in str(error.value)


def test_a_stray_format_far_down_costs_nothing(tmp_path):
    book = openpyxl.Workbook()
    for row in ROWS:
        book.active.append(row)
    book.active.cell(1_000_000, 500).number_format = "0.00"
    book.save(tmp_path / "a.xlsx")
    assert len(read_samples([str(tmp_path / "a.xlsx")]).samples) == 1


def test_numbers_dates_and_formulas_are_what_a_reader_sees(tmp_path):
    import datetime

    book = openpyxl.Workbook()
    book.active.append(["问题", "答案"])
    for value in (32, 0.5, 4.0, True, datetime.date(2021, 3, 9), "=1+1"):
        book.active.append(["问", value])
    book.save(tmp_path / "a.xlsx")
    found = read_samples([str(tmp_path / "a.xlsx")])
    assert [s.answer for s in found.samples] == ["32", "0.5", "4", "TRUE", "2021-03-09 00:00:00"]
    assert [(b.line, b.reason) for b in found.broken] == [(7, "empty answer")]  # never calculated
