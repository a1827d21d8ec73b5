"""The groups whose losses are shown apart: a sample's difficulty, its source and what its terms are about."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from finetuning.analysis.crypto_terms import categories, find_terms, load_terms
from finetuning.analysis.facts import difficulty, facts_version
from finetuning.common.cache import cached_folder, kept_array
from finetuning.data.split import source_numbers
from finetuning.data.training_data import TrainingData
from finetuning.readers.dataset import SampleSet, map_spans
from finetuning.readers.sample import Sample

DIFFICULTIES = ("1", "2", "3", "4")
NO_CATEGORY = "none"
_POOL_FROM = 20_000  # samples from which on worker processes pay for their start
_LABELS = "labels.npy"

Groups = Mapping[str, tuple[Sequence[str], np.ndarray]]


def groups_of(data: TrainingData) -> tuple[Groups, Groups]:
    """Groups of the documents of the training part's table, and of the held-out part's."""
    split, held_out = data.split, data.held_out
    own = split.eval_read is not None
    sources = sorted(
        {*split.read.samples_per_file, *(split.eval_read.samples_per_file if own else ())}
    )
    common = {"workers": data.workers, "cache_dir": data.cache_dir}
    train = loss_groups(split.read, data.train.tokens.sample_index, sources, **common)
    if not own:
        return train, train
    return train, loss_groups(split.eval_read, held_out.tokens.sample_index, sources, **common)


def loss_groups(
    read: SampleSet,
    sample_index: np.ndarray,
    sources: Sequence[str],
    *,
    workers: int = 1,
    cache_dir: Path | None = None,
) -> Groups:
    """Names and labels by difficulty, source and term category; a document is in one group of each.

    sample_index: (m,) the sample of each document. sources: all names that a source may have. Labels are
    (m,), indices into the names. What takes reading every text is kept in the cache of data that has one.
    """
    levels, subjects = _kept_labels(read, workers, cache_dir)[sample_index].T
    names, numbers = source_numbers(read.samples)
    places = {source: place for place, source in enumerate(sources)}
    of_names = np.array([places[name] for name in names], np.int32)
    return {
        "By_Difficulty_": (DIFFICULTIES, levels),
        "By_Source/": ([s.lstrip("/") for s in sources], of_names[numbers[sample_index]]),
        "By_Category/": ([*categories(), NO_CATEGORY], subjects),
    }


def _kept_labels(read: SampleSet, workers: int, cache_dir: Path | None) -> np.ndarray:
    """(n, 2) uint8: difficulty from 0, and category, of every sample."""

    def made() -> np.ndarray:
        parts = map_spans(label_span, read.samples, workers, pool_from=_POOL_FROM)
        return np.concatenate(list(parts))

    if not (cache_dir and read.key):
        return made()
    folder = (
        Path(cache_dir) / "loss_groups" / f"{read.key}-{facts_version('analysis.sample_groups')}"
    )
    return cached_folder(
        folder,
        lambda folder: kept_array(folder / _LABELS),
        lambda building: np.save(building / _LABELS, made()),
    )


def label_span(samples: Sequence[Sample], start: int, stop: int) -> np.ndarray:
    """(k, 2) uint8: difficulty from 0, and category, of samples[start:stop]."""
    names = [*categories(), NO_CATEGORY]
    labels = [(difficulty(s) - 1, names.index(_category(s))) for s in samples[start:stop]]
    return np.array(labels, np.uint8)


def _category(sample: Sample) -> str:
    """The category of most of the terms in question and answer."""
    terms, counts = load_terms(), {}
    for name, count in find_terms(f"{sample.question}\n{sample.answer}").items():
        category = terms[name].category
        counts[category] = counts.get(category, 0) + count
    return max(counts, key=lambda c: (counts[c], c), default=NO_CATEGORY)
