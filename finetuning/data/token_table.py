"""The table of tokens: ids and segments of every document in flat arrays, in memory or mapped from a file."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np

from finetuning.common.files import write_json
from finetuning.readers.arrow_samples import give_back_pages
from finetuning.readers.sample import BrokenSample, Finding, Sample

EMPTY_BLOCK = {  # what becomes of the think block that a template may leave empty, by the setting
    "mask": "; an empty think block carries no loss",
    "train": "; an empty think block teaches the model not to think",
    "drop": "",
}
NUM_THINKING_BUCKETS = 10  # tenths of a chain of thought


class Segment(IntEnum):
    """What a token is part of; `carries_loss` says which segments are learnt."""

    PROMPT = 0
    THINKING = 1
    CLOSE = 2
    """`</think>`"""
    ANSWER = 3
    """From behind `</think>` on, the template's blank line included."""
    END = 4
    """The token that ends the turn, `<|im_end|>` for Qwen3."""


NUM_SEGMENTS = len(Segment)


def carries_loss(segments: np.ndarray | int) -> np.ndarray | bool:
    """The loss mask: every token carries loss but those of the prompt."""
    return segments != Segment.PROMPT


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """One document: ids int32 (T,), segments uint8 (T,), and which sample it was made from."""

    ids: np.ndarray
    segments: np.ndarray
    index: int


@dataclass(frozen=True)
class TruncationReport:
    """Ids of the samples that the tokens tell less of, or something else, than their files.

    A plain cut at `max_seq_length` would lose the `</think>`, (part of) the answer, or the end of those
    in the three `lost_` fields; no policy here does that. Every document counts, so a conversation
    with loss on all turns may be named more than once.
    """

    truncated: tuple[str, ...] = ()
    """Longer than max_seq_length."""
    lost_think_close: tuple[str, ...] = ()
    lost_answer: tuple[str, ...] = ()
    lost_eos: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    """Left out for their length."""
    shortened: tuple[str, ...] = ()
    """Kept with the middle of their reasoning taken out."""
    control_tokens: tuple[str, ...] = ()
    """Hold the text of a control token: left out, or with `split` kept as ordinary text."""
    without_thinking: tuple[str, ...] = ()
    """Kept, though there is no reasoning to learn."""
    empty_thinking: tuple[str, ...] = ()
    """Left out, as the template would give them an empty think block."""
    broken: tuple[BrokenSample, ...] = ()
    """Left out, as the chat template refuses them or loses something of them."""
    long_lengths: tuple[int, ...] = ()
    """Tokens of each document longer than max_seq_length."""
    assistant_turns: int = 0
    """Of all samples that became documents."""
    learnt_turns: int = 0
    """Those of them that became a document of their own, too long or not."""

    @classmethod
    def of(cls, stored: dict[str, list | int]) -> "TruncationReport":
        """From lists, as JSON and `TokenPart` hold them."""
        values = {k: v if isinstance(v, int) else tuple(v) for k, v in stored.items()}
        broken = (b if isinstance(b, BrokenSample) else BrokenSample(**b) for b in stored["broken"])
        return cls(**{**values, "broken": tuple(broken)})

    def without(self, samples: Sequence[Sample]) -> "TruncationReport":
        """What is said of all others. samples: of one assistant turn each."""
        ids, places = {s.id for s in samples}, {(s.source, s.line) for s in samples}
        if not ids:
            return self
        broken = tuple(one for one in self.broken if (one.source, one.line) not in places)
        lengths = zip(self.truncated, self.long_lengths, strict=True)
        left = {
            field.name: tuple(one for one in getattr(self, field.name) if one not in ids)
            for field in fields(self)
            if field.default == () and field.name not in ("broken", "long_lengths")
        }
        turns = len(samples) - (len(self.broken) - len(broken))
        return replace(
            self,
            **left,
            broken=broken,
            long_lengths=tuple(length for one, length in lengths if one not in ids),
            assistant_turns=self.assistant_turns - turns,
            learnt_turns=self.learnt_turns - turns,
        )


def less_of(
    report: TruncationReport, samples: Sequence[Sample], limit: int, empty_thinking: str
) -> Iterator[Finding]:
    """The samples of which less becomes tokens than their file holds, the longest first. `limit` and
    `empty_thinking` are the settings that the tokens were made with."""
    lengths = dict(zip(report.truncated, report.long_lengths, strict=True))
    kinds = {
        "dropped": (report.dropped, f"longer than max_seq_length {limit}; left out"),
        "shortened": (
            report.shortened,
            f"longer than max_seq_length {limit}; the middle of its thinking is left out",
        ),
        "control token": (report.control_tokens, "its text spells a control token"),
        "empty thinking": (report.empty_thinking, "has no thinking; left out"),
        "no thinking": (
            report.without_thinking,
            f"has no thinking to learn{EMPTY_BLOCK[empty_thinking]}",
        ),
    }
    of_id = {kind: set(ids) for kind, (ids, _) in kinds.items()}
    if not any(of_id.values()):
        return  # large data are not read once more for nothing
    found: list[tuple[int, Finding]] = []
    for sample in samples:
        for kind, ids in of_id.items():
            if sample.id in ids:
                length = lengths.get(sample.id, 0) if kind in ("dropped", "shortened") else 0
                note = f"{length} tokens, {kinds[kind][1]}" if length else kinds[kind][1]
                found.append((-length, Finding(sample.source, sample.line, kind, note)))
    yield from (finding for _, finding in sorted(found))


@dataclass(frozen=True, eq=False)
class TokenizedSamples(Sequence):
    """All documents in flat arrays; document i is [offsets[i], offsets[i + 1])."""

    ids: np.ndarray
    """int32 (total,)"""
    segments: np.ndarray
    """uint8 (total,)"""
    offsets: np.ndarray
    """int64 (n + 1,)"""
    sample_index: np.ndarray
    """int64 (n,): the sample each document was made from, ascending."""
    num_targets: np.ndarray
    """int64 (n,): tokens that carry loss."""
    truncation: TruncationReport
    close_id: int
    """Id of `</think>`, -1 where the tokenizer has no single token for it."""
    end_id: int
    """Id of the token that ends a turn."""
    max_seq_length: int
    segment_counts: np.ndarray | None = None
    """int32 (n, 5): tokens per document and segment; None: counted now."""
    asked_with: str = ""
    """The argument with which the chat template was asked for reasoning; empty where it needs none."""

    def __post_init__(self) -> None:
        if self.segment_counts is None:
            counts = _segment_counts(self.segments, self.lengths)
            object.__setattr__(self, "segment_counts", counts)

    def __len__(self) -> int:
        return len(self.sample_index)

    def __getitem__(self, i: int) -> TokenizedSample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        i %= len(self)
        for array in (self.ids, self.segments):
            if mapped := getattr(array, "_mmap", None):
                give_back_pages(mapped)  # or an epoch would add the whole table to memory
        part = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return TokenizedSample(self.ids[part], self.segments[part], int(self.sample_index[i]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (n,): tokens per document."""
        return np.diff(self.offsets)

    def documents_of(self, sample_indices: Sequence[int]) -> np.ndarray:
        """int64: the documents made from these samples, in their order, repeats repeated.

        Samples that were left out have none.
        """
        wanted = np.asarray(sample_indices, dtype=np.int64)
        blocks = (wanted[i : i + 65_536] for i in range(0, len(wanted), 65_536))
        found = [np.zeros(0, dtype=np.int64), *map(self._documents_of_block, blocks)]
        return np.concatenate(found)

    def _documents_of_block(self, wanted: np.ndarray) -> np.ndarray:
        first = np.searchsorted(self.sample_index, wanted, side="left")
        counts = np.searchsorted(self.sample_index, wanted, side="right") - first
        ends = np.cumsum(counts)
        within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        return np.repeat(first, counts) + within


def _segment_counts(segments: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32 (n, 5) from the segments (total,) of n documents end to end."""
    kinds = len(Segment)
    cell = np.repeat(np.arange(len(lengths)) * kinds, lengths) + segments
    return np.bincount(cell, minlength=len(lengths) * kinds).reshape(-1, kinds).astype(np.int32)


class TokenPart:
    """Arrays of one chunk of samples, and its part of the truncation report."""

    def __init__(self) -> None:
        self.ids, self.segments, self.lengths, self.sample_index = [], [], [], []
        self.truncation = _empty_report()

    def add(self, ids: np.ndarray, segments: np.ndarray, index: int) -> None:
        self.ids.append(ids)
        self.segments.append(segments)
        self.lengths.append(len(ids))
        self.sample_index.append(index)

    def arrays(self) -> dict[str, np.ndarray]:
        segments = np.concatenate([np.zeros(0, np.uint8), *self.segments])
        lengths = np.array(self.lengths, dtype=np.int64)
        counts = _segment_counts(segments, lengths)
        return {
            "ids": np.concatenate([np.zeros(0, np.int32), *self.ids]),
            "segments": segments,
            "lengths": lengths,
            "sample_index": np.array(self.sample_index, dtype=np.int64),
            "num_targets": counts[:, carries_loss(np.arange(NUM_SEGMENTS))].sum(1, np.int64),
            "segment_counts": counts,
        }


_DTYPES = {
    "ids": np.int32,
    "segments": np.uint8,
    "lengths": np.int64,
    "sample_index": np.int64,
    "num_targets": np.int64,
    "segment_counts": np.int32,
}
_WIDTHS = {"segment_counts": (len(Segment),)}  # of the arrays with more than one axis


def _empty_report() -> dict[str, list | int]:
    return {f.name: 0 if f.default == 0 else [] for f in fields(TruncationReport)}


def _merged(reports: Iterable[dict[str, list | int]]) -> TruncationReport:
    merged = _empty_report()
    for truncation in reports:
        for name, items in truncation.items():
            merged[name] += items
    return TruncationReport.of(merged)


def tokens_in_memory(parts: Iterator) -> tuple[dict[str, np.ndarray], TruncationReport]:
    """The arrays of all parts, each joined to one, and the joined report."""
    found = list(parts)
    arrays = {
        name: np.concatenate(
            [np.zeros((0, *_WIDTHS.get(name, ())), dtype), *(arrays[name] for arrays, _ in found)]
        )
        for name, dtype in _DTYPES.items()
    }
    return arrays, _merged(truncation for _, truncation in found)


def write_tokens(folder: Path, parts: Iterator) -> None:
    """Append all parts to raw files, then give them the .npy form; memory holds one part at a time,
    and none of the files is mapped, as what is looked at would count as this process's memory."""
    reports = []
    for arrays, truncation in parts:
        reports.append(truncation)
        for name in _DTYPES:
            with open(folder / f"{name}.raw", "ab") as file:
                arrays[name].tofile(file)
    for name, dtype in _DTYPES.items():
        _as_npy(folder, name, dtype)
    write_json(folder / "truncation.json", asdict(_merged(reports)))


def _as_npy(folder: Path, name: str, dtype: type) -> None:
    raw, width = folder / f"{name}.raw", _WIDTHS.get(name, ())
    raw.touch()
    rows = raw.stat().st_size // (np.dtype(dtype).itemsize * math.prod(width))
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": (rows, *width)}
    with open(folder / f"{name}.npy", "wb") as npy, open(raw, "rb") as values:
        np.lib.format.write_array_header_1_0(npy, header)
        shutil.copyfileobj(values, npy, 1 << 20)
    raw.unlink()


def load_tokens(folder: Path) -> tuple[dict[str, np.ndarray], TruncationReport] | None:
    """The cached table, None where it isn't there or isn't whole."""
    try:
        stored = json.loads((folder / "truncation.json").read_text(encoding="utf-8"))
        truncation = TruncationReport.of(stored)
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _DTYPES
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    total, n = int(arrays["lengths"].sum()), len(arrays["lengths"])
    whole = len(arrays["ids"]) == len(arrays["segments"]) == total
    whole = whole and len(arrays["sample_index"]) == len(arrays["segment_counts"]) == n
    return (arrays, truncation) if whole else None
