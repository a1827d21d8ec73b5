"""What is wrong with training data, sample by sample with file and line: the answer of --check-data."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetuning.analysis.report import print_report
from finetuning.analysis.statistics import DatasetStatistics
from finetuning.common.terminal import Terminal
from finetuning.common.text import clean_line
from finetuning.data.token_table import TruncationReport
from finetuning.data.training_data import TrainingData
from finetuning.readers.sample import BrokenSample, Remark, Sample

# Kinds that lose samples or falsify the held-out loss: with one of them the check fails.
SERIOUS = ("broken", "dropped", "control token", "leak")


@dataclass(frozen=True, order=True)
class Fault:
    """One trouble of one sample."""

    source: str
    line: int
    kind: str
    note: str

    def __str__(self) -> str:
        return f"{clean_line(self.source)}:{self.line}: {self.kind}: {clean_line(self.note, 300)}"


def data_faults(data: TrainingData, statistics: DatasetStatistics) -> list[Fault]:
    """All faults by place. Duplicates, conflicts and leaks: the first 200 of each kind."""
    split = data.split
    parts = [(split.read, data.train.tokens.truncation)]
    if split.eval_read is not None:
        parts.append((split.eval_read, data.held_out.tokens.truncation))
    faults = {fault for fault in _repetitions(statistics)}
    for read, truncation in parts:
        faults.update(_broken(read.broken), _remarks(read.remarks))
        faults.update(_lengths(read.samples, truncation, data.max_seq_length))
    return sorted(faults)


def check_data(
    data: TrainingData, statistics: DatasetStatistics, terminal: Terminal, *, quiet: bool
) -> int:
    """Print statistics, unless quiet, and everything that is wrong; 1 if something serious is, else 0."""
    if not quiet:
        print_report(statistics.to_json())
    faults = data_faults(data, statistics)
    count = len(data.split.read.samples)
    terminal.final("\n".join([*map(str, faults), summary(faults, count)]))
    return 0 if is_good(faults) else 1


def is_good(faults: Sequence[Fault]) -> bool:
    """Whether every sample is used as it is and none leaks."""
    return not any(fault.kind in SERIOUS for fault in faults)


def summary(faults: Sequence[Fault], samples: int) -> str:
    """One line: how many of which kind, the serious ones first."""
    counts = Counter(fault.kind for fault in faults)
    kinds = sorted(counts, key=lambda kind: (kind not in SERIOUS, kind))
    found = ", ".join(f"{counts[kind]} {kind}" for kind in kinds) or "nothing to complain of"
    return f"{samples} samples: {found}"


def _broken(records: Sequence[BrokenSample]) -> Iterator[Fault]:
    for record in records:
        yield Fault(record.source, record.line, "broken", record.reason)


def _remarks(remarks: Sequence[Remark]) -> Iterator[Fault]:
    """What was read otherwise than its author may have meant."""
    for remark in remarks:
        yield Fault(remark.source, remark.line, "remark", remark.text)


def _lengths(
    samples: Sequence[Sample], truncation: TruncationReport, limit: int
) -> Iterator[Fault]:
    """What the tokens tell less of than the file."""
    kinds = {
        "dropped": (truncation.dropped, f"longer than max_seq_length {limit}; left out"),
        "shortened": (
            truncation.shortened,
            f"longer than max_seq_length {limit}; the middle of its thinking is left out",
        ),
        "control token": (truncation.control_tokens, "its text spells a control token"),
        "no thinking": (truncation.without_thinking, "teaches to answer without thinking"),
    }
    of_id = {kind: set(ids) for kind, (ids, _) in kinds.items()}
    if not any(of_id.values()):
        return  # large data are not read once more for nothing
    for sample in samples:
        for kind, ids in of_id.items():
            if sample.id in ids:
                yield Fault(sample.source, sample.line, kind, kinds[kind][1])


def _repetitions(statistics: DatasetStatistics) -> Iterator[Fault]:
    findings = statistics.to_json()["findings"]
    kinds = {
        "train_eval_leaks": "leak",
        "exact_duplicates": "duplicate",
        "near_duplicates": "near duplicate",
        "conflicting_answers": "conflict",
        "citation_conflicts": "citation",
    }
    for name, kind in kinds.items():
        for found in findings.get(name, ()):
            yield Fault(found["source"], found["line"], kind, found["note"])
