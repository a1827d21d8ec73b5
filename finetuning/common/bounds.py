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


# ---- waiting ------------------------------------------------------------------------------------

SILENCE = Bound(
    10, "seconds", "the time without a line where there is no terminal (but with --quiet)",
    "a line says what is being done", "common/test_heartbeat.py::test_silence_is_broken",
)  # fmt: skip

# ---- news of a run ------------------------------------------------------------------------------

NOTICE = Bound(
    2048, "bytes", "a notice (--notify): what all services take", "it is cut",
    "monitoring/test_channels.py::test_a_long_notice_is_cut",
)  # fmt: skip
NOTICES = Bound(
    32, "notices", "notices that wait for a channel", "the oldest is dropped",
    "monitoring/test_notifier.py::test_the_queue_is_bounded",
)  # fmt: skip
NOTICE_ANSWER = Bound(
    2**16, "bytes", "what is read of a channel's answer", "the rest is not read",
    "monitoring/test_channels.py::test_an_endless_answer_is_left",
)  # fmt: skip
NOTICE_WAIT = Bound(
    10, "seconds", "the silence of a channel's server", "the notice is tried again",
    "monitoring/test_notifier.py::test_a_server_that_hangs_holds_up_nobody",
)  # fmt: skip
NOTICE_PATIENCE = Bound(
    600, "seconds", "the time in which a notice is tried again", "it is dropped, which is told once",
    "monitoring/test_notifier.py::test_what_never_arrives_is_dropped_and_told_once",
)  # fmt: skip
NOTICE_END = Bound(
    5, "seconds", "the wait for the last notices at the end of a run", "they are left, which is told",
    "monitoring/test_notifier.py::test_a_server_that_hangs_holds_up_nobody",
)  # fmt: skip

MIRROR_END = Bound(
    600, "seconds", "the wait for the last upload to a mirror at the end of a run",
    "it is left, which is told", "runs/test_mirror.py::test_a_target_that_hangs_is_left",
)  # fmt: skip

QUESTIONS_KEPT = Bound(
    2000, "questions", "held-out questions of which before.json and after.json keep the loss",
    "those between are not kept, which the report says",
    "evaluation/test_question_record.py::test_of_many_questions_some_of_all_places_are_kept",
)  # fmt: skip

# ---- models and templates -----------------------------------------------------------------------

HEADER = Bound(
    100 * _MIB, "bytes", "what a safetensors file says about its tensors",
    "the file is refused", "model/test_sizes.py::test_a_header_is_bounded",
)  # fmt: skip
MODEL_EXCESS = Bound(
    9, "times", "widths and weights that a config.json describes, against those in the files "
    "(packed weights hold eight in one)", "the model is refused before it is built",
    "model/test_sizes.py::test_what_no_tensor_comes_near_is_refused",
)  # fmt: skip
CARD_HEAD = Bound(
    10_000, "characters", "what is read of a base model's card for its licence",
    "the rest is not read", "runs/test_model_card.py::test_a_licence_far_down_is_not_looked_for",
)  # fmt: skip
TEMPLATE_CPU = Bound(
    5, "seconds", "a chat template's time for one conversation",
    "the run ends with the sample's place", "data/test_template_limits.py::test_a_sample_that_never_ends",
)  # fmt: skip
TEMPLATE_MEMORY = Bound(
    1024 * _MIB, "bytes", "a chat template's memory for one conversation",
    "the same", "data/test_template_limits.py::test_a_sample_that_fills_the_memory",
)  # fmt: skip
PROBE_WALL = Bound(
    30, "seconds", "the wait for a chat template or tokenizer that is tried in a process of its own",
    "refused", "data/test_template_probe.py::test_one_that_never_ends_is_refused",
)  # fmt: skip
TOKENIZER_CPU = Bound(
    20, "seconds", "a tokenizer's time to load, and to encode 13 samples evenly spaced from first to last",
    "the model is refused", "data/test_tokenizer_probe.py::test_one_that_never_ends_is_refused",
)  # fmt: skip
TOKENIZER_MEMORY = Bound(
    4096 * _MIB, "bytes", "a tokenizer's memory for the same",
    "the model is refused", "data/test_tokenizer_probe.py::test_one_that_fills_the_memory_is_refused",
)  # fmt: skip
TOKENIZER_TEXT = Bound(
    100_000, "characters", "the beginning of a sample that a tokenizer is tried with",
    "the rest is not tried", "data/test_tokenizer_probe.py::test_of_long_samples_a_beginning_is_tried",
)  # fmt: skip

# ---- what is shown of a run ---------------------------------------------------------------------

CURVE_FILE = Bound(
    256 * _MIB, "bytes", "a log of another tool that is read whole: trainer_state.json, what a run printed",
    "the file is refused", "monitoring/test_convergence.py::test_a_log_that_is_read_whole_is_bounded",
)  # fmt: skip
CURVE_LINE = Bound(
    100_000, "characters", "a line of a CSV of losses",
    "the file is refused", "monitoring/test_convergence.py::test_a_line_of_csv_is_bounded",
)  # fmt: skip
CURVE_COLUMNS = Bound(
    500, "columns", "the course of one tag of a run that is read back: lowest and highest of each are kept",
    "neighbours become one", "runs/test_series.py::test_memory_stays_and_no_spike_is_lost",
)  # fmt: skip
CURVES = Bound(
    1000, "tags", "tags of a run that are read back",
    "left out, and told", "runs/test_series.py::test_more_tags_than_are_read_are_told",
)  # fmt: skip
SHOWN_ALERTS = Bound(
    500, "alerts", "alerts that a report lists", "the newest are listed, all are counted",
    "runs/test_series.py::test_of_many_alerts_the_newest_are_shown",
)  # fmt: skip
REPORT_MEMORY = Bound(
    2048 * _MIB, "bytes", "memory of the process that writes a report at the end of a run",
    "no report, which is told; the run is as it was",
    "runs/test_report.py::test_a_report_that_fails_harms_no_run",
)  # fmt: skip
REPORT_CPU = Bound(
    300, "seconds", "processor time of that process", "the same",
    "runs/test_report.py::test_a_report_that_fails_harms_no_run",
)  # fmt: skip
REPORT_WALL = Bound(
    600, "seconds", "the wait for it", "the same",
    "runs/test_report.py::test_a_report_that_fails_harms_no_run",
)  # fmt: skip

# ---- commands of alerts -------------------------------------------------------------------------

ACTION_TIME = Bound(
    60, "seconds", "a command that an alert starts", "it and what it started are ended, which is told",
    "monitoring/test_alert_command.py::test_a_command_that_hangs_is_ended_with_what_it_started",
)  # fmt: skip
ACTION_OUTPUT = Bound(
    _MIB, "bytes", "what it writes to standard error", "the same",
    "monitoring/test_alert_command.py::test_a_command_that_says_too_much_is_ended",
)  # fmt: skip
ACTION_END = Bound(
    5, "seconds", "the wait for it at the end of a run (none after a signal)", "the same",
    "monitoring/test_alert_command.py::test_the_end_of_a_run_waits_for_commands_a_little",
)  # fmt: skip

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
    "the file is refused", "readers/test_bounds.py::test_tags_and_paragraphs_are_bounded",
)  # fmt: skip
PARAGRAPHS = Bound(
    200_000, "paragraphs", "a Word file",
    "the file is refused", "readers/test_bounds.py::test_tags_and_paragraphs_are_bounded",
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
