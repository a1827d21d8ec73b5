"""What is wrong with training data, by kind and by file and line: the answer of --check-data."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetuning.analysis.statistics import DatasetStatistics
from finetuning.common.cache import kept_in
from finetuning.common.files import atomic_write_text
from finetuning.common.language import translated
from finetuning.common.terminal import Terminal
from finetuning.data.accounts import Accounts, account_rows
from finetuning.data.token_table import less_of
from finetuning.data.training_data import TrainingData
from finetuning.readers.sample import Finding, NothingLeftError

# Kinds that lose samples or falsify the held-out loss: with one of them the check fails.
SERIOUS = ("broken", "dropped", "control token", "leak")
SHOWN = 3  # findings of a kind on the terminal; all of them are in the file


@dataclass(frozen=True)
class FaultKind:
    """All findings of a kind, the worst first; of some kinds only the first few hundred are known by name."""

    name: str
    total: int
    findings: tuple[Finding, ...]

    def lines(self, at_most: int | None = None) -> Iterator[str]:
        """A line for each finding, and one that says how many are not shown."""
        shown = self.findings[:at_most]
        yield from map(str, shown)
        if self.total > len(shown):
            yield f"  … and {self.total - len(shown):,} more of {self.total:,} {self.name}"


def data_faults(
    data: TrainingData, statistics: DatasetStatistics, accounts: Sequence[Accounts]
) -> list[FaultKind]:
    """All kinds of faults that there are, the serious ones first."""
    found = [one for account in accounts for one in _of_files(account, data.max_seq_length)]
    result = {kind.name: kind for kind in _by_kind(found)}
    result |= {kind.name: kind for kind in _repetitions(statistics)}
    return [kind for kind in result.values() if kind.total]


def _by_kind(found: Iterable[Finding]) -> list[FaultKind]:
    """The serious kinds first, whether there are any or not."""
    kinds: dict[str, list[Finding]] = {name: [] for name in SERIOUS}
    for finding in dict.fromkeys(found):
        kinds.setdefault(finding.kind, []).append(finding)
    others = sorted(kinds.keys() - set(SERIOUS))
    return [FaultKind(name, len(kinds[name]), tuple(kinds[name])) for name in (*SERIOUS, *others)]


class Inputs(Protocol):
    """What is checked."""

    data: TrainingData
    accounts: Sequence[Accounts]

    @property
    def statistics(self) -> DatasetStatistics:
        """What is in the data."""


def check_data(
    load: Callable[[], Inputs], terminal: Terminal, cache_dir: Path, *, quiet: bool
) -> int:
    """Print what became of the data, unless quiet, and the worst faults of each kind; the rest, with the
    statistics, goes into a file of the cache. 1 if something serious is wrong, else 0."""
    try:
        found = load()
    except NothingLeftError as error:
        return _nothing_left(error, terminal, cache_dir)
    data, statistics, accounts = found.data, found.statistics, found.accounts
    kinds = data_faults(data, statistics, accounts)
    if not quiet:
        terminal.table("Data", account_rows(accounts))
    for warning in (warning for account in accounts for warning in account.warnings()):
        terminal.warning(warning)
    lines = [line for kind in kinds for line in kind.lines(SHOWN)]
    text = report_text(kinds, statistics, accounts)
    where = (
        f"all findings and the statistics: {_written(cache_dir, data.split.read.fingerprint, text)}"
    )
    if kinds:
        lines.append(where)
    else:
        terminal.info(where)
    terminal.final("\n".join([*lines, summary(kinds, len(data.split.read.samples))]))
    return 0 if is_good(kinds) else 1


def _written(cache_dir: Path, name: str, text: str) -> Path:
    """Where the report of a check is, below the cache."""
    path = Path(cache_dir) / "checks" / f"{name}.md"
    with kept_in(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    return path


def _nothing_left(error: NothingLeftError, terminal: Terminal, cache_dir: Path) -> int:
    """Print why no sample is left, of a file or of all: the first findings of each kind; all are in a file of
    the cache. Always 1."""
    kinds = [kind for kind in _by_kind(error.findings) if kind.total]
    lines = [line for kind in kinds for line in kind.lines(SHOWN)]
    text = "\n\n".join(_sections(kinds))
    name = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    lines.append(f"all findings: {_written(cache_dir, name, text)}")
    counts = ", ".join(f"{kind.total} {kind.name}" for kind in kinds)
    terminal.final("\n".join([*lines, f"nothing to train on: {counts}"]))
    terminal.error(str(error))
    return 1


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
    rows = (f"- {translated(name)}: {translated(text)}" for name, text in account_rows(accounts))
    parts = [f"# {translated('What became of the data')}\n\n" + "\n".join(rows)]
    return "\n\n".join([*parts, *_sections(kinds), statistics.summary_markdown()])


def _sections(kinds: Iterable[FaultKind]) -> Iterator[str]:
    """Every finding by kind; indented, so that nothing of the data is markup."""
    for kind in kinds:
        lines = "\n".join(f"    {translated(line)}" for line in kind.lines())
        yield f"## {translated(f'{kind.total} {kind.name}')}\n\n{lines}"


def _of_files(account: Accounts, limit: int) -> Iterator[Finding]:
    """What is told of the files' samples: records that are lost, and those that are used otherwise."""
    for record in account.broken:
        yield Finding(record.source, record.line, "broken", record.reason)
    yield from less_of(account.report, account.read.samples, limit, account.empty_thinking)
    for remark in account.read.remarks:
        yield Finding(remark.source, remark.line, "remark", remark.text)


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
        known = [Finding(f["source"], f["line"], kind, f["note"]) for f in findings.get(name, ())]
        yield FaultKind(kind, max(total, len(known)), tuple(known))
