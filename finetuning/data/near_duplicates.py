"""Which texts say nearly the same.

Near means: Jaccard similarity of the sets of character 5-grams, after NFKC, lower case and without
punctuation, of at least `threshold`. Up to `EXACT_LIMIT` distinct texts the join is exact (prefixes
that must have several shingles in common, Wang, Li and Feng 2012) where that compares at most `PAIRS_A_TEXT`
pairs a text. Form letters, whose rare shingles are shared by many, would propose all pairs: there, and
beyond the limit, MinHash bands propose pairs, a bounded number for each text, and the exact similarity
decides. Clusters are the connected components of that relation.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetuning.common.cache import cached_folder, code_version, kept_array
from finetuning.common.ngrams import gram_hashes, normalized
from finetuning.common.temporary_file import TemporaryFile
from finetuning.common.workers import in_order
from finetuning.readers.sample import Sample

if TYPE_CHECKING:
    from scipy.sparse import csr_array


# scipy and rensa are imported where pairs are joined: processes that only make keys do without.

SHINGLE = 5  # characters
EXACT_LIMIT = 10_000  # distinct texts up to which every pair above the threshold is found
PAIRS_A_TEXT = 4  # comparisons up to which the exact join costs no more than reading the texts does
_MEETINGS_A_TEXT = (
    1_000  # of two texts in a shingle, each a multiplication: 10 ns, a comparison 10 µs
)
_COMMON = 5  # shingles that two prefixes must share: more in common by chance are rare
_POOL_FROM = 10_000  # samples from which on worker processes pay for their start
_LABELS = "labels.npy"
_NUM_PERM = 125  # MinHash values per text
_WINDOW = 8  # neighbours compared within a bucket of equal MinHash bands
_IN_VAIN = 8  # comparisons of a text that found nothing, after which only likely ones are made
_CHUNK = 500  # texts whose shingles are in memory together
_KEPT_BYTES = 1 << 30  # of sets of shingles that wait in a file; others are made anew
_HASH_SEED = np.uint64(0x9E3779B97F4A7C15)
_HASH_STEP = np.uint64(0xD6E8FEB86659FD93)


def text_key(text: str) -> int:
    """64 bits that are equal for texts equal after `normalized` (exact duplicates)."""
    digest = hashlib.blake2b(normalized(text).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def question_text(sample: Sample) -> str:
    """What the user asked, earlier turns included."""
    earlier = (m.get("content") for m in sample.history if m.get("role") == "user")
    return "\n".join([*(text for text in earlier if isinstance(text, str)), sample.question])


def context_text(sample: Sample) -> str:
    """All that the model sees before its answer: with another system text or tool it is another one."""
    turns = (*sample.history, {"content": sample.question}, *sample.tool_turns)
    said = (f"{turn.get('content', '')}\n{turn.get('tool_calls', '')}" for turn in turns)
    return "\n".join((sample.system, sample.tools, *said))


def pair_text(sample: Sample) -> str:
    """Question and answer, the text that near duplicates of a sample share."""
    return f"{question_text(sample)}\n{sample.answer}"


class Texts(Sequence):
    """A text of each sample, made on demand so that large data stay on disk."""

    def __init__(self, samples: Sequence[Sample], text: Callable[[Sample], str]) -> None:
        self._samples, self._text = samples, text

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> str:
        return self._text(self._samples[int(index)])

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._samples)


def shingles(text: str) -> np.ndarray:
    """Sorted distinct 64-bit hashes (k,) uint64 of the character 5-grams; a shorter text is one."""
    text = normalized(text)
    if len(text) < SHINGLE:
        return np.array([text_key(text)], np.uint64)
    return np.unique(gram_hashes(text, SHINGLE))


def jaccard(first: str, second: str) -> float:
    """Similarity of two texts in [0, 1]: common shingles / all shingles."""
    return _similarity(shingles(first), shingles(second))


def near_duplicate_clusters(
    texts: Sequence[str], threshold: float = 0.8, exact_limit: int = EXACT_LIMIT
) -> np.ndarray:
    """Cluster label (n,) per text: the smallest index in its cluster (alone: its own). int32
    below 2**31 texts.

    `texts` may be lazy; each is read a few times. Does not depend on their order. Raises UserError where the
    temporary folder has no room.
    """
    if len(texts) == 0:
        return np.zeros(0, np.int64)
    keys = np.fromiter(map(text_key, texts), np.uint64, len(texts))
    same = smallest_of_equal(keys)
    first = np.flatnonzero(_is_first(same)).astype(same.dtype)  # of each distinct text
    with TemporaryFile() as file:
        sets = _Sets(texts, first, file)
        labels = _join_exact(sets, threshold) if len(first) <= exact_limit else None
        if labels is None:
            labels = _join_minhash(sets, keys[first], threshold)
    return first[smallest_of_equal(labels)][np.searchsorted(first, same)]


class SampleClusters:
    """Which samples say nearly the same: labels (n,) as of `near_duplicate_clusters`, each search made
    when it is first asked for, and kept in the cache of data that has one."""

    def __init__(
        self,
        samples: Sequence[Sample],
        fingerprint: str | None = None,
        cache_dir: Path | None = None,
        workers: int = 1,
    ) -> None:
        self._samples, self._workers = samples, workers
        self._found: dict[str, np.ndarray] = {}
        self._folder = None
        if fingerprint and cache_dir:
            made_by = code_version("data.near_duplicates", "common.ngrams", libraries=("rensa",))
            self._folder = Path(cache_dir) / "near_duplicates" / f"{fingerprint}-{made_by}"

    @property
    def questions(self) -> np.ndarray:
        """Of near-equal questions."""
        self._search("questions")
        return self._found["questions"]

    @property
    def pairs(self) -> np.ndarray:
        """Of near-equal questions with answers."""
        self._search("pairs")
        return self._found["pairs"]

    def search_both(self) -> None:
        """Who needs both has them sooner: of many samples each is searched by a process of its own."""
        self._search(*_TEXTS)

    def _search(self, *names: str) -> None:
        missing = [name for name in names if name not in self._found]
        jobs = [(self._samples, self._folder, name) for name in missing]
        if self._workers > 1 and len(jobs) > 1 and len(self._samples) >= _POOL_FROM:
            self._found |= zip(missing, in_order(_kept_clusters, jobs, len(jobs)), strict=True)
        else:
            self._found |= zip(missing, itertools.starmap(_kept_clusters, jobs), strict=True)


_TEXTS = {"questions": question_text, "pairs": pair_text}


def _kept_clusters(samples: Sequence[Sample], folder: Path | None, name: str) -> np.ndarray:
    """Labels of all samples by one of the texts; from the folder, where they were kept there."""
    texts = Texts(samples, _TEXTS[name])
    if folder is None:
        return near_duplicate_clusters(texts)

    def write(building: Path) -> None:
        np.save(building / _LABELS, near_duplicate_clusters(texts))

    def load(kept: Path) -> np.ndarray | None:
        return kept_array(kept / _LABELS, mapped=True)

    return cached_folder(folder / name, load, write)


def _is_first(same: np.ndarray) -> np.ndarray:
    return same == np.arange(len(same), dtype=same.dtype)


def smallest_of_equal(keys: np.ndarray) -> np.ndarray:
    """(n,) int32 or int64: for each of the keys (n,) the index of the first that equals it."""
    kind = np.int32 if len(keys) < 2**31 else np.int64  # large data: many bytes a key otherwise
    order = np.argsort(keys, kind="stable").astype(kind)
    ordered = keys[order]
    begins = np.ones(len(keys), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    del ordered
    starts = np.flatnonzero(begins).astype(kind)
    result = np.empty(len(keys), kind)
    result[order] = np.repeat(order[starts], np.diff(starts, append=kind(len(keys))))
    return result


def _chosen(texts: Sequence[str], chosen: np.ndarray) -> Iterator[str]:
    """The texts of these ascending indices, read in order: much faster than one by one."""
    wanted = np.zeros(len(texts), bool)
    wanted[chosen] = True
    return itertools.compress(texts, wanted)


class _Sets:
    """Sorted sets of shingles of the chosen texts: [i] is one, (k,) uint64; `sizes` (n,) once all were made.

    They wait in a file as far as it may grow: form letters are compared again and again. Going through
    them for the first time reads the texts in order.
    """

    def __init__(self, texts: Sequence[str], chosen: np.ndarray, file: TemporaryFile) -> None:
        self._texts, self._chosen, self._file = texts, chosen, file
        self.sizes = np.zeros(len(chosen), np.int32)
        self._starts = np.full(len(chosen), -1, np.int64)  # -1: not in the file

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> np.ndarray:
        if self._starts[i] < 0:
            return shingles(self._texts[int(self._chosen[i])])
        return np.frombuffer(
            self._file.read(8 * int(self.sizes[i]), int(self._starts[i])), np.uint64
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.sizes.all():
            yield from map(self.__getitem__, range(len(self)))
            return
        end = 0
        for i, text in enumerate(_chosen(self._texts, self._chosen)):
            made = shingles(text)
            self.sizes[i] = len(made)
            if end + made.nbytes <= _KEPT_BYTES:
                self._file.write(made.tobytes(), end)
                self._starts[i], end = end, end + made.nbytes
            yield made


def _join_exact(sets: _Sets, threshold: float) -> np.ndarray | None:
    """Component label per text; None where too many pairs would have to be compared.

    Two sets can only be near when their prefixes, the rarest `size - ceil(threshold * size) + c` shingles,
    have c in common: of all that they share, the c rarest lie there.
    """
    labels = np.arange(len(sets), dtype=np.int32)
    prefixes, common = _prefixes(sets, threshold)
    sharing = np.bincount(prefixes.indices).astype(np.int64)  # texts for each shingle of a prefix
    if (sharing * (sharing - 1) // 2).sum() > _MEETINGS_A_TEXT * len(sets):
        return None
    by_shingle = prefixes.T.tocsr()
    compared = 0
    for start in range(0, len(sets), 256):
        shared = (prefixes[start : start + 256] @ by_shingle).tocoo()
        left, right = shared.coords[0] + start, shared.coords[1]
        enough = shared.data >= np.minimum(common[left], common[right])
        left, right = left[enough], right[enough]
        for block in _candidate_blocks(left, right, sets.sizes, threshold):
            compared += len(block)
            if compared > PAIRS_A_TEXT * len(sets):
                return None
            labels, _ = _joined_if_near(sets, left[block], right[block], labels, threshold)
    return labels


def _prefixes(sets: _Sets, threshold: float) -> tuple["csr_array", np.ndarray]:
    """Texts x shingles, 0/1: the rarest shingles of each text, but none that occurs only once; and how many
    (n,) a near text has in common with them at least.

    How rare a shingle is, is counted by 20 bits of it; any order that all texts share will do.
    """
    from scipy.sparse import csr_array

    counts = _frequencies(sets)
    shared = np.ceil(threshold * sets.sizes - 1e-9).astype(np.int64)  # with any near text, at least
    common = np.minimum(shared, _COMMON)
    prefixes = []
    for i, length in enumerate((sets.sizes - shared + common).tolist()):
        shingles_of = sets[i]
        count = counts[_buckets(shingles_of)]
        rarest = np.argsort(count, kind="stable")[:length]  # equal ones stay in their order
        prefixes.append(shingles_of[rarest[count[rarest] > 1]])
    starts = np.cumsum([0, *map(len, prefixes)])
    _, columns = np.unique(np.concatenate(prefixes), return_inverse=True)
    shape = (len(prefixes), int(columns.max(initial=-1)) + 1)
    columns = columns.astype(np.int32)
    ones = np.ones(len(columns), np.int32)
    return csr_array((ones, columns, starts.astype(np.int32)), shape), common


def _frequencies(sets: _Sets) -> np.ndarray:
    """(2**20,) sets that have a shingle of each bucket."""
    counts = np.zeros(1 << 20, np.int64)
    made = iter(sets)
    while chunk := list(itertools.islice(made, _CHUNK)):
        counts += np.bincount(_buckets(np.concatenate(chunk)), minlength=len(counts))
    return counts


def _buckets(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(44)).astype(np.int64)


def _candidate_blocks(
    left: np.ndarray, right: np.ndarray, sizes: np.ndarray, threshold: float
) -> Iterator[np.ndarray]:
    """Positions of the pairs whose sizes allow the threshold, in blocks that fit into memory."""
    small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
    allowed = np.flatnonzero((left < right) & (small >= threshold * large - 1e-9))
    for start in range(0, len(allowed), 4096):
        yield allowed[start : start + 4096]


def _join_minhash(sets: _Sets, keys: np.ndarray, threshold: float) -> np.ndarray:
    """Component label per text: pairs with one equal MinHash band, verified exactly. keys: (n,) of the texts.

    Within a bucket a text meets its next `_WINDOW` neighbours only; larger buckets are joined through
    chains. A text that was compared in vain `_IN_VAIN` times, as each of a family of form letters is, is
    then compared only where the values agree nearly as often as at the threshold, so that the number of
    comparisons grows with that of the texts. Of the bands one at a time, 4 bytes per text, is in memory.
    """
    labels = np.arange(len(sets), dtype=np.int32)
    in_vain = np.zeros(len(sets), np.uint8)
    by_key = np.argsort(keys).astype(np.int32)  # so that the order of the texts changes nothing
    with TemporaryFile() as file:
        signatures = _Signatures(sets, _rows_per_band(threshold), file)
        for band in signatures.bands:
            order = by_key[np.argsort(band[by_key], kind="stable")]
            band = band[order]
            for distance in range(1, min(_WINDOW, len(order) - 1) + 1):
                candidates = np.flatnonzero(band[:-distance] == band[distance:])
                left, right = order[candidates], order[candidates + distance]
                for a, b, likely in _likely_pairs(
                    signatures.values, left, right, labels, threshold
                ):
                    worth = likely | ((in_vain[a] < _IN_VAIN) & (in_vain[b] < _IN_VAIN))
                    labels, failed = _joined_if_near(sets, a[worth], b[worth], labels, threshold)
                    met, times = np.unique(failed, return_counts=True)
                    in_vain[met] = np.minimum(in_vain[met] + times, _IN_VAIN)
    return labels


def _rows_per_band(threshold: float) -> int:
    """The most selective band that still finds a pair at the threshold with probability .999."""
    for rows in range(16, 1, -1):
        if (1 - threshold**rows) ** (_NUM_PERM // rows) <= 0.001:
            return rows
    return 1


class _Signatures:
    """MinHash of all sets, mapped from a temporary file: `bands` (bands, n) uint32, a hash of every `rows`
    values; `values` (n, 125) uint8, the low bytes of them all."""

    def __init__(self, sets: _Sets, rows: int, file: TemporaryFile) -> None:
        n, count, size = len(sets), _NUM_PERM // rows, np.dtype(np.uint32).itemsize
        behind = count * n * size
        made = iter(sets)
        for start in range(0, n, _CHUNK):
            values = _minhash(list(itertools.islice(made, _CHUNK)))
            for i, band in enumerate(_band_hashes(values, rows)):
                file.write(band.tobytes(), (i * n + start) * size)
            file.write(values.astype(np.uint8).tobytes(), behind + start * _NUM_PERM)
        self.bands = file.mapped(np.uint32, (count, n))
        self.values = file.mapped(np.uint8, (n, _NUM_PERM), behind)


def _minhash(sets: list[np.ndarray]) -> np.ndarray:
    """MinHash values (n, values) uint64 of sets of shingles."""
    import rensa

    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.uint64)
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), offsets, num_perm=_NUM_PERM, seed=1
    )
    return np.array(digests.to_rows(), np.uint64)


def _band_hashes(values: np.ndarray, rows: int) -> np.ndarray:
    """Hash (bands, n) uint32 of every band of the MinHash values (n, values)."""
    bands = _NUM_PERM // rows
    mixed = np.full((bands, len(values)), _HASH_SEED)
    for row in range(rows):
        mixed = (mixed ^ values.T[row : bands * rows : rows]) * _HASH_STEP
        mixed ^= mixed >> np.uint64(32)
    return mixed.astype(np.uint32)


def _likely_pairs(
    values: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray,
    threshold: float,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(left, right, likely) of the candidates that are not joined yet and whose MinHash values agree as often
    as at the threshold, less 3.3 standard deviations, which one pair at the threshold in 2,000 does not;
    likely: less one deviation. Reading the texts instead takes 30 times as long."""
    expected = _NUM_PERM * threshold
    deviation = math.sqrt(expected * (1 - threshold))
    least = expected - 3.3 * deviation
    apart = labels[left] != labels[right]
    left, right = left[apart], right[apart]
    for at in range(0, len(left), 8 * _CHUNK):
        a, b = left[at : at + 8 * _CHUNK], right[at : at + 8 * _CHUNK]
        agree = (values[a] == values[b]).sum(axis=1)
        kept = agree >= least
        yield a[kept], b[kept], agree[kept] >= expected - deviation


def _joined_if_near(
    sets: _Sets,
    left: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels after the candidate pairs that are truly near are joined, and the texts of all other pairs that
    were compared; each set is read once a chunk."""
    apart = labels[left] != labels[right]
    left, right = left[apart], right[apart]
    failed = []
    for start in range(0, len(left), _CHUNK):
        a, b = left[start : start + _CHUNK], right[start : start + _CHUNK]
        read = {i: sets[i] for i in np.unique(np.concatenate([a, b])).tolist()}
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        near = np.array([_similarity(read[i], read[j]) >= threshold - 1e-9 for i, j in pairs], bool)
        labels = joined_labels(labels, a[near], b[near])
        failed += [a[~near], b[~near]]
    return labels, np.concatenate(failed) if failed else left


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets."""
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    place = np.minimum(np.searchsorted(large, small), len(large) - 1)
    common = int(np.count_nonzero(large[place] == small))
    return common / (len(a) + len(b) - common)


def joined_labels(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels after the components of the given pairs are merged."""
    if len(left) == 0:
        return labels
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    ends = np.concatenate([labels[left], labels[right]])
    met, compact = np.unique(ends, return_inverse=True)  # the few labels that these pairs touch
    edges = (np.ones(len(left), np.int8), (compact[: len(left)], compact[len(left) :]))
    graph = csr_array(edges, shape=(len(met), len(met)))
    _, component = connected_components(graph, directed=False)
    renamed = np.arange(int(labels.max()) + 1, dtype=labels.dtype)
    renamed[met] = met[smallest_of_equal(component)]
    return renamed[labels]
