"""How large things may get: one row for every limit, which the code that keeps it takes from here.

Input of strangers is bounded in bytes, characters, levels and seconds before it is held or worked on.
`SECURITY.md` shows this table (`scripts/update_bounds.py`); the tests name a row that no code cites, or whose
test is not there.
"""

from dataclasses import dataclass

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit, and what it holds."""

    limit: int
    unit: str
    what: str
    beyond: str
    """What becomes of input that is larger."""
    held_by: str
    """The test, `file::name` below `tests/`."""

    def __str__(self) -> str:
        """The limit with its unit; bytes in MiB where that is a whole number."""
        whole = self.unit == "bytes" and self.limit % _MIB == 0
        return f"{self.limit // _MIB:,} MiB" if whole else f"{self.limit:,} {self.unit}"


# ---- readers ------------------------------------------------------------------------------------

RECORD = Bound(
    16 * _MIB, "bytes", "a line of JSON or CSV, a value in a JSON array, a description of a folder",
    "broken, with its line", "readers/test_formats.py::test_overlong_line_is_skipped",
)  # fmt: skip
UNPACKED = Bound(
    128 * _MIB, "bytes", "what a compressed file gives, however small it is (.gz, .zst, Parquet, Arrow)",
    "the file is refused", "readers/test_bounds.py::test_a_bomb_is_refused",
)  # fmt: skip
EXPANSION = Bound(
    100, "times", "what a larger compressed file gives, by its own size (text gives 3 to 20 times)",
    "the file is refused", "readers/test_bounds.py::test_a_bomb_is_refused",
)  # fmt: skip
TEXT = Bound(
    64 * 2**20, "characters", "a text that is read whole: Markdown, .txt, Word",
    "the file is refused", "readers/test_bounds.py::test_texts_are_bounded",
)  # fmt: skip
LINES = Bound(
    1_000_000, "lines", "the same",
    "the file is refused", "readers/test_bounds.py::test_texts_are_bounded",
)  # fmt: skip
DOCUMENT = Bound(
    128 * _MIB, "bytes", "what an Excel or Word file unpacks to",
    "the file is refused", "readers/test_office.py::test_what_a_file_unpacks_to_is_bounded",
)  # fmt: skip
TAGS = Bound(
    4_000_000, "tags", "a Word file, which is held as a tree",
    "the file is refused", "readers/test_bounds.py::test_an_office_file_is_no_bomb",
)  # fmt: skip
PARAGRAPHS = Bound(
    200_000, "paragraphs", "a Word file",
    "the file is refused", "readers/test_bounds.py::test_an_office_file_is_no_bomb",
)  # fmt: skip
COLUMNS = Bound(
    4096, "columns", "a record, or the header of a table",
    "the record is broken, the table refused", "readers/test_bounds.py::test_columns_are_bounded",
)  # fmt: skip
NAME = Bound(
    100, "characters", "the part of a column's name that is understood",
    "the rest of the name says nothing", "readers/test_bounds.py::test_names_are_bounded",
)  # fmt: skip
NAMES = Bound(
    2**16, "characters", "names of one record whose meaning is kept for the next record like it",
    "it is found out anew", "readers/test_bounds.py::test_names_are_bounded",
)  # fmt: skip
BROKEN = Bound(
    100_000, "records", "what is broken in 16 MiB of JSON lines, or in one other file",
    "the file is refused", "readers/test_bounds.py::test_broken_records_are_bounded",
)  # fmt: skip
OPEN_FILES = Bound(
    64, "files", "files of samples that are open at once, however many files or bytes were read",
    "each of them holds more", "readers/test_bounds.py::test_many_files_need_few_open_ones",
)  # fmt: skip
DEPTH = Bound(
    64, "levels", "lists and objects inside each other in tools and their calls",
    "the record is broken", "readers/test_records.py::test_broken_lines_are_listed",
)  # fmt: skip


BOUNDS = {name: value for name, value in globals().items() if isinstance(value, Bound)}
"""All of them by name."""


def table() -> str:
    """The rows as a Markdown table."""
    rows = [f"| {b.what} | {b} | {b.beyond} | `tests/{b.held_by}` |" for b in BOUNDS.values()]
    return "\n".join(["| what | at most | beyond it | held by |", "|---|---|---|---|", *rows])
