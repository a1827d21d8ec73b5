"""What is counted on one sample, and tallies of it that merge: a data set is a sum of its chunks.

A `Facts` holds counts only, never texts, so its size depends on how many different values there are
and not on how many samples; only two 8-byte keys per sample stay, to find duplicates. Sums are of
integers, so the order of samples and the number of workers change nothing.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np

from finetuning.analysis import crypto_terms, text_quality
from finetuning.common.cache import code_version, kept_array
from finetuning.common.files import write_json
from finetuning.common.fingerprint import text_digest
from finetuning.common.ngrams import gram_hashes, normalized
from finetuning.common.text import clean_line
from finetuning.data.near_duplicates import context_text, text_key
from finetuning.readers.sample import Sample

LISTED = 200  # findings of one kind and worst samples that are kept by name
COPIED = 0.6  # share of the answer's 8-grams within the thinking from which it counts as copied
_GRAM = 8
_TEMPLATE_TOKENS = 11  # <|im_start|>, roles, newlines, <think> and their ends, of a single turn
# Tokens of the Qwen3 vocabulary per character of each kind (mean error below 6% of a text).
_TOKENS_PER = {"hanzi": 0.547, "letter": 0.465, "digit": 1.397, "other": 0.708}
_COUNTERS = ("counts", "per_file", "difficulty", "terms", "occurrences", "systems")
_RESOLUTION = {"quality": 1e-4, "complexity": 1e-4, "ratio": 1e-2}


class Tally:
    """A distribution that merges: how often each value occurs, values rounded to `resolution`."""

    def __init__(self, resolution: float = 1) -> None:
        self.resolution = resolution
        self.counts: Counter[int] = Counter()

    def add(self, value: float, times: int = 1) -> None:
        self.counts[round(value / self.resolution)] += times

    def merge(self, other: "Tally") -> None:
        self.counts.update(other.counts)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The different values (k,) float64, ascending, and how often each occurs (k,) int64."""
        keys = np.array(sorted(self.counts), np.int64)
        times = np.array([self.counts[int(key)] for key in keys], np.int64)
        # Divided rather than multiplied: 0.29 and not 0.29000000000000004.
        return keys / round(1 / self.resolution), times

    def values(self, at_most: int | None = None) -> np.ndarray:
        """Every value, repeated and ascending, (n,) float64; of more than `at_most` evenly spaced
        ones, the smallest and the largest among them."""
        values, times = self.table()
        if at_most is None or len(self) <= at_most:
            return np.repeat(values, times)
        places = np.linspace(0, len(self) - 1, at_most).astype(np.int64)
        return values[np.searchsorted(np.cumsum(times), places, side="right")]

    def at_most(self, limit: float) -> "Tally":
        """The values up to `limit`."""
        result = Tally(self.resolution)
        scale = round(1 / self.resolution)
        result.counts.update({k: n for k, n in self.counts.items() if k / scale <= limit})
        return result

    def above(self, limit: float) -> int:
        """How many values are greater than `limit`."""
        return len(self) - len(self.at_most(limit))

    def mean(self) -> float | None:
        if not self.counts:
            return None
        total = sum(key * times for key, times in self.counts.items())
        return total / round(1 / self.resolution) / len(self)

    def summary(self) -> dict[str, float]:
        """mean, p50, p90, p99, max (quantiles as numpy.quantile interpolates); empty: {}."""
        if not self.counts:
            return {}
        values, times = self.table()
        ends = np.cumsum(times)
        p50, p90, p99 = (_quantile(values, ends, share) for share in (0.5, 0.9, 0.99))
        return {"mean": self.mean(), "p50": p50, "p90": p90, "p99": p99, "max": float(values[-1])}


def _quantile(values: np.ndarray, ends: np.ndarray, share: float) -> float:
    """numpy.quantile of values that occur several times; `ends` are their cumulative counts."""
    place = share * (int(ends[-1]) - 1)
    neighbours = np.searchsorted(ends, [int(place), math.ceil(place)], side="right")
    return float(np.quantile(values[neighbours], place - int(place)))


@dataclass(frozen=True, order=True)
class Finding:
    """Something to look at, by place."""

    source: str
    line: int
    note: str


@dataclass(frozen=True, order=True)
class WorstSample:
    """The weakest text of a sample."""

    quality: float
    source: str
    line: int
    part: str  # question, thinking or answer
    weakest: str  # component
    excerpt: str


def _lists() -> dict[str, list]:
    return defaultdict(list)


@dataclass
class Facts:
    """Merged counts of some samples; see `observe` for what each one means."""

    counts: Counter[str] = field(default_factory=Counter)
    per_file: Counter[str] = field(default_factory=Counter)
    difficulty: Counter[int] = field(default_factory=Counter)
    terms: Counter[str] = field(default_factory=Counter)  # samples that hold the term
    occurrences: Counter[str] = field(default_factory=Counter)
    systems: Counter[str] = field(
        default_factory=Counter
    )  # samples by the digest of their system text
    tallies: dict[str, Tally] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=_lists)
    worst: list[WorstSample] = field(default_factory=list)
    question_keys: list[np.ndarray] = field(default_factory=list)
    answer_keys: list[np.ndarray] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        if name not in self.tallies:
            self.tallies[name] = Tally(_RESOLUTION.get(name.split("/")[0].split("_")[-1], 1))
        self.tallies[name].add(value)

    def find(self, kind: str, sample: Sample, note: str) -> None:
        self.counts[kind] += 1
        self.findings[kind].append(Finding(sample.source, sample.line, note))

    def merge(self, other: "Facts") -> None:
        """Add the facts of the samples that follow."""
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for name, tally in other.tallies.items():
            if name not in self.tallies:
                self.tallies[name] = Tally(tally.resolution)
            self.tallies[name].merge(tally)
        for kind, found in other.findings.items():
            self.findings[kind] = sorted([*self.findings[kind], *found])[:LISTED]
        self.worst = sorted([*self.worst, *other.worst])[:LISTED]
        self.question_keys += other.question_keys
        self.answer_keys += other.answer_keys


def observe_span(samples: Sequence[Sample], start: int, stop: int) -> Facts:
    """The facts of samples[start:stop]."""
    return observe(samples[start:stop])


def observe(samples: Iterable[Sample]) -> Facts:
    """The facts of some samples, in one pass."""
    facts = Facts()
    question_keys, answer_keys = [], []
    for sample in samples:
        facts.counts["samples"] += 1
        facts.per_file[sample.source] += 1
        facts.systems[text_digest(sample.system)] += 1
        _observe_lengths(facts, sample)
        _observe_terms(facts, sample)
        _observe_quality(facts, sample)
        _observe_thinking(facts, sample)
        question_keys.append(text_key(context_text(sample)))
        answer_keys.append(text_key(sample.answer))
    facts.question_keys.append(np.array(question_keys, np.uint64))
    facts.answer_keys.append(np.array(answer_keys, np.uint64))
    return facts


def _observe_lengths(facts: Facts, sample: Sample) -> None:
    """Characters per segment, and tokens as far as characters tell."""
    question, thinking, answer = len(sample.question), len(sample.thinking), len(sample.answer)
    facts.add("question_chars", question)
    facts.add("answer_chars", answer)
    facts.add("output_chars", thinking + answer)
    if thinking:
        facts.add("thinking_chars", thinking)
    if thinking and answer:
        facts.add("thinking_answer_ratio", thinking / answer)
    earlier = [str(m.get("content") or "") for m in (*sample.history, *sample.tool_turns)]
    prompt = estimate_tokens("\n".join([sample.system, sample.tools, *earlier, sample.question]))
    parts = {"thinking": estimate_tokens(sample.thinking), "answer": estimate_tokens(sample.answer)}
    facts.add("estimated/prompt", prompt)
    for name, tokens in parts.items():
        if tokens:
            facts.add(f"estimated/{name}", tokens)
    facts.add("estimated/total", prompt + sum(parts.values()) + _TEMPLATE_TOKENS)


def estimate_tokens(text: str) -> int:
    """About how many Qwen3 tokens a text is, without the tokenizer."""
    classes = text_quality.character_classes(text)
    hanzi = np.count_nonzero(classes & text_quality.HANZI)
    letters = np.count_nonzero(classes & text_quality.LETTER)
    digits = np.count_nonzero(classes & text_quality.DIGIT)
    other = len(text) - hanzi - letters - digits
    per = _TOKENS_PER
    total = hanzi * per["hanzi"] + letters * per["letter"] + digits * per["digit"]
    return round(total + other * per["other"])


def _observe_terms(facts: Facts, sample: Sample) -> None:
    """Terms of question and answer set complexity and difficulty; the thinking's count as well
    for what occurs at all."""
    pair_text = f"{sample.question}\n{sample.answer}"
    in_pair = crypto_terms.find_terms(pair_text)
    occurring = in_pair + crypto_terms.find_terms(sample.thinking)
    facts.terms.update(occurring.keys())
    facts.occurrences.update(occurring)
    facts.add("distinct_terms", len(in_pair))
    facts.add("complexity", crypto_terms.complexity(in_pair))
    facts.difficulty[difficulty(sample, in_pair)] += 1
    facts.counts["explicit_difficulty"] += sample.difficulty is not None
    everything = f"{pair_text}\n{sample.thinking}"
    for standard in crypto_terms.citation_conflicts(everything):
        note = f"cites {standard.number}, which is about {standard.subject}; the text is not"
        facts.find("citation_conflicts", sample, note)


def difficulty(sample: Sample, terms: Iterable[str] | None = None) -> int:
    """1 to 4: what the data say, else the heuristic of `crypto_terms.difficulty_score`."""
    if sample.difficulty is not None:
        return sample.difficulty
    if terms is None:
        terms = crypto_terms.find_terms(f"{sample.question}\n{sample.answer}")
    score = crypto_terms.difficulty_score(sample.question, sample.answer, terms)
    return crypto_terms.difficulty_level(score)


def _observe_quality(facts: Facts, sample: Sample) -> None:
    """Quality of the question, and of the output: the weaker of thinking and answer. What is of a language
    that can't be judged is counted as such."""
    question = text_quality.text_quality(sample.question, text_quality.QUESTION_WEIGHTS)
    if question is not None:
        facts.add("question_quality", question)
    rated = []
    for part, text, weights in (
        ("thinking", sample.thinking, text_quality.THINKING_WEIGHTS),
        ("answer", sample.answer, text_quality.WEIGHTS),
    ):
        components = text_quality.quality_components(text)
        value = text_quality.quality(components, weights)
        if value is None:
            continue
        rated.append((value, part, _weakest(components, weights), text))
        for name in components.keys() & weights.keys():
            facts.add(f"quality/{name}", components[name])
    if rated:
        value, part, weakest, text = min(rated)
        facts.add("output_quality", value)
        place = (round(value, 4), sample.source, sample.line)
        _keep_worst(facts, WorstSample(*place, part, weakest, clean_line(text, 80)))
    elif sample.thinking or sample.answer:
        facts.counts["not_judged"] += 1


def _weakest(components: dict[str, float], weights: dict[str, float]) -> str:
    present = [name for name in weights if name in components]
    return min(present, key=lambda name: components[name])


def _keep_worst(facts: Facts, candidate: WorstSample) -> None:
    facts.worst.append(candidate)
    if len(facts.worst) > 4 * LISTED:
        facts.worst = sorted(facts.worst)[:LISTED]


def _observe_thinking(facts: Facts, sample: Sample) -> None:
    if not sample.thinking.strip():
        facts.counts["without_thinking"] += 1
        return
    facts.counts["thinking_samples"] += 1
    share = copied_share(sample.answer, sample.thinking)
    if share is not None and share >= COPIED:
        facts.find("answer_copied", sample, f"{share:.0%} of the answer stands in the thinking")


def copied_share(answer: str, thinking: str) -> float | None:
    """Share of the answer's character 8-grams that also occur in the thinking; None when the
    answer is too short to tell (below 20 characters)."""
    answer = normalized(answer)
    if len(answer) < 20:
        return None
    grams = set(gram_hashes(answer, _GRAM).tolist())
    there = set(gram_hashes(normalized(thinking), _GRAM).tolist())
    return len(grams & there) / len(grams)


# -----------------------------------------------------------------------------
# Kept in the cache


def save_facts(facts: Facts, folder: Path) -> None:
    """facts.json and keys.npy; the order of what was counted is not kept."""
    record = {name: sorted(getattr(facts, name).items()) for name in _COUNTERS}
    record["tallies"] = {
        name: [tally.resolution, sorted(tally.counts.items())]
        for name, tally in facts.tallies.items()
    }
    record["findings"] = {kind: list(map(astuple, found)) for kind, found in facts.findings.items()}
    record["worst"] = list(map(astuple, facts.worst))
    write_json(folder / "facts.json", record)
    keys = [np.concatenate(facts.question_keys), np.concatenate(facts.answer_keys)]
    np.save(folder / "keys.npy", np.stack(keys))


def load_facts(folder: Path) -> Facts | None:
    """What `save_facts` wrote; None where it is not there or damaged."""
    keys = kept_array(folder / "keys.npy")
    try:
        record = json.loads((folder / "facts.json").read_bytes())
    except (OSError, ValueError):
        return None
    if keys is None:
        return None
    facts = Facts(question_keys=[keys[0]], answer_keys=[keys[1]])
    for name in _COUNTERS:
        getattr(facts, name).update(dict(record[name]))
    for name, (resolution, counts) in record["tallies"].items():
        facts.tallies[name] = Tally(resolution)
        facts.tallies[name].counts.update(dict(counts))
    for kind, found in record["findings"].items():
        facts.findings[kind] = [Finding(*finding) for finding in found]
    facts.worst = [WorstSample(*sample) for sample in record["worst"]]
    return facts


def facts_version(*more: str) -> str:
    """`code_version` of all by which samples are judged, and of `more` modules."""
    judges = (
        *("analysis.facts", "analysis.text_quality", "analysis.crypto_terms"),
        *("common.ngrams", "data.near_duplicates"),
    )
    lists = sorted(crypto_terms.TERMS_FOLDER.glob("*.tsv"))
    return code_version(*judges, *more, files=lists, libraries=("rjieba", "ahocorasick_rs"))
