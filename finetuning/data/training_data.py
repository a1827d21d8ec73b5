"""Raw files to everything the loop and the reports need of the data: samples, split, tokens, groups."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from finetuning.analysis.duplicates import Leaks, find_leaks
from finetuning.analysis.facts import facts_version
from finetuning.analysis.sample_groups import Groups, loss_groups
from finetuning.analysis.statistics import DatasetStatistics, compute_statistics
from finetuning.common.errors import UserError
from finetuning.common.files import atomic_write_text, strict, write_json
from finetuning.common.text import clean_line
from finetuning.data.split import Split, eval_sources
from finetuning.data.token_table import TokenizedSamples
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.dataset import SampleSet, read_samples
from finetuning.readers.sample import BrokenSample, Sample


@dataclass(frozen=True)
class DataPart:
    """The training or the held-out part: which documents of a table, their samples, their groups."""

    samples: Sequence[Sample]
    tokens: TokenizedSamples
    documents: np.ndarray  # (m,) rows of `tokens`; a weighted source may appear several times
    groups: Groups  # labels of all rows of `tokens`

    def __len__(self) -> int:
        return len(self.documents)

    def sample(self, document: int) -> Sample:
        """The sample that a document was made of."""
        return self.samples[int(self.tokens.sample_index[document])]

    def place(self, document: int) -> str:
        """`file:line` and id of a document's sample, for messages."""
        sample = self.sample(document)
        return f"{clean_line(sample.source)}:{sample.line} ({sample.id})"


@dataclass(frozen=True)
class TrainingData:
    """What `prepare_data` returns."""

    split: Split
    train: DataPart
    held_out: DataPart
    max_seq_length: int
    workers: int
    cache_dir: Path | None = None

    @cached_property
    def statistics(self) -> DatasetStatistics:
        """Statistics of everything that was read; computed when first asked for."""
        split, read, folder = self.split, self.split.read, None
        if self.cache_dir and read.key:
            folder = Path(self.cache_dir) / "sample_facts" / f"{read.key}-{facts_version()}"
        return compute_statistics(
            read.samples,
            held_out=split.held_out if split.eval_read is None else None,
            leaks=self._leaks_into_held_out_files(),
            tokens=self.train.tokens,
            max_seq_length=self.max_seq_length,
            workers=self.workers,
            broken=read.broken,
            clusters=split.clusters,
            facts_folder=folder,
        )

    def _leaks_into_held_out_files(self) -> Leaks | None:
        read, eval_read = self.split.read, self.split.eval_read
        if eval_read is None:
            return None
        fingerprint = f"{read.fingerprint}-{eval_read.fingerprint}"
        options = {"fingerprint": fingerprint, "cache_dir": self.cache_dir}
        return find_leaks(read.samples, eval_read.samples, **options)

    def write_reports(self, logs: Path) -> None:
        """dataset_statistics.json, broken_samples.jsonl and truncation.json in the run's log directory."""
        write_json(logs / "dataset_statistics.json", self.statistics.to_json())
        write_broken(logs / "broken_samples.jsonl", self.split.read.broken)
        write_json(logs / "truncation.json", asdict(self.train.tokens.ledger))


def read_data(
    data_path: Sequence[str],
    *,
    eval_path: Sequence[str] = (),
    max_broken_fraction: float = 0.1,
    **options: object,
) -> tuple[SampleSet, SampleSet | None]:
    """All samples, and those of held-out files of the user's. `options` are those of `read_samples`.
    Raises UserError where too much is broken."""
    read = read_samples(data_path, **options)
    check_broken(read, max_broken_fraction)
    return read, read_samples(eval_path, **options) if eval_path else None


def check_broken(read: SampleSet, max_fraction: float) -> None:
    """Refuse data of which too much can't be read, naming the first places."""
    total = len(read.samples) + len(read.broken)
    if len(read.broken) <= max_fraction * total:
        return
    places = "; ".join(f"{b.source}:{b.line} {b.reason}" for b in read.broken[:3])
    raise UserError(
        f"data: {len(read.broken)} of {total} samples are broken, more than max_broken_fraction "
        f"{max_fraction:g} allows. First: {places}. Mend them (--check-data lists all) or raise "
        "--max-broken-fraction"
    )


def prepare_data(
    split: Split,
    tokenizer: object,
    max_seq_length: int,
    *,
    workers: int,
    cache_dir: Path | None = None,
    **options: object,
) -> TrainingData:
    """Tokenize both parts and label their groups. `options` are those of `tokenize_samples`."""
    common = {"workers": workers, "cache_dir": cache_dir}
    sources = sorted({*split.read.samples_per_file, *eval_sources(split)})
    tokens = tokenize_samples(split.read, tokenizer, max_seq_length, **common, **options)
    groups = loss_groups(split.read, tokens.sample_index, sources, **common)
    train = DataPart(split.read.samples, tokens, tokens.documents_of(split.train), groups)
    if split.eval_read is None:
        documents = tokens.documents_of(split.held_out)
        held_out = DataPart(split.read.samples, tokens, documents, groups)
    else:
        samples = split.eval_read.samples
        tokens = tokenize_samples(split.eval_read, tokenizer, max_seq_length, **common, **options)
        groups = loss_groups(split.eval_read, tokens.sample_index, sources, **common)
        held_out = DataPart(samples, tokens, np.arange(len(tokens)), groups)
    if not len(train):
        raise UserError(
            f"data: none of {len(split.train)} samples fits in max_seq_length {max_seq_length} tokens; "
            "raise --max-seq-length or use --over-length truncate_thinking"
        )
    return TrainingData(split, train, held_out, max_seq_length, workers, cache_dir)


def write_broken(path: Path, broken: Sequence[BrokenSample]) -> None:
    """One JSON object a line: source, line, reason. Nothing is written where nothing is broken."""
    if broken:
        records = ({"source": b.source, "line": b.line, "reason": b.reason} for b in broken)
        lines = (json.dumps(strict(r), ensure_ascii=False, allow_nan=False) for r in records)
        atomic_write_text(path, "".join(line + "\n" for line in lines))
