"""Which texts say nearly the same, and a held-out split that no near duplicate crosses.

Near means: Jaccard similarity of the sets of character 5-grams, after NFKC, lower case and without
punctuation, of at least `threshold`. Up to `EXACT_LIMIT` distinct texts the join is exact (prefix
filtering, Bayardo et al. 2007); beyond, MinHash bands propose pairs and the exact similarity
decides. Clusters are the connected components of that relation.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rensa
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from character_grams import gram_hashes, normalized
from errors import UserError
from samples import Sample

SHINGLE = 5  # characters
EXACT_LIMIT = 10_000  # distinct texts up to which every pair above the threshold is found
_NUM_PERM = 125  # MinHash values per text
_WINDOW = 8  # neighbours compared within a bucket of equal MinHash bands
_CHUNK = 1000  # texts whose shingles are in memory together
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
    a, b = shingles(first), shingles(second)
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def near_duplicate_clusters(
    texts: Sequence[str], threshold: float = 0.8, exact_limit: int = EXACT_LIMIT
) -> np.ndarray:
    """Cluster label (n,) int64 per text: the smallest index in its cluster (alone: its own).

    `texts` may be lazy; each is read a few times. Does not depend on their order.
    """
    if len(texts) == 0:
        return np.zeros(0, np.int64)
    keys = np.fromiter((text_key(text) for text in texts), np.uint64, len(texts))
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    join = _join_exact if len(first) <= exact_limit else _join_minhash
    labels = join(texts, first, threshold)[group]
    _, smallest, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return smallest[inverse].astype(np.int64)


def _join_exact(texts: Sequence[str], chosen: np.ndarray, threshold: float) -> np.ndarray:
    """Component label per chosen text. Two sets can only be near when their prefixes, the rarest
    `size - ceil(threshold * size) + 1` shingles, have one in common."""
    sets, sizes = _shingle_matrix(texts, chosen)
    # Columns are numbered from rare to frequent, so the first entries of a row are its rarest.
    prefix_sizes = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    place = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], sizes)
    kept = place < np.repeat(prefix_sizes, sizes)
    starts = np.concatenate([[0], np.cumsum(prefix_sizes)])
    ones = np.ones(int(kept.sum()), np.int32)
    prefixes = csr_array((ones, sets.indices[kept], starts), shape=sets.shape)
    by_shingle = prefixes.T.tocsr()
    labels = np.arange(len(chosen))
    for start in range(0, len(chosen), 256):
        shared = (prefixes[start : start + 256] @ by_shingle).tocoo()
        left, right = shared.coords[0] + start, shared.coords[1]
        for block in _candidate_blocks(left, right, sizes, threshold):
            a, b = (left[block], right[block])
            open_pairs = labels[a] != labels[b]
            a, b = a[open_pairs], b[open_pairs]
            common = sets[a].multiply(sets[b]).sum(axis=1)
            near = _is_near(common, sizes[a], sizes[b], threshold)
            labels = _joined(labels, a[near], b[near])
    return labels


def _candidate_blocks(
    left: np.ndarray, right: np.ndarray, sizes: np.ndarray, threshold: float
) -> Iterator[np.ndarray]:
    """Positions of the pairs whose sizes allow the threshold, in blocks that fit into memory."""
    small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
    allowed = np.flatnonzero((left < right) & (small >= threshold * large - 1e-9))
    for start in range(0, len(allowed), 4096):
        yield allowed[start : start + 4096]


def _shingle_matrix(texts: Sequence[str], chosen: np.ndarray) -> tuple[csr_array, np.ndarray]:
    """Texts x shingles, 0/1, columns ordered from rare to frequent; and the size of every set."""
    rows = [shingles(texts[i]) for i in chosen]
    sizes = np.array([len(row) for row in rows], np.int64)
    _, columns, frequency = np.unique(np.concatenate(rows), return_inverse=True, return_counts=True)
    rank = np.empty(len(frequency), np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(frequency))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shape = (len(rows), len(frequency))
    matrix = csr_array((np.ones(len(columns), np.int32), rank[columns], starts), shape=shape)
    matrix.sort_indices()
    return matrix, sizes


def _join_minhash(texts: Sequence[str], chosen: np.ndarray, threshold: float) -> np.ndarray:
    """Component label per chosen text: pairs with one equal MinHash band, verified exactly.

    Within a bucket a text meets its next `_WINDOW` neighbours only; larger buckets are joined
    through chains. Keeps 4 bytes per text and band.
    """
    bands = _band_hashes(texts, chosen, _rows_per_band(threshold))
    labels = np.arange(len(chosen))
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        for distance in range(1, min(_WINDOW, len(order) - 1) + 1):
            a, b = order[:-distance], order[distance:]
            candidates = np.flatnonzero((band[a] == band[b]) & (labels[a] != labels[b]))
            a, b = a[candidates], b[candidates]
            near = _verify(texts, chosen[a], chosen[b], threshold)
            labels = _joined(labels, a[near], b[near])
    return labels


def _rows_per_band(threshold: float) -> int:
    """The most selective band that still finds a pair at the threshold with probability .999."""
    for rows in range(16, 1, -1):
        if (1 - threshold**rows) ** (_NUM_PERM // rows) <= 0.001:
            return rows
    return 1


def _band_hashes(texts: Sequence[str], chosen: np.ndarray, rows: int) -> np.ndarray:
    """Hash (n, bands) uint32 of every band of the MinHash signature."""
    bands = _NUM_PERM // rows
    result = np.empty((len(chosen), bands), np.uint32)
    in_file_order = np.argsort(chosen)  # lazy texts are read faster in their order
    for start in range(0, len(chosen), _CHUNK):
        places = in_file_order[start : start + _CHUNK]
        sets = [shingles(texts[i]) for i in chosen[places]]
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.uint64)
        digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(sets), offsets, num_perm=_NUM_PERM, seed=1
        )
        values = np.array(digests.to_rows(), np.uint64)[:, : bands * rows]
        mixed = np.full((len(sets), bands), _HASH_SEED)
        for row in range(rows):
            mixed = (mixed ^ values[:, row::rows]) * _HASH_STEP
            mixed ^= mixed >> np.uint64(32)
        result[places] = mixed.astype(np.uint32)
    return result


def _verify(texts: Sequence[str], left: np.ndarray, right: np.ndarray, threshold: float):
    """Exact decision (n,) bool per pair of text indices; each text is shingled once per chunk."""
    near = np.zeros(len(left), bool)
    for start in range(0, len(left), _CHUNK):
        pairs = list(zip(left[start : start + _CHUNK], right[start : start + _CHUNK], strict=True))
        sets = {i: shingles(texts[i]) for i in {i for pair in pairs for i in pair}}
        common = np.array([len(np.intersect1d(sets[a], sets[b], True)) for a, b in pairs])
        sizes = np.array([(len(sets[a]), len(sets[b])) for a, b in pairs])
        near[start : start + len(pairs)] = _is_near(common, sizes[:, 0], sizes[:, 1], threshold)
    return near


def _is_near(common, first_size, second_size, threshold: float):
    return common >= threshold * (first_size + second_size - common) - 1e-9


def _joined(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels after the components of the given pairs are merged."""
    if len(left) == 0:
        return labels
    size = len(labels)
    edges = (np.ones(len(left), np.int8), (labels[left], labels[right]))
    _, component = connected_components(csr_array(edges, shape=(size, size)), directed=False)
    return component[labels]


def split_held_out(samples: Sequence[Sample], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices, both int64 and ascending, such that no near duplicate crosses.

    A cluster (near-equal questions, or near-equal question and answer) is held out when the hash of
    its smallest sample id falls below `fraction`; so the choice depends on content only and stays
    when unrelated samples come or go. A cluster larger than a quarter of the data (or than
    `fraction`) always trains. With 10 samples or more, at least one is held out.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"held-out fraction is {fraction}; give a number from 0 to below 1")
    everything = np.arange(len(samples), dtype=np.int64)
    if fraction == 0 or len(samples) == 0:
        return everything, everything[:0]
    clusters = _split_clusters(samples)
    _, compact, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    position = _cluster_positions(samples, compact, len(sizes))
    eligible = sizes <= max(fraction, 0.25) * len(samples)
    held_out = eligible & (position < fraction)
    if not held_out.any() and len(samples) >= 10:
        held_out[_fallback_cluster(position, sizes, eligible)] = True
    return everything[~held_out[compact]], everything[held_out[compact]]


def _split_clusters(samples: Sequence[Sample]) -> np.ndarray:
    """Label per sample: joined when the questions or the question-answer pairs are near."""
    by_question = near_duplicate_clusters(Texts(samples, question_text))
    by_pair = near_duplicate_clusters(Texts(samples, pair_text))
    return _joined(by_question, np.arange(len(samples)), by_pair)


def _cluster_positions(samples: Sequence[Sample], compact: np.ndarray, count: int) -> np.ndarray:
    """A uniform number in [0, 1) per cluster, from the smallest content hash among its members."""
    smallest = [""] * count
    for index, cluster in enumerate(compact):
        identity = samples[index].id
        if not smallest[cluster] or identity < smallest[cluster]:
            smallest[cluster] = identity
    # Hashed once more: the minimum of many ids is small and would hold out large clusters.
    digests = (hashlib.blake2b(i.encode(), digest_size=8).digest() for i in smallest)
    return np.array([int.from_bytes(d, "big") / 2**64 for d in digests])


def _fallback_cluster(position: np.ndarray, sizes: np.ndarray, eligible: np.ndarray) -> int:
    """The cluster to hold out when the hash chose none: the first eligible, else the smallest."""
    if len(sizes) == 1:
        raise UserError(
            "all samples are near duplicates of each other, so none can be held out without a leak;"
            " set the held-out fraction to 0 or add other samples"
        )
    order = np.lexsort((position, np.where(eligible, 0, sizes)))
    return int(order[0])
