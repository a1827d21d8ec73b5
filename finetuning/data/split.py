"""Which samples train and which are held out: a split that no near duplicate crosses, and source weights."""

import fnmatch
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.config import DataSettings, bundled_data
from finetuning.data.near_duplicates import SampleClusters, joined_labels
from finetuning.readers.arrow_samples import ArrowSamples
from finetuning.readers.dataset import SampleSet
from finetuning.readers.sample import Sample


@dataclass(frozen=True)
class Split:
    """All samples that were read, and which of them train and which are held out."""

    read: SampleSet
    train: np.ndarray  # (n,) indices; a weighted source may appear several times
    held_out: np.ndarray  # (m,) indices, empty when the held-out data are files of their own
    eval_read: SampleSet | None  # held-out files of the user's
    clusters: SampleClusters  # of all samples: for the split, and for the statistics after it
    general: np.ndarray  # (k,) indices of general text of the program's own
    replayed: np.ndarray  # (l,) those of it of which tokens are drawn into the training
    seed: int = 0  # of what is drawn

    def training_texts(self, at_most: int = 20_000) -> list[str]:
        """Plain text of the distinct training samples, of many evenly spaced ones, for the
        demonstration model."""
        chosen = np.unique(self.train)
        if len(chosen) > at_most:
            chosen = chosen[np.linspace(0, len(chosen) - 1, at_most).astype(np.int64)]
        samples = (self.read.samples[int(i)] for i in chosen)
        return ["\n".join(filter(None, (s.question, s.thinking, s.answer))) for s in samples]


def split_samples(
    read: SampleSet,
    settings: DataSettings,
    eval_read: SampleSet | None = None,
    *,
    seed: int = 0,
    cache_dir: Path | None = None,
    workers: int = 1,
) -> Split:
    """Split off the held-out share where there are no held-out files; the rest is repeated or thinned out by
    the weight of its source. General text is set apart first, so that it changes nothing of what is held
    out. Raises UserError where nothing is left for training."""
    clusters = own_clusters = SampleClusters(read.samples, read.fingerprint, cache_dir, workers)
    train = np.arange(len(read.samples))
    held_out = general = train[:0]
    own: Sequence[Sample] = read.samples
    if settings.replay:
        general = _of_file(own, replay_text())
        is_own = np.ones(len(own), bool)
        is_own[general] = False
        train, own = np.flatnonzero(is_own), _Part(own, is_own)
        # Searched alone, or a general text might join two samples that nothing else joins.
        own_clusters = SampleClusters(own, f"{read.fingerprint}-own", cache_dir, workers)
    if eval_read is None and settings.eval_fraction:
        fraction, at_most = settings.eval_fraction, settings.max_eval_samples
        places = split_held_out(own, fraction, own_clusters, at_most=at_most)
        train, held_out = (train[part] for part in places)
    replayed = _without_leaks(general, held_out, clusters)
    if not len(train):
        raise UserError(
            f"data: all of {len(own)} samples are held out; lower --eval-fraction or add others"
        )
    if settings.data_weights and settings.data_weights_by == "samples":
        weights = dict(zip(settings.data_path, settings.data_weights, strict=True))
        train = weighted_indices(read.samples, train, weights, seed)
    return Split(read, train, held_out, eval_read, clusters, general, replayed, seed)


class _Part(Sequence):
    """Those samples that a mask (n,) takes, made on demand so that large data stay on disk."""

    def __init__(self, samples: Sequence[Sample], mask: np.ndarray) -> None:
        self._samples, self._mask, self._places = samples, mask, np.flatnonzero(mask)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[int(self._places[index])]

    def __iter__(self) -> Iterator[Sample]:
        return itertools.compress(self._samples, self._mask)


def _without_leaks(
    general: np.ndarray, held_out: np.ndarray, clusters: SampleClusters
) -> np.ndarray:
    """The general texts (l,) that are no near duplicates of a held-out sample."""
    if not len(general) or not len(held_out):
        return general
    joined = joined_labels(clusters.questions, np.arange(len(clusters.pairs)), clusters.pairs)
    return general[~np.isin(joined[general], joined[held_out])]


def split_held_out(
    samples: Sequence[Sample],
    fraction: float,
    clusters: SampleClusters | None = None,
    *,
    at_most: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices, both int64 and ascending, such that no near duplicate crosses.

    A cluster (near-equal questions, or near-equal question and answer) is held out when the hash of
    its smallest sample id falls below `fraction`; so the choice depends on content only and stays
    when unrelated samples come or go. A cluster larger than a quarter of the data (or than
    `fraction`) always trains. Of few samples chance may take many: the highest hashes above one and
    a half times the fraction train as well, as do those beyond `at_most` samples (0: no limit). With 10
    samples or more, at least one is held out.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"held-out fraction is {fraction}; give a number from 0 to below 1")
    everything = np.arange(len(samples), dtype=np.int64)
    if fraction == 0 or len(samples) == 0:
        return everything, everything[:0]
    clusters = clusters or SampleClusters(samples)
    clusters.search_both()
    joined = joined_labels(clusters.questions, np.arange(len(samples)), clusters.pairs)
    _, compact, sizes = np.unique(joined, return_inverse=True, return_counts=True)
    position = _cluster_positions(samples, compact, len(sizes))
    eligible = sizes <= max(fraction, 0.25) * len(samples)
    held_out = eligible & (position < fraction)
    by_position = np.argsort(position, kind="stable")
    taken = np.cumsum(np.where(held_out, sizes, 0)[by_position])
    limit = math.ceil(1.5 * fraction * len(samples))
    held_out[by_position[taken > min(limit, at_most or limit)]] = False
    if not held_out.any() and len(samples) >= 10:
        held_out[_fallback_cluster(position, sizes, eligible)] = True
    return everything[~held_out[compact]], everything[held_out[compact]]


def _cluster_positions(samples: Sequence[Sample], compact: np.ndarray, count: int) -> np.ndarray:
    """A uniform number in [0, 1) per cluster, from the smallest content hash among its members."""
    smallest = np.full(count, 2**64 - 1, np.uint64)
    for sample, cluster in zip(samples, compact, strict=True):
        smallest[cluster] = min(smallest[cluster], np.uint64(int(sample.id, 16)))
    # Hashed once more: the minimum of many ids is small and would hold out large clusters.
    return np.fromiter((_position(int(identity)) for identity in smallest), float, count)


def _position(identity: int) -> float:
    digest = hashlib.blake2b(f"{identity:016x}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _fallback_cluster(position: np.ndarray, sizes: np.ndarray, eligible: np.ndarray) -> int:
    """The cluster to hold out when the hash chose none: the first eligible, else the smallest."""
    if len(sizes) == 1:
        raise UserError(
            "all samples are near duplicates of each other, so none can be held out without a leak;"
            " set the held-out fraction to 0 or add other samples"
        )
    order = np.lexsort((position, np.where(eligible, 0, sizes)))
    return int(order[0])


def weighted_indices(
    samples: Sequence[Sample], indices: Sequence[int], weights: dict[str, float], seed: int
) -> np.ndarray:
    """`indices` with those of a source repeated or thinned out by its weight; int64, same order.

    A weight's key is a source, its folder or a glob of sources; the first that fits counts, others weigh 1.
    Weight 2.5 takes every sample twice and half of them a third time, drawn by a hash of seed and
    content: where a file lies, and what else is read, change nothing. Raises UserError for a weight
    that is negative or not finite, a key that fits nothing, and nothing left.
    """
    indices = np.asarray(indices, dtype=np.int64)
    names, codes = source_numbers(samples)
    codes = codes[indices]
    by_source = {names[code]: code for code in np.unique(codes).tolist()}
    chosen = _weight_of_sources(list(by_source), weights)
    counts = np.ones(len(indices), dtype=np.int64)
    drawn = [code for name, code in by_source.items() if chosen[name] % 1.0]
    draws = _draws(samples, indices[np.isin(codes, drawn)], seed)
    for name, code in sorted(by_source.items()):
        places = np.flatnonzero(codes == code)
        whole, part = divmod(chosen[name], 1.0)
        counts[places] = int(whole)
        if extra := round(part * len(places)):
            order = np.argsort(draws[indices[places]], kind="stable")
            counts[places[order[:extra]]] += 1
    if len(indices) and not counts.any():
        raise UserError("source weights leave no sample; raise one above 0")
    return np.repeat(indices, counts)


def weighted_by_tokens(
    split: Split, weights: dict[str, float], replay: float, tokens: np.ndarray
) -> np.ndarray:
    """The training samples, sources repeated or thinned out until their tokens are to each other as their
    weights, with the general text's share `replay` of all; int64.

    weights: as of `weighted_indices`; empty: all samples once. tokens: (n,) of each of all samples. The
    source of the largest weight is shown once, another one as a whole so often as it fits; of the rest
    samples are drawn by a hash of seed and content, to the nearest half of a sample. Raises UserError like
    `weighted_indices`.
    """
    samples, own = split.read.samples, split.train
    if weights:
        names, codes = source_numbers(samples)
        _weight_of_sources(names, weights)  # refuses what fits nothing
        keys = [next((key for key in weights if _fits(name, key)), "") for name in names]
        of_key = np.asarray(keys)[codes[own]]
        parts = {key: own[of_key == key] for key in weights if weights[key]}
        totals = {key: tokens[part].sum() for key, part in parts.items() if len(part)}
        if not totals:
            raise UserError("source weights leave no sample; raise one above 0")
        largest = max(totals, key=lambda key: weights[key])
        unit = totals[largest] / weights[largest]
        wanted = {key: weights[key] * unit for key in totals}
        drawn = [_to_tokens(split, parts[key], tokens, wanted[key]) for key in totals]
        own = np.sort(np.concatenate(drawn))
    wanted = replay / (1 - replay) * tokens[own].sum()
    return np.concatenate([own, _to_tokens(split, split.replayed, tokens, wanted)])


def _to_tokens(split: Split, part: np.ndarray, tokens: np.ndarray, wanted: float) -> np.ndarray:
    """The samples of a part, repeated or drawn until they have so many tokens."""
    total = tokens[part].sum()
    if not total or not wanted:
        return part[:0]
    whole, rest = divmod(wanted, total)
    order = part[np.argsort(_draws(split.read.samples, part, split.seed)[part], kind="stable")]
    own = tokens[order]
    drawn = order[np.cumsum(own) - own / 2 < rest]
    return np.sort(np.concatenate([np.repeat(part, int(whole)), drawn]))


def replay_text() -> str:
    """The general text that trains, whose other half the forgetting gauge reads."""
    return f"{bundled_data('general')}/replay.jsonl"


def _of_file(samples: Sequence[Sample], path: str) -> np.ndarray:
    """(k,) indices of the samples of this file."""
    names, codes = source_numbers(samples)
    return np.flatnonzero(np.isin(codes, [i for i, name in enumerate(names) if name == path]))


def _draws(samples: Sequence[Sample], wanted: np.ndarray, seed: int) -> np.ndarray:
    """A uniform number (n,) for the content of each wanted sample, 0 for the others."""
    draws = np.zeros(len(samples), np.uint64)
    if len(wanted):
        draws[wanted] = 1
        for i, sample in enumerate(samples):
            if draws[i]:
                digest = hashlib.blake2b(f"{seed}\0{sample.id}".encode(), digest_size=8).digest()
                draws[i] = int.from_bytes(digest, "little")
    return draws


def source_numbers(samples: Sequence[Sample]) -> tuple[list[str], np.ndarray]:
    """All sources in the order of their first samples, and the number (n,) of each sample's."""
    numbers: dict[str, int] = {}
    lazy = isinstance(samples, ArrowSamples)
    sources = samples.sources() if lazy else (sample.source for sample in samples)
    codes = (numbers.setdefault(source, len(numbers)) for source in sources)
    found = np.fromiter(codes, np.int32, len(samples))
    return [*numbers], found


def _weight_of_sources(sources: list[str], weights: dict[str, float]) -> dict[str, float]:
    for key, weight in weights.items():
        shown = clean_line(key, 200)
        if not math.isfinite(weight) or not 0 <= weight <= 1000:
            raise UserError(f"source weight of {shown} is {weight}; give one from 0 to 1000")
        if not any(_fits(source, key) for source in sources):
            known = clean_line(", ".join(sources), 300)
            raise UserError(f"source weight: nothing was read from {shown}; sources are {known}")
    return {
        source: next((float(w) for key, w in weights.items() if _fits(source, key)), 1.0)
        for source in sources
    }


def _fits(source: str, key: str) -> bool:
    """Whether a file is meant by its name, a glob or its folder."""
    return (
        source == key
        or fnmatch.fnmatchcase(source, key)
        or source.startswith(f"{key.rstrip('/')}/")
    )
