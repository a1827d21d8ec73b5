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
DOCUMENT = Bound(
    256 * _MIB, "bytes", "what an Excel or Word file unpacks to",
    "the file is refused", "readers/test_office.py::test_what_a_file_unpacks_to_is_bounded",
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
