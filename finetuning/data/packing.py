"""Lengths to a plan of steps, and a planned micro-batch to one packed batch without padding.

Packing happens once, before training. After that `plan[step]` is a pure function of (lengths, seed,
step, rank, world size): a checkpoint holds a step number and no loader state, every rank has the same
number of micro-batches, and the number of supervised tokens of a step over all ranks needs no
communication.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from finetuning.config import BatchSettings, DataSettings
from finetuning.data.token_table import (
    NUM_THINKING_BUCKETS,
    Segment,
    TokenizedSamples,
    carries_loss,
)

AUTO_UPDATES, AUTO_EPOCHS = 150, (3, 15)  # of num_epochs auto: updates, fewest and most passes
PACKING_WINDOW = 1 << 14  # documents that are packed together; bounds the time per document
ALIGNMENT = 256  # bytes, of tensors in one buffer: what CUDA's own allocations have

# -----------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class PlannedStep:
    """What one rank does in one optimizer update, and what all ranks together do."""

    micro_batches: tuple[tuple[int, ...], ...]  # document indices, this rank
    num_padding_batches: int  # the last ones repeat another rank's documents and carry no loss
    num_targets: int  # supervised tokens, all ranks
    num_tokens: int  # all tokens, all ranks
    num_samples: int  # documents, all ranks
    num_micro_batches: int  # without fillers, all ranks
    epoch: int  # 0-based
    documents: tuple[int, ...]  # all ranks, each once


class StepPlan:
    """Every step of a run, known before its first.

    Args:
        lengths: (n,) tokens of each document of the table.
        num_targets: (n,) supervised tokens of each document of the table.
        documents: (m,) the documents to plan, by index, repeats allowed; none longer than
            `max_seq_length`. None: all.
        data: `row_capacity` is what a row is filled up to, beyond which only a document
            alone goes; without `packing` there is one document in each.
        batch: rows that go through the model at once, micro-batches of one rank in one update, passes
            over the data (a fraction is rounded up to whole steps), or exactly so many steps.
        seed: of the packing and of each epoch's order.
        rank, world_size: the micro-batches of a step are dealt to the ranks in turn.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        num_targets: np.ndarray,
        documents: np.ndarray | None = None,
        *,
        data: DataSettings,
        batch: BatchSettings,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.documents = np.arange(len(lengths)) if documents is None else np.asarray(documents)
        self._lengths, self._num_targets = np.asarray(lengths), np.asarray(num_targets)
        assert len(self.documents) > 0, "a plan needs at least one document"
        # Of one epoch.
        self.num_tokens, self._longest = _total_and_longest(self._lengths, self.documents)
        assert self._longest <= data.most_tokens, (self._longest, data.most_tokens)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self._filled = data.row_capacity
        longest = min(_rounded(self._longest), data.most_tokens)
        self.row_tokens = max(self._filled, longest)
        self.rows_per_micro_batch = batch.batch_size
        order = self.documents.astype(_index_type(len(lengths)))
        if data.packing:
            np.random.default_rng([seed, 0]).shuffle(order)
            self._rows = pack_rows(self._lengths, order, self._filled)
        else:
            self._rows = Rows(order, np.arange(len(order) + 1, dtype=_index_type(len(order))))
        self.rows_per_step = batch.batch_size * batch.gradient_accumulation_steps * world_size
        self.steps_per_epoch = math.ceil(len(self._rows) / self.rows_per_step)
        epochs = batch.num_epochs
        if epochs == "auto":
            enough = math.ceil(AUTO_UPDATES / self.steps_per_epoch)
            epochs = min(max(enough, AUTO_EPOCHS[0]), AUTO_EPOCHS[1])
        by_epochs = math.ceil(epochs * self.steps_per_epoch - 1e-6)
        self.num_steps = batch.max_steps or by_epochs
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int32))

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> PlannedStep:
        """Step 1 is the first update. Depends on nothing but the arguments of the plan."""
        assert 1 <= step <= self.num_steps, (step, self.num_steps)
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        rows = self._rows_of(epoch)[index * self.rows_per_step : (index + 1) * self.rows_per_step]
        in_rows = [self._rows[row] for row in rows]
        starts = range(0, len(rows), self.rows_per_micro_batch)
        micro_batches = [
            tuple(np.concatenate(in_rows[s : s + self.rows_per_micro_batch]).tolist())
            for s in starts
        ]
        documents = np.concatenate(in_rows)
        # Every rank goes through the model equally often, as sharded parameters demand.
        mine = micro_batches[self.rank :: self.world_size]
        num_padding_batches = math.ceil(len(micro_batches) / self.world_size) - len(mine)
        mine += [micro_batches[0]] * num_padding_batches
        return PlannedStep(
            micro_batches=tuple(mine),
            num_padding_batches=num_padding_batches,
            num_targets=int(self._num_targets[documents].sum()),
            num_tokens=int(self._lengths[documents].sum()),
            num_samples=len(documents),
            num_micro_batches=len(micro_batches),
            epoch=epoch,
            documents=tuple(documents.tolist()),
        )

    def fractional_epoch(self, step: int) -> float:
        """Passes over the data after `step` updates."""
        return step / self.steps_per_epoch

    @property
    def passes(self) -> float:
        """Passes over the data of the whole plan."""
        return self.fractional_epoch(self.num_steps)

    @property
    def times_shown(self) -> float:
        """How often the plan shows a document, on the mean; a weight of 10 shows it ten times a pass."""
        return self.passes * len(self.documents) / len(np.unique(self.documents))

    @property
    def tokens_per_update(self) -> float:
        """Of all ranks, on the mean."""
        return self.num_tokens / self.steps_per_epoch

    @property
    def constant_shape(self) -> dict[str, int]:
        """Arguments of `build_batch` that give every micro-batch of the plan one shape."""
        # The attention kernel starts a block for every 128 tokens that a document may have, of each that
        # there may be, and padding is attended to like any document. On an H100, 28 documents in 8,192
        # tokens: 1.23 ms backward where each may fill the row, 1.00 ms where 1,536 tokens are the most.
        longest = min(_rounded(self._longest, 128), self.row_tokens)
        return {
            "pad_to": self.constant_tokens,
            "pad_documents": self._most_documents(longest),
            "pad_targets": min(
                _rounded(self._most(self._rows.tokens(self._num_targets))), self.constant_tokens
            ),
            "max_length": longest,
        }

    def _most_documents(self, longest: int) -> int:
        """Of a micro-batch in the constant shape, those of padding included, none longer than `longest`."""
        share = self.constant_tokens / self.rows_per_micro_batch
        padding = (share - self._rows.tokens(self._lengths)) / longest
        absent = np.full(
            self.rows_per_micro_batch - 1, share / longest
        )  # rows of a last micro-batch
        documents = np.concatenate([np.diff(self._rows.starts) + padding, absent])
        return math.ceil(self._most(documents) - 1e-6)

    @cached_property
    def constant_tokens(self) -> int:
        """Tokens of a micro-batch in the constant shape: what the fullest rows hold, rounded up to 64."""
        fullest = _rounded(self._most(self._rows.tokens(self._lengths)))
        return min(fullest, self.rows_per_micro_batch * self.row_tokens)

    @property
    def constant_efficiency(self) -> float:
        """Share of the tokens in the constant shape that is no padding, in (0, 1]."""
        num_micro_batches = math.ceil(len(self._rows) / self.rows_per_micro_batch)
        return self.num_tokens / (num_micro_batches * self.constant_tokens)

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self._rows)

    @property
    def efficiency(self) -> float:
        """Share of the rows' capacity that holds tokens, in [0, 1]."""
        capacity = np.maximum(self._rows.tokens(self._lengths), self._filled).sum()
        return float(self.num_tokens / capacity)

    def _most(self, of_rows: np.ndarray) -> float:
        """The largest sum over a micro-batch of what each row has, whichever rows come together."""
        return np.sort(of_rows)[-self.rows_per_micro_batch :].sum().item()

    def _rows_of(self, epoch: int) -> np.ndarray:
        """Row indices in this epoch's order; kept for the epoch in progress."""
        if self._epoch_order[0] != epoch:
            order = np.arange(len(self._rows), dtype=_index_type(len(self._rows)))
            np.random.default_rng([self.seed, 1 + epoch]).shuffle(order)
            self._epoch_order = (epoch, order)
        return self._epoch_order[1]


@dataclass(frozen=True)
class Rows:
    """Rows of documents in two flat arrays: row i is documents[starts[i] : starts[i + 1]]."""

    documents: np.ndarray  # (m,) document indices
    starts: np.ndarray  # (rows + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.documents[self.starts[row] : self.starts[row + 1]]

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """(rows,) tokens of each row, with the documents' lengths; some rows at a time."""
        counts = []
        for first in range(0, len(self), 1 << 16):
            starts = self.starts[first : first + (1 << 16) + 1]
            part = lengths[self.documents[starts[0] : starts[-1]]]
            counts.append(np.add.reduceat(part, starts[:-1] - starts[0], dtype=np.int64))
        return np.concatenate(counts)


def pack_rows(
    lengths: np.ndarray, order: np.ndarray, row_tokens: int, window: int = PACKING_WINDOW
) -> Rows:
    """Best-fit-decreasing bin packing of documents into rows, window by window of `order`, in place.

    Each document goes, longest first, to the row with the least room that still holds it
    (Johnson 1973: at most 11/9 of the optimum plus a constant). O(log rows) a document. `order`
    is sorted by row and becomes the rows' documents: a plan may take most of a rank's memory.
    """
    sizes = []
    for start in range(0, len(order), window):
        chunk = order[start : start + window]  # a view
        of_chunk = lengths[chunk]
        by_length = np.argsort(-of_chunk, kind="stable")
        rows = np.array(_best_fit(of_chunk[by_length].tolist(), row_tokens), dtype=np.int32)
        chunk[:] = chunk[by_length][np.argsort(rows, kind="stable")]
        sizes.append(np.bincount(rows).astype(np.int32))
    starts = np.zeros(1 + sum(map(len, sizes)), dtype=_index_type(len(order)))
    np.cumsum(np.concatenate(sizes), out=starts[1:])
    return Rows(order, starts)


def _best_fit(lengths: list[int], row_tokens: int) -> list[int]:
    """The row of each document; lengths descend."""
    shortest = lengths[-1]
    rows, count = [], 0
    free: list[
        int
    ] = []  # (room left, row) as one number, sorted; rows that still hold the shortest
    for length in lengths:
        place = bisect_left(free, length << 32)
        if place == len(free):
            row, room = count, row_tokens - length
            count += 1
        else:
            room, row = divmod(free.pop(place), 1 << 32)
            room -= length
        rows.append(row)
        if room >= shortest:
            insort(free, room << 32 | row)
    return rows


def _rounded(count: int, multiple: int = 64) -> int:
    """Up to a multiple, of 64 as matrix products like it."""
    return math.ceil(count / multiple) * multiple


def _index_type(count: int) -> type:
    """The smaller type that counts to `count`."""
    return np.int32 if count < 2**31 else np.int64


def _total_and_longest(lengths: np.ndarray, documents: np.ndarray) -> tuple[int, int]:
    """Sum and maximum of lengths[documents], a million at a time."""
    total, longest = 0, 0
    for start in range(0, len(documents), 1 << 20):
        part = lengths[documents[start : start + (1 << 20)]]
        total += int(part.sum(dtype=np.int64))
        longest = max(longest, int(part.max()))
    return total, longest


def split_micro_batch(documents: Sequence[int], lengths: np.ndarray) -> list[tuple[int, ...]]:
    """Two halves of about equal tokens, or the document alone when there is only one."""
    if len(documents) < 2:
        return [tuple(documents)]
    ends = np.cumsum(lengths[np.asarray(documents)])
    cut = int(np.clip(np.searchsorted(ends, ends[-1] / 2), 1, len(documents) - 1))
    return [tuple(documents[:cut]), tuple(documents[cut:])]


# -----------------------------------------------------------------------------
# The batch


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: D documents end to end, T tokens, N of them predicted. All on the host.

    B documents have bounds, those of padding and empty ones among them. Targets may end in padding, which
    belongs to document B.
    """

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, from 0 in every document
    target_positions: torch.Tensor  # (N,) int64, the position whose hidden state predicts a label
    labels: torch.Tensor  # (N,) int64
    segments: torch.Tensor  # (N,) int64, Segment of the label
    document: torch.Tensor  # (N,) int64 in [0, D), or B
    thinking_bucket: torch.Tensor  # (N,) int64, tenth of the chain of thought, -1 elsewhere
    cu_seqlens: torch.Tensor  # (B + 1,) int32, where documents start
    lengths: tuple[int, ...]  # the same on the host, without empty ones
    max_length: int
    documents: tuple[int, ...]  # (D,) index of each document among the tokenized samples

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on `device`; to CUDA in one copy that nobody waits for."""
        if device.type == "cpu":
            return self
        if device.type == "cuda":
            return self.views(self.pinned_bytes().to(device, non_blocking=True))
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def pinned_bytes(self) -> torch.Tensor:
        """(bytes,) uint8 in page-locked memory: all tensors one after the other."""
        places = self._places()
        flat = torch.empty(places[-1][-1], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for name, start, end in places:
            tensor = getattr(self, name)
            flat[start:end].view(tensor.dtype).copy_(tensor.flatten())
        return flat

    def views(self, flat: torch.Tensor) -> "PackedBatch":
        """This batch with the tensors that lie in `flat`, a copy of `pinned_bytes` anywhere."""
        tensors = {}
        for name, start, end in self._places():
            tensor = getattr(self, name)
            tensors[name] = flat[start:end].view(tensor.dtype).view(tensor.shape)
        return replace(self, **tensors)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {n: v for n, v in self.__dict__.items() if isinstance(v, torch.Tensor)}

    def _places(self) -> list[tuple[str, int, int]]:
        """(name, start, end) of each tensor in the flat bytes; kernels like addresses that are round."""
        places, start = [], 0
        for name, tensor in self._tensors().items():
            places.append((name, start, start + tensor.nbytes))
            start = math.ceil((start + tensor.nbytes) / ALIGNMENT) * ALIGNMENT
        return places


def build_batch(
    tokens: TokenizedSamples,
    documents: Sequence[int],
    *,
    pad_to: int = 0,
    pad_documents: int = 0,
    pad_targets: int = 0,
    max_length: int = 0,
) -> PackedBatch:
    """Put `documents` end to end; a token outside the prompt is predicted from the one before.

    For compiled kernels, which want one shape: `pad_to` above the number of tokens adds documents of
    padding without targets, none longer than `max_length`; `pad_documents` repeats the end of the
    last one until there are so many; `pad_targets` adds targets of no document; `max_length` is given
    out as it is.
    """
    pieces = [tokens[d] for d in documents]
    lengths = [len(piece.ids) for piece in pieces]
    ids = np.concatenate([piece.ids for piece in pieces]).astype(np.int64)
    segments = np.concatenate([piece.segments for piece in pieces]).astype(np.int64)
    buckets = np.concatenate([_thinking_buckets(piece.segments) for piece in pieces])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    assert (segments[starts[:-1]] == Segment.PROMPT).all(), "a document starts with its prompt"
    predicted = np.flatnonzero(carries_loss(segments))
    document = np.repeat(np.arange(len(pieces)), lengths)[predicted]
    for start in range(len(ids), pad_to, max_length or pad_to or 1):
        lengths.append(min(max_length or pad_to, pad_to - start))
        starts = np.append(starts, starts[-1] + lengths[-1])
    ids = np.concatenate([ids, np.zeros(starts[-1] - len(ids), dtype=np.int64)])
    starts = np.append(starts, [starts[-1]] * (pad_documents + 1 - len(starts)))
    positions = np.concatenate([np.arange(length) for length in lengths])
    padding = max(0, pad_targets - len(predicted))

    def targets(values: np.ndarray, beyond: int) -> torch.Tensor:
        return torch.from_numpy(np.pad(values, (0, padding), constant_values=beyond))

    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        target_positions=targets(predicted - 1, 0),
        labels=targets(ids[predicted], 0),
        segments=targets(segments[predicted], Segment.PROMPT),
        document=targets(document, len(starts) - 1),
        thinking_bucket=targets(buckets[predicted], -1),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        lengths=tuple(lengths),
        max_length=max_length or max(lengths),
        documents=tuple(int(d) for d in documents),
    )


def _thinking_buckets(segments: np.ndarray) -> np.ndarray:
    """(T,) tenth of the document's thinking that each thinking token lies in, -1 elsewhere."""
    buckets = np.full(len(segments), -1, dtype=np.int64)
    thinking = np.flatnonzero(segments == Segment.THINKING)
    if len(thinking):
        place = np.arange(len(thinking)) * NUM_THINKING_BUCKETS // len(thinking)
        buckets[thinking] = place
    return buckets
