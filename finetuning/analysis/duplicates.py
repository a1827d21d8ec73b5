"""Samples that repeat or contradict others, and held-out samples that stand in the training data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetuning.analysis.facts import LISTED, Facts, Finding
from finetuning.data.near_duplicates import SampleClusters, jaccard, pair_text, smallest_of_equal
from finetuning.readers.sample import Sample

_PLACES = 8  # of other answers to a question that one finding names

Leaks = tuple[int, list[Finding]]
"""How many held-out samples repeat training samples, and the first of them."""


@dataclass(frozen=True)
class Duplicates:
    """Samples that repeat others; the findings name each and its partner, the first `LISTED`."""

    exact: int  # samples beyond the first with equal question and answer
    near: int  # further samples whose question and answer are nearly those of another
    conflicting_questions: int  # questions with more than one different answer
    leaks: int | None  # held-out samples that (nearly) repeat a training sample; None: no split
    findings: dict[str, list[Finding]]


def find_duplicates(
    samples: Sequence[Sample],
    facts: Facts,
    leaks: Leaks | None,
    clusters: SampleClusters,
) -> Duplicates:
    """Samples that repeat or contradict others, by the keys of their texts and the clusters of near ones."""
    questions, pairs = np.concatenate(facts.question_keys), np.concatenate(facts.answer_keys)
    pairs *= np.uint64(0x9E3779B97F4A7C15)
    pairs ^= questions
    groups = smallest_of_equal(pairs)
    distinct, near_groups = _count(groups), _count(clusters.pairs)
    conflicts = _conflicting(questions, groups)
    findings = {
        "exact_duplicates": _repeats(samples, groups, "same question and answer as"),
        "near_duplicates": _near_repeats(samples, clusters.pairs, groups),
        "conflicting_answers": _conflict_findings(samples, conflicts),
    }
    number = None
    if leaks is not None:
        number, findings["train_eval_leaks"] = leaks
    exact = len(samples) - distinct
    return Duplicates(exact, distinct - near_groups, len(conflicts), number, findings)


def _count(labels: np.ndarray) -> int:
    """How many groups there are, labelled by their smallest index."""
    return int(np.count_nonzero(labels == np.arange(len(labels))))


def _members(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of every group of equal labels with at least two members."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(order))
    several = ends - starts > 1
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        yield order[start:end]


def _place(sample: Sample) -> str:
    return f"{sample.source}:{sample.line}"


def _repeats(samples: Sequence[Sample], labels: np.ndarray, words: str) -> list[Finding]:
    """A finding for each member of a group beyond the first by place."""
    found: list[Finding] = []
    for group in _members(labels):
        first, *others = _by_place(samples, group)
        found += [Finding(s.source, s.line, f"{words} {_place(first)}") for s in others]
        if len(found) >= LISTED:
            break
    return sorted(found)[:LISTED]


def _by_place(samples: Sequence[Sample], group: Sequence[int]) -> list[Sample]:
    chosen = [samples[int(i)] for i in group[: LISTED + 1]]
    return sorted(chosen, key=lambda s: (s.source, s.line))


def _near_repeats(
    samples: Sequence[Sample], clusters: np.ndarray, groups: np.ndarray
) -> list[Finding]:
    """A finding for each different pair of a cluster beyond the first, with the similarity."""
    found: list[Finding] = []
    for cluster in _members(clusters):
        distinct = cluster[np.unique(groups[cluster], return_index=True)[1]]
        first, *others = _by_place(samples, distinct)
        for sample in others:
            share = jaccard(pair_text(first), pair_text(sample))
            note = f"near duplicate of {_place(first)} (similarity {share:.2f})"
            found.append(Finding(sample.source, sample.line, note))
        if len(found) >= LISTED:
            break
    return sorted(found)[:LISTED]


def _conflicting(questions: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Per question with several different answers, one index of each answer."""
    result = []
    for same in _members(questions):
        firsts = np.unique(groups[same], return_index=True)[1]
        if len(firsts) > 1:
            result.append(same[firsts])
    return result


def _conflict_findings(samples: Sequence[Sample], conflicts: list[np.ndarray]) -> list[Finding]:
    found = []
    for group in conflicts[:LISTED]:
        first, *others = _by_place(samples, group)
        more = f" and {len(others) - _PLACES} more" if len(others) > _PLACES else ""
        places = ", ".join(_place(sample) for sample in others[:_PLACES]) + more
        note = f"{len(group)} different answers to one question, also at {places}"
        found.append(Finding(first.source, first.line, note))
    return sorted(found)


def held_out_leaks(
    samples: Sequence[Sample], clusters: SampleClusters, held_out: np.ndarray
) -> Leaks:
    """Held-out samples whose question, or question with answer, (nearly) stands in training."""
    is_train = np.ones(len(samples), bool)
    is_train[held_out] = False
    train, held_out = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    leaking: dict[int, int] = {}  # held-out index: a training index
    for labels in (clusters.questions, clusters.pairs):
        first = np.full(len(samples), len(samples))  # training sample of each cluster
        np.minimum.at(first, labels[train], train)
        partners = first[labels[held_out]]
        for index, partner in zip(held_out.tolist(), partners.tolist(), strict=True):
            if partner < len(samples):
                leaking.setdefault(index, partner)
    found = []
    for index, train in sorted(leaking.items())[:LISTED]:
        note = f"held out, but (nearly) repeats {_place(samples[train])} of the training samples"
        found.append(Finding(samples[index].source, samples[index].line, note))
    return len(leaking), sorted(found)


class _Both(Sequence):
    """The samples of one data set followed by those of another."""

    def __init__(self, first: Sequence[Sample], second: Sequence[Sample]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, index: int) -> Sample:
        inside = index < len(self._first)
        return self._first[index] if inside else self._second[index - len(self._first)]

    def __iter__(self) -> Iterator[Sample]:
        yield from self._first
        yield from self._second


def find_leaks(
    first: Sequence[Sample],
    second: Sequence[Sample],
    *,
    fingerprint: str | None = None,
    cache_dir: Path | None = None,
) -> Leaks:
    """How many samples of `second` (nearly) repeat one of `first`, and which, the first `LISTED`.
    The search is kept in the cache under the fingerprint of both, where there are these two."""
    both = _Both(first, second)
    clusters = SampleClusters(both, fingerprint, cache_dir)
    return held_out_leaks(both, clusters, np.arange(len(first), len(both)))
