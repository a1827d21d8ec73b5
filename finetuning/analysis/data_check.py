"""What is wrong with training data, by kind and by file and line: the answer of --check-data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning.analysis.statistics import DatasetStatistics
from finetuning.common.files import atomic_write_text
from finetuning.common.terminal import Terminal
from finetuning.common.text import clean_line
from finetuning.data.accounts import Accounts, account_rows
from finetuning.data.training_data import TrainingData

# Kinds that lose samples or falsify the held-out loss: with one of them the check fails.
SERIOUS = ("broken", "dropped", "control token", "leak")
SHOWN = 3  # faults of a kind on the terminal; all of them are in the file


@dataclass(frozen=True, order=True)
class Fault:
    """One trouble of one sample."""

    source: str
    line: int
    kind: str
    note: str

    def __str__(self) -> str:
        return f"{clean_line(self.source)}:{self.line}: {self.kind}: {clean_line(self.note, 300)}"


@dataclass(frozen=True)
class FaultKind:
    """All faults of a kind, the worst first; of some kinds only the first few hundred are known by name."""

    name: str
    total: int
    faults: tuple[Fault, ...]

    def lines(self, at_most: int | None = None) -> Iterator[str]:
        """A line for each fault, and one that says how many are not shown."""
        shown = self.faults[:at_most]
        yield from map(str, shown)
        if self.total > len(shown):
            yield f"  … and {self.total - len(shown):,} more of {self.total:,} {self.name}"


def data_faults(
    data: TrainingData, statistics: DatasetStatistics, accounts: Sequence[Accounts]
) -> list[FaultKind]:
    """All kinds of faults that there are, the serious ones first."""
    found = [fault for account in accounts for fault in _of_files(account, data.max_seq_length)]
    kinds = {name: [] for name in (*SERIOUS, *sorted({fault.kind for fault in found}))}
    for fault in dict.fromkeys(found):
        kinds[fault.kind].append(fault)
    result = {name: FaultKind(name, len(faults), tuple(faults)) for name, faults in kinds.items()}
    result |= {kind.name: kind for kind in _repetitions(statistics)}
    return [kind for kind in result.values() if kind.total]


def check_data(
    data: TrainingData,
    statistics: DatasetStatistics,
    accounts: Sequence[Accounts],
    terminal: Terminal,
    *,
    quiet: bool,
) -> int:
    """Print what became of the data, unless quiet, and the worst faults of each kind; the rest, with the
    statistics, goes into a file of the cache. 1 if something serious is wrong, else 0."""
    kinds = data_faults(data, statistics, accounts)
    if not quiet:
        terminal.table("Data", account_rows(accounts))
    for warning in (warning for account in accounts for warning in account.warnings()):
        terminal.warning(warning)
    lines = [line for kind in kinds for line in kind.lines(SHOWN)]
    if data.cache_dir:
        path = Path(data.cache_dir) / "checks" / f"{data.split.read.fingerprint}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, report_text(kinds, statistics, accounts))
        where = f"all findings and the statistics: {path}"
        if kinds:
            lines.append(where)
        else:
            terminal.info(where)
    terminal.final("\n".join([*lines, summary(kinds, len(data.split.read.samples))]))
    return 0 if is_good(kinds) else 1


def is_good(kinds: Iterable[FaultKind]) -> bool:
    """Whether every sample is used as it is and none leaks."""
    return not any(kind.name in SERIOUS for kind in kinds)


def summary(kinds: Iterable[FaultKind], samples: int) -> str:
    """One line: how many of which kind, the serious ones first."""
    found = ", ".join(f"{kind.total} {kind.name}" for kind in kinds) or "nothing to complain of"
    return f"{samples} samples: {found}"


def report_text(
    kinds: Iterable[FaultKind], statistics: DatasetStatistics, accounts: Sequence[Accounts]
) -> str:
    """Markdown: the accounts, every finding by kind, and the statistics."""
    rows = (f"- {name}: {text}" for name, text in account_rows(accounts))
    parts = ["# What became of the data\n\n" + "\n".join(rows)]
    for kind in kinds:
        lines = "\n".join(
            f"    {line}" for line in kind.lines()
        )  # indented: no markup of the data's
        parts.append(f"## {kind.total} {kind.name}\n\n{lines}")
    return "\n\n".join([*parts, statistics.summary_markdown()])


def _of_files(account: Accounts, limit: int) -> Iterator[Fault]:
    """What is told of the files' samples: records that are lost, and those that are used otherwise."""
    for record in account.broken:
        yield Fault(record.source, record.line, "broken", record.reason)
    yield from _lengths(account, limit)
    for remark in account.read.remarks:
        yield Fault(remark.source, remark.line, "remark", remark.text)


def _lengths(account: Accounts, limit: int) -> Iterator[Fault]:
    """What the tokens tell less of than the file, the longest first."""
    report = account.report
    lengths = dict(zip(report.truncated, report.long_lengths, strict=True))
    kinds = {
        "dropped": (report.dropped, f"longer than max_seq_length {limit}; left out"),
        "shortened": (
            report.shortened,
            f"longer than max_seq_length {limit}; the middle of its thinking is left out",
        ),
        "control token": (report.control_tokens, "its text spells a control token"),
        "no thinking": (report.without_thinking, "teaches to answer without thinking"),
    }
    of_id = {kind: set(ids) for kind, (ids, _) in kinds.items()}
    if not any(of_id.values()):
        return  # large data are not read once more for nothing
    found: list[tuple[int, Fault]] = []
    for sample in account.read.samples:
        for kind, ids in of_id.items():
            if sample.id in ids:
                length = lengths.get(sample.id, 0) if kind in ("dropped", "shortened") else 0
                note = f"{length} tokens, {kinds[kind][1]}" if length else kinds[kind][1]
                found.append((-length, Fault(sample.source, sample.line, kind, note)))
    for _, fault in sorted(found):
        yield fault


def _repetitions(statistics: DatasetStatistics) -> Iterator[FaultKind]:
    """Duplicates, conflicts and leaks: counted all, the first 200 of each kind by name."""
    findings, duplicates = statistics.to_json()["findings"], statistics.duplicates
    kinds = {
        "train_eval_leaks": ("leak", duplicates.leaks or 0),
        "exact_duplicates": ("duplicate", duplicates.exact),
        "near_duplicates": ("near duplicate", duplicates.near),
        "conflicting_answers": ("conflict", duplicates.conflicting_questions),
        "citation_conflicts": ("citation", statistics.facts.counts["citation_conflicts"]),
    }
    for name, (kind, total) in kinds.items():
        faults = [Fault(f["source"], f["line"], kind, f["note"]) for f in findings.get(name, ())]
        yield FaultKind(kind, max(total, len(faults)), tuple(faults))
