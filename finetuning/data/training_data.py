"""Files, split and tokens in the order in which a run needs them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetuning.common.errors import UserError
from finetuning.common.fingerprint import text_digest
from finetuning.common.text import clean_line
from finetuning.config import NO_LIMIT, DataSettings
from finetuning.data.chat_template import chat_format
from finetuning.data.split import Split, replay_text, weighted_by_tokens
from finetuning.data.token_table import TokenizedSamples
from finetuning.data.tokenization import left_out, nothing_left, tokenize_samples
from finetuning.readers.dataset import Progress, SampleSet, read_samples
from finetuning.readers.sample import NothingLeftError, Sample

GENERAL_LENGTH = 1024  # tokens that a general text may have, however short the samples are cut


@dataclass(frozen=True)
class DataPart:
    """The training or the held-out part: which documents of a table, and their samples."""

    samples: Sequence[Sample]
    tokens: TokenizedSamples
    documents: np.ndarray  # (m,) rows of `tokens`; a weighted source may appear several times

    def __len__(self) -> int:
        return len(self.documents)

    def sample(self, document: int) -> Sample:
        """The sample that a document was made of."""
        return self.samples[int(self.tokens.sample_index[document])]

    def fingerprint(self) -> str:
        """Of the samples' content and their order."""
        return text_digest(*(sample.id for sample in self.samples))

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

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, held-out files of the user's included."""
        tables = {id(part.tokens): part.tokens.lengths for part in (self.train, self.held_out)}
        return np.concatenate([*tables.values()])

    @property
    def own_lengths(self) -> np.ndarray:
        """Of the user's documents: without general text for training."""
        tokens = self.train.tokens
        own = np.ones(len(tokens), bool)
        own[tokens.documents_of(self.split.general)] = False
        others = [self.held_out.tokens.lengths] * (self.held_out.tokens is not tokens)
        return np.concatenate([tokens.lengths[own], *others])

    def of_length(self, max_seq_length: int) -> "TrainingData":
        """The same, by a max_seq_length that no document is longer than."""
        assert self.lengths.max() <= max_seq_length, max_seq_length
        tables = {
            id(part.tokens): replace(part.tokens, max_seq_length=max_seq_length)
            for part in (self.train, self.held_out)
        }
        train, held_out = (
            replace(part, tokens=tables[id(part.tokens)]) for part in (self.train, self.held_out)
        )
        return replace(self, train=train, held_out=held_out, max_seq_length=max_seq_length)


def read_data(
    settings: DataSettings,
    *,
    workers: int = 1,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[SampleSet, SampleSet | None]:
    """All samples, and those of held-out files of the user's. Raises UserError where too much is broken."""

    def samples_of(paths: Sequence[str]) -> SampleSet:
        return read_samples(
            paths,
            columns=settings.columns or None,
            cache_dir=cache_dir,
            workers=workers,
            progress=progress,
        )

    general = (replay_text(),) if settings.replay else ()
    read = samples_of((*settings.data_path, *general))
    ours = sum(read.samples_per_file.get(path, 0) for path in general)
    check_broken(read, settings.max_broken_fraction, ours=ours)
    return read, samples_of(settings.eval_path) if settings.eval_path else None


def general_part(
    paths: Sequence[str],
    tokenizer: object,
    settings: DataSettings,
    warn: Callable[[str], None],
    most_tokens: int = 0,
    *,
    option: str = "",
    positions: int = NO_LIMIT,
    cache_dir: Path | None = None,
) -> DataPart:
    """General text by which forgetting is measured: the first documents of up to `most_tokens` (0: all), one
    at least.

    A model whose template knows no think block gets the answers alone. `warn` is told how many texts are left
    out. option: which one names the paths; none for text of the program's own, which has the program's own
    columns. positions: tokens that the model can take. cache_dir: keep the tokens there. Raises UserError,
    which names option and paths, where too many texts are broken, and NothingLeftError where none can be
    used.
    """
    place = f"{option} {_shown(paths)}".strip()
    read = read_samples(paths, columns=settings.columns if option else None)
    check_broken(read, settings.max_broken_fraction, place)
    knows_thinking = chat_format(tokenizer).close_id >= 0
    samples = [s if knows_thinking else replace(s, thinking="") for s in read.samples]
    rules = {"loss_on": "last_turn", "empty_thinking": "mask", "control_tokens": "split"}
    length = max(settings.most_tokens, min(GENERAL_LENGTH, positions))
    settings = replace(settings, max_seq_length=length, over_length="drop", **rules)
    with _named(place):
        tokens = tokenize_samples(samples, tokenizer, settings, cache_dir=cache_dir)
    lost = [f"{len(read.broken)} that can't be read"] if read.broken else []
    lost += [text for text, _ in left_out(tokens.truncation, settings)]
    if lost:
        total = len(samples) + len(read.broken)
        warn(f"{place}: left out of {total} texts: {', '.join(lost)}")
    ends = np.cumsum(tokens.lengths)
    count = max(1, int((ends <= most_tokens).sum())) if most_tokens else len(tokens)
    return DataPart(samples, tokens, np.arange(count))


def check_broken(
    read: SampleSet, max_fraction: float, place: str = "data", *, ours: int = 0
) -> None:
    """Refuse data of which too much can't be read, naming the first places. ours: samples that are the
    program's own, and do not count."""
    total = len(read.samples) - ours + len(read.broken)
    if len(read.broken) <= max_fraction * total:
        return
    places = "; ".join(f"{b.source}:{b.line} {b.reason}" for b in read.broken[:3])
    raise UserError(
        f"{place}: {len(read.broken)} of {total} samples are broken, more than max_broken_fraction "
        f"{max_fraction:g} allows. First: {places}. Mend them (--check-data lists all) or raise "
        "--max-broken-fraction"
    )


def prepare_data(
    split: Split,
    tokenizer: object,
    settings: DataSettings,
    *,
    workers: int = 1,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> TrainingData:
    """Tokenize both parts. Raises UserError where no training sample is short enough."""
    options = {"workers": workers, "cache_dir": cache_dir, "progress": progress}
    tokens = tokenize_samples(split.read, tokenizer, settings, **options)
    split = _weighed(split, tokens, settings)
    train = DataPart(split.read.samples, tokens, tokens.documents_of(split.train))
    if split.eval_read is None:
        documents = tokens.documents_of(split.held_out)
        held_out = DataPart(split.read.samples, tokens, documents)
    else:
        with _named(f"--eval-path {_shown(settings.eval_path)}"):
            own = tokenize_samples(split.eval_read, tokenizer, settings, **options)
        held_out = DataPart(split.eval_read.samples, own, np.arange(len(own)))
    if not len(train):
        raise nothing_left(split.read.samples, tokens.truncation, settings, len(held_out))
    return TrainingData(split, train, held_out, settings.most_tokens, workers, cache_dir)


def _weighed(split: Split, tokens: TokenizedSamples, settings: DataSettings) -> Split:
    """The split whose sources and general text have their shares of the tokens, where these are wanted."""
    by_tokens = settings.data_weights and settings.data_weights_by == "tokens"
    if not by_tokens and not settings.replay:
        return split
    of_samples = np.bincount(
        tokens.sample_index, weights=tokens.lengths, minlength=len(split.read.samples)
    )
    shares = zip(settings.data_path, settings.data_weights, strict=True) if by_tokens else ()
    train = weighted_by_tokens(split, dict(shares), settings.replay, of_samples)
    return replace(split, train=train)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Within it, where no sample is left the option and its files are named: they are not --data-path."""
    try:
        yield
    except NothingLeftError as error:
        raise NothingLeftError(f"{place}: {error}", error.findings) from error


def _shown(paths: Sequence[str]) -> str:
    return clean_line(", ".join(map(str, paths)), 200)
