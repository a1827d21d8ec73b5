"""Statistics of a data set: sizes, lengths, terms, quality, duplicates and leaks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.analysis import crypto_terms, report
from finetuning.analysis.duplicates import (
    Duplicates,
    Leaks,
    find_duplicates,
    find_leaks,
    held_out_leaks,
)
from finetuning.analysis.facts import (
    Facts,
    Tally,
    facts_version,
    load_facts,
    observe_span,
    save_facts,
)
from finetuning.common.cache import cached_folder
from finetuning.common.errors import UserError
from finetuning.common.files import strict
from finetuning.data.near_duplicates import SampleClusters
from finetuning.data.training_data import TrainingData
from finetuning.readers.dataset import SampleSet, map_spans
from finetuning.readers.sample import BrokenSample, Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetuning.data.token_table import TokenizedSamples


SEQUENCE_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
QUALITY_BOUNDARIES = (0.5, 0.75, 0.9)  # level 1 is below the first, level 4 from the last
MANY_TERMS = 10  # Crypto_Terms_10 counts samples with ten different terms or more
TOLERATED = 0.001  # share of samples that the advised sequence length may exceed

_POOL_FROM = 2_000  # samples from which on worker processes pay for their start
_FORECAST_SAMPLES = 50_000  # lengths that the packing forecast looks at
_SHOWN_VALUES = 100_000  # values of one histogram
_SEGMENTS = {0: "prompt", 1: "thinking", 3: "answer"}  # codes of token_table.Segment


@dataclass(frozen=True)
class TokenLengths:
    """Tokens per segment, exact from a tokenizer or estimated from characters."""

    exact: bool
    tallies: dict[str, Tally]  # prompt, thinking, answer, total
    truncation: dict[str, int] = field(
        default_factory=dict
    )  # samples, by what truncation did to them
    limit: int | None = None  # above which the lengths of truncated or dropped samples are unknown


@dataclass(frozen=True)
class DatasetStatistics:
    """All statistics of a data set. Every number of `scalars` is also in `to_json`."""

    facts: Facts
    duplicates: Duplicates
    tokens: TokenLengths
    max_seq_length: int | None
    broken: tuple[BrokenSample, ...]

    @property
    def total_samples(self) -> int:
        return self.facts.counts["samples"]

    def scalars(self) -> dict[str, float]:
        """Every number under its tag "Dataset/…"; what is unknown is absent. Lengths in characters
        unless the tag says tokens; token counts only where a tokenizer made them."""
        return {f"Dataset/{name}": float(value) for name, value in self._numbers().items()}

    def _numbers(self) -> dict[str, float]:
        """The known numbers by the last part of their tag; counts are int."""
        values = {**self._sample_scalars(), **self._duplicate_scalars()}
        if self.tokens.exact:
            values |= self._token_scalars()
        return {name: value for name, value in values.items() if value is not None}

    def _sample_scalars(self) -> dict[str, float | None]:
        facts, total = self.facts, self.total_samples
        copied = facts.counts["answer_copied"]
        result = {
            "Total_Samples": total,
            "Broken_Samples": len(self.broken),
            "Avg_Instruction_Length": self._mean("question_chars"),
            "Avg_Thinking_Length": self._mean("thinking_chars"),
            "Avg_Answer_Length": self._mean("answer_chars"),
            "Avg_Output_Length": self._mean("output_chars"),
            "Thinking_Samples_Percent": 100 * facts.counts["thinking_samples"] / total,
            "Thinking_Answer_Ratio_P50": self._tally("thinking_answer_ratio").summary().get("p50"),
            "Avg_Instruction_Quality": self._mean("question_quality"),
            "Avg_Output_Quality": self._mean("output_quality"),
            "Avg_Crypto_Complexity": self._mean("complexity"),
            "Answer_Copied_Into_Thinking": copied,
            "Citation_Conflicts": facts.counts["citation_conflicts"],
        }
        result |= _counts_and_percents("Difficulty", facts.difficulty, total)
        judged = len(self._tally("output_quality"))
        if judged:
            result |= _counts_and_percents("Quality_Level", self._quality_levels(), judged)
        terms = self._tally("distinct_terms")
        for k in range(MANY_TERMS):
            result[f"Crypto_Terms_{k}_Count"] = terms.counts[k]
        result[f"Crypto_Terms_{MANY_TERMS}_Count"] = terms.above(MANY_TERMS - 1)
        for name, tally in sorted(facts.tallies.items()):
            if name.startswith("quality/"):
                result[f"Quality_{_tag(name.split('/')[1])}"] = tally.mean()
        return result

    def _duplicate_scalars(self) -> dict[str, float | None]:
        return {
            "Exact_Duplicates": self.duplicates.exact,
            "Near_Duplicates": self.duplicates.near,
            "Conflicting_Answers": self.duplicates.conflicting_questions,
            "Train_Eval_Leaks": self.duplicates.leaks,
        }

    def _token_scalars(self) -> dict[str, float | None]:
        result: dict[str, float | None] = {}
        for name, tally in self.tokens.tallies.items():
            for key, value in tally.summary().items():
                result[f"{_tag(name)}_Tokens_{key.title()}"] = value
        for length, percent in self.exceeding().items():
            result[f"Exceeding_{length}_Percent"] = percent
        result["Advised_Max_Seq_Length"] = self.advised_max_seq_length()
        if self.max_seq_length:
            result["Packing_Efficiency_Percent"] = self.packing_forecast().get(self.max_seq_length)
        if truncation := self.tokens.truncation:
            documents = len(self.tokens.tallies["total"]) + truncation["dropped"]
            result["Truncated_Percent"] = 100 * truncation["truncated"] / max(1, documents)
            names = ("lost_think_close", "lost_answer", "lost_eos", "dropped", "control_tokens")
            result |= {_tag(name): truncation[name] for name in names}
        return result

    def _tally(self, name: str) -> Tally:
        return self.facts.tallies.get(name) or Tally()

    def _mean(self, name: str) -> float | None:
        return self._tally(name).mean()

    def _quality_levels(self) -> dict[int, int]:
        values, times = self._tally("output_quality").table()
        levels = 1 + np.searchsorted(QUALITY_BOUNDARIES, values, side="right")
        return {k: int(times[levels == k].sum()) for k in range(1, 5)}

    def exceeding(self) -> dict[int, float]:
        """Percent of the samples longer than each length of `SEQUENCE_LENGTHS`, in tokens; a
        length is absent where truncation hid how many there were."""
        lengths, truncation = self.tokens.tallies["total"], self.tokens.truncation
        dropped, truncated = truncation.get("dropped", 0), truncation.get("truncated", 0)
        limit = self.tokens.limit if truncated else None
        result = {}
        for length in SEQUENCE_LENGTHS:
            if limit is None or length < limit:
                count = lengths.above(length) + dropped
            elif length == limit:
                count = truncated
            else:
                break
            result[length] = 100 * count / max(1, len(lengths) + dropped)
        return result

    def advised_max_seq_length(self) -> int | None:
        """The shortest of `SEQUENCE_LENGTHS` that at most `TOLERATED` of the samples exceed."""
        fitting = (k for k, percent in self.exceeding().items() if percent <= 100 * TOLERATED)
        return next(fitting, None)

    def packing_forecast(self) -> dict[int, float]:
        """Percent of the tokens in full rows that are no padding, by row length, when samples are
        packed; longer samples are left out. Rows in which nothing fits are absent."""
        total = self.tokens.tallies["total"]
        lengths = sorted({*SEQUENCE_LENGTHS, self.max_seq_length or SEQUENCE_LENGTHS[0]})
        fitting = {n: total.at_most(n).values(_FORECAST_SAMPLES) for n in lengths}
        forecast = {n: packing_efficiency(values, n) for n, values in fitting.items()}
        return {n: 100 * share for n, share in forecast.items() if share is not None}

    def histograms(self) -> dict[str, np.ndarray]:
        """Values (n,) per tag, for histograms of lengths, quality and complexity; of more than
        `_SHOWN_VALUES` so many evenly spaced ones, which have the same shape."""
        names = ("question_chars", "thinking_chars", "answer_chars", "question_quality")
        names += ("output_quality", "complexity", "distinct_terms")
        tallies = {n: self._tally(n) for n in names}
        if self.tokens.exact:
            tallies |= {f"{name}_tokens": tally for name, tally in self.tokens.tallies.items()}
        shown = {name: tally.values(_SHOWN_VALUES) for name, tally in tallies.items()}
        result = {f"Dataset/{_tag(name)}_Histogram": values for name, values in shown.items()}
        return {tag: values for tag, values in result.items() if len(values)}

    def figures(self) -> "dict[str, Figure]":
        """Pictures of lengths and terms, by tag. Close them after use."""
        return report.figures(self.to_json())

    def pictures(self) -> "dict[str, Callable[[], Figure]]":
        """The functions that draw `figures`, by tag; matplotlib is not needed before the call."""
        return report.pictures(self.to_json())

    def summary_markdown(self) -> str:
        """Tables of everything, with what to look at first."""
        return report.markdown(self.to_json())

    def warnings(self) -> list[str]:
        """What a person should know before training, worst first."""
        return list(_warnings(self))

    def worst_samples(self) -> list[dict[str, Any]]:
        """Samples with the lowest quality, worst first: quality, source, line, part, weakest, …"""
        return [asdict(sample) for sample in sorted(self.facts.worst)[:20]]

    def to_json(self) -> dict[str, Any]:
        """Everything as strict JSON. Scalars bear their tag's name in small letters."""
        facts = self.facts
        findings = {**facts.findings, **self.duplicates.findings}
        return strict(
            {
                **{name.lower(): value for name, value in self._numbers().items()},
                "samples_per_file": dict(sorted(facts.per_file.items())),
                "thinking_samples": facts.counts["thinking_samples"],
                "samples_without_thinking": facts.counts["without_thinking"],
                "samples_with_explicit_difficulty": facts.counts["explicit_difficulty"],
                "outputs_not_judged": facts.counts["not_judged"],
                "broken": [asdict(record) for record in self.broken],
                "warnings": self.warnings(),
                "characters": {
                    name: self._tally(f"{name}_chars").summary()
                    for name in ("question", "thinking", "answer", "output")
                },
                "thinking_answer_ratio": self._tally("thinking_answer_ratio").summary(),
                "tokens": {k: tally.summary() for k, tally in self.tokens.tallies.items()},
                "tokens_are_exact": self.tokens.exact,
                "token_histogram": _binned(self.tokens.tallies),
                "truncation": self.tokens.truncation,
                "max_seq_length": self.max_seq_length,
                "exceeding_percent": self.exceeding(),
                "packing_efficiency_percent_by_length": self.packing_forecast(),
                "advised_max_seq_length": self.advised_max_seq_length(),
                "terms": dict(sorted(facts.terms.items(), key=lambda item: (-item[1], item[0]))),
                "term_occurrences": sum(facts.occurrences.values()),
                "terms_by_category": _by_category(facts.occurrences),
                "findings": {k: [asdict(f) for f in sorted(v)] for k, v in findings.items()},
                "worst_samples": self.worst_samples(),
            }
        )


def _tag(name: str) -> str:
    """ "answer_chars" as a part of a tag: "Answer_Chars"."""
    return name.replace("_", " ").title().replace(" ", "_").replace("Eos", "EOS")


def _counts_and_percents(name: str, counts: dict[int, int], total: int) -> dict[str, float]:
    result = {}
    for k in range(1, 5):
        result[f"{name}_{k}_Count"] = counts.get(k, 0)
        result[f"{name}_{k}_Percent"] = 100 * counts.get(k, 0) / total
    return result


def _by_category(occurrences: dict[str, int]) -> dict[str, int]:
    terms = crypto_terms.load_terms()
    result = dict.fromkeys(crypto_terms.categories(), 0)
    for name, count in occurrences.items():
        result[terms[name].category] += count
    return result


def _binned(tallies: dict[str, Tally]) -> dict[str, list[int]]:
    """Samples per power-of-two bin of tokens: up to 16, 32, … for pictures."""
    edges = [0, *(2**k for k in range(4, 17)), np.inf]
    result = {}
    for name, tally in tallies.items():
        values, times = tally.table()
        result[name] = np.histogram(np.maximum(values - 0.5, 0), edges, weights=times)[0].tolist()
    return result


def packing_efficiency(lengths: np.ndarray, row_tokens: int) -> float | None:
    """Tokens / (rows x row_tokens) of first-fit-decreasing packing; None without lengths.

    Looks at evenly spaced quantiles when there are more than `_FORECAST_SAMPLES`.
    """
    lengths = np.sort(np.asarray(lengths, np.int64))
    if len(lengths) == 0:
        return None
    if len(lengths) > _FORECAST_SAMPLES:
        lengths = lengths[np.linspace(0, len(lengths) - 1, _FORECAST_SAMPLES).astype(np.int64)]
    # Rows by free space: best fit over distinct free spaces, as many rows may share one.
    free = np.zeros(row_tokens + 1, np.int64)
    rows = 0
    for length in lengths[::-1].tolist():
        offset = int(np.argmax(free[length:] > 0)) + length
        if free[offset] == 0:
            rows += 1
            offset = row_tokens
        else:
            free[offset] -= 1
        free[offset - length] += offset > length
    return float(lengths.sum() / (rows * row_tokens))


# -----------------------------------------------------------------------------
# Computing


def describe(data: TrainingData) -> DatasetStatistics:
    """Statistics of everything that was read for a run."""
    split, read, folder = data.split, data.split.read, None
    if data.cache_dir and read.key:
        folder = Path(data.cache_dir) / "sample_facts" / f"{read.key}-{facts_version()}"
    return compute_statistics(
        read,
        held_out=split.held_out if split.eval_read is None else None,
        leaks=_leaks_into_held_out_files(data),
        tokens=data.train.tokens,
        max_seq_length=data.max_seq_length,
        workers=data.workers,
        clusters=split.clusters,
        facts_folder=folder,
    )


def _leaks_into_held_out_files(data: TrainingData) -> Leaks | None:
    read, eval_read = data.split.read, data.split.eval_read
    if eval_read is None:
        return None
    fingerprint = f"{read.fingerprint}-{eval_read.fingerprint}"
    options = {"fingerprint": fingerprint, "cache_dir": data.cache_dir}
    return find_leaks(read.samples, eval_read.samples, **options)


def compute_statistics(
    read: Sequence[Sample] | SampleSet,
    *,
    held_out: Sequence[int] | np.ndarray | None = None,
    leaks: Leaks | None = None,
    tokens: "TokenizedSamples | None" = None,
    max_seq_length: int | None = None,
    workers: int = 1,
    clusters: SampleClusters | None = None,
    facts_folder: Path | None = None,
) -> DatasetStatistics:
    """Statistics of all samples; those with an index in `held_out` are checked for leaks, or `leaks` says
    what `find_leaks` has found in held-out files of their own. A `SampleSet` brings its broken records.
    `clusters` are theirs, where they have been looked for already. `facts_folder` is where in the cache
    the facts of these samples are, or are to be kept.

    With `tokens`, lengths in tokens are exact, otherwise they are estimated and kept out of
    `scalars`. The result does not depend on the order of the samples or on `workers`.
    Raises UserError without samples.
    """
    samples, broken = (read.samples, read.broken) if isinstance(read, SampleSet) else (read, ())
    if len(samples) == 0:
        raise UserError("no sample to describe; check the paths and the list of broken records")
    facts = kept_facts(samples, workers, facts_folder)
    clusters = clusters or SampleClusters(samples)
    if held_out is not None:
        leaks = held_out_leaks(samples, clusters, np.asarray(held_out))
    duplicates = find_duplicates(samples, facts, leaks, clusters)
    facts.question_keys = facts.answer_keys = []  # the statistics live as long as a run
    return DatasetStatistics(
        facts=facts,
        duplicates=duplicates,
        tokens=_exact_lengths(tokens) if tokens is not None else _estimated_lengths(facts),
        max_seq_length=max_seq_length,
        broken=(*broken, *(tokens.truncation.broken if tokens is not None else ())),
    )


def observed(samples: Sequence[Sample], workers: int) -> Iterator[Facts]:
    """Facts of consecutive spans, in order."""
    return map_spans(observe_span, samples, workers, pool_from=_POOL_FROM)


def kept_facts(samples: Sequence[Sample], workers: int, folder: Path | None) -> Facts:
    """The facts of all samples: from a folder of the cache, where they are put if they are not there."""

    def made() -> Facts:
        facts = Facts()
        for part in observed(samples, workers):
            facts.merge(part)
        return facts

    if folder is None:
        return made()
    return cached_folder(folder, load_facts, lambda building: save_facts(made(), building))


def _estimated_lengths(facts: Facts) -> TokenLengths:
    names = ("prompt", "thinking", "answer", "total")
    return TokenLengths(False, {n: facts.tallies.get(f"estimated/{n}") or Tally() for n in names})


def _exact_lengths(tokens: "TokenizedSamples") -> TokenLengths:
    """Tokens per segment of every document; one that lacks a segment does not count there."""
    tallies = {"total": _tally_of(tokens.lengths)}
    for number, name in _SEGMENTS.items():
        tallies[name] = _tally_of(tokens.segment_counts[:, number])
        del tallies[name].counts[0]
    listed = asdict(tokens.truncation).items()
    truncation = {name: len(ids) for name, ids in listed if isinstance(ids, tuple)}
    return TokenLengths(True, tallies, truncation, tokens.max_seq_length)


def _tally_of(values: np.ndarray) -> Tally:
    """Of non-negative integers (n,), which may be a mapped file."""
    tally = Tally()
    for start in range(0, len(values), 1 << 16):
        found, times = np.unique(values[start : start + (1 << 16)], return_counts=True)
        tally.counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    return tally


# -----------------------------------------------------------------------------
# What to say about it


def _warnings(stats: DatasetStatistics) -> Iterator[str]:
    facts, found, total = stats.facts, stats.duplicates, stats.total_samples
    if stats.broken:
        yield f"{len(stats.broken)} records could not be read and are left out"
    if found.leaks:
        yield f"{found.leaks} held-out samples (nearly) repeat training samples; the eval loss flatters"
    without = facts.counts["without_thinking"]
    if without:
        yield (
            f"{without} of {total} samples have no thinking to learn; --empty-thinking says what becomes"
            " of them"
        )
    if found.conflicting_questions:
        yield f"{found.conflicting_questions} questions have several different answers"
    if found.exact or found.near:
        yield f"{found.exact} exact and {found.near} near duplicates; they count more than once"
    if facts.counts["citation_conflicts"]:
        yield (
            f"{facts.counts['citation_conflicts']} citations name a standard about something else"
        )
    if facts.counts["answer_copied"]:
        yield f"{facts.counts['answer_copied']} thinkings contain most of their answer word for word"
    yield from _length_warnings(stats)


def _length_warnings(stats: DatasetStatistics) -> Iterator[str]:
    limit, lengths = stats.max_seq_length, stats.tokens.tallies["total"]
    over = stats.tokens.truncation.get("truncated", 0)
    over = over or (lengths.above(limit) if limit else 0)
    about = "" if stats.tokens.exact else "about "
    if over:
        yield f"{about}{over} samples are longer than max_seq_length {limit}"
    low = stats._quality_levels()[1]
    if low:
        yield f"{low} outputs are damaged (quality below {QUALITY_BOUNDARIES[0]})"
