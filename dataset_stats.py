"""What is in the data, what is wrong with it and how long it is, before a GPU hour is spent.

    python dataset_stats.py data/raw                      report with bars, and an HTML page
    python dataset_stats.py data/raw --json               one JSON object on standard output
    python dataset_stats.py train.jsonl --compare test.jsonl      side by side, with leaks

One pass over the samples gives mergeable `Facts` (also in parallel); duplicates and leaks are found
from keys and, for near ones, by reading the texts once more.
"""

from finetuning.common import process  # first: Ctrl-C gets an answer while the libraries are loaded

if __name__ == "__main__":
    process.imports_begin()

import sys
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from finetuning.common.arguments import parsed
from finetuning.common.errors import UserError, exit_code
from finetuning.common.files import atomic_write_text
from finetuning.common.language import translated
from finetuning.common.paths import check_place, expanded
from finetuning.common.text import clean_line
from finetuning.config import DataSettings
from finetuning.readers.files import check_paths

if TYPE_CHECKING:
    from finetuning.data.token_table import TokenizedSamples
    from finetuning.readers.dataset import SampleSet

process.imports_are_done()


_NO_LIMIT = 2**31 - 1  # tokens of a sample


def main(
    paths: tyro.conf.Positional[tuple[str, ...]],
    /,
    compare: tuple[str, ...] = (),
    json: bool = False,
    html: Path | None = None,
    max_seq_length: int | None = None,
    tokenizer: Path | None = None,
    workers: int = 1,
) -> None:
    """Statistics of training data: a report with bars and an HTML page, or one JSON object.

    Args:
        paths: Files, folders, globs or datasets of the hub (hf://datasets/owner/name).
        compare: Another data set, shown beside the first and searched for its samples.
        json: Print one JSON object and nothing else.
        html: Where the page goes; dataset_statistics.html when not given and not --json.
        max_seq_length: Tokens that a sample may have in your training.
        tokenizer: Folder of a model whose tokenizer counts tokens exactly; without, an estimate.
        workers: Processes that read and analyse.
    """
    tokenizer = tokenizer and Path(expanded(str(tokenizer), "--tokenizer"))
    page = Path(expanded(str(html or "dataset_statistics.html"), "--html"))
    if html or not json:
        check_place(page, "--html")
    _check(paths, compare, max_seq_length, tokenizer, workers)

    from finetuning.analysis import report  # slow; what is wrong is said before

    result = _described(paths, compare, max_seq_length, tokenizer, workers)
    if json:
        print(dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        report.print_report(result)
    if html or not json:
        atomic_write_text(page, report.html_page(result))
        print(translated(f"Report as a page: {page}"), file=sys.stderr if json else sys.stdout)


def _check(
    paths: Sequence[str],
    compare: Sequence[str],
    max_seq_length: int | None,
    tokenizer: Path | None,
    workers: int,
) -> None:
    """Raise UserError for what can be known to be wrong before anything is read."""
    if not paths:
        raise UserError("no path given; name a file, a folder or a glob")
    if max_seq_length is not None and max_seq_length < 2:
        raise UserError(f"max_seq_length is {max_seq_length}; give at least 2 tokens")
    if workers < 1:
        raise UserError(f"workers is {workers}, must be at least 1")
    if tokenizer and not tokenizer.is_dir():
        raise UserError(f"tokenizer: {clean_line(str(tokenizer), 200)} is no folder of a model")
    check_paths(DataSettings(data_path=tuple(paths), eval_path=tuple(compare)))


def _described(
    paths: Sequence[str],
    compare: Sequence[str],
    max_seq_length: int | None,
    tokenizer: Path | None,
    workers: int,
) -> dict[str, Any]:
    """The JSON of one data set; with another to compare, that one's under "compare"."""
    from finetuning.analysis.duplicates import find_leaks
    from finetuning.analysis.statistics import compute_statistics
    from finetuning.readers.dataset import read_samples

    def statistics_of(data: "SampleSet") -> dict[str, Any]:
        tokens = _exact_tokens(data, tokenizer, workers) if tokenizer else None
        options = {"tokens": tokens, "max_seq_length": max_seq_length, "workers": workers}
        return compute_statistics(data, **options).to_json()

    data = read_samples(paths, workers=workers)
    result = statistics_of(data)
    if compare:
        other = read_samples(compare, workers=workers)
        leaks, found = find_leaks(data.samples, other.samples)
        leaked = {"leaks": leaks, "leak_findings": [asdict(finding) for finding in found]}
        result["compare"] = {**statistics_of(other), **leaked}
    return result


def _exact_tokens(data: "SampleSet", folder: Path, workers: int) -> "TokenizedSamples":
    """Every sample as the model would see it, none cut or left out."""
    from transformers import AutoTokenizer

    from finetuning.common.cache import temporary_folder
    from finetuning.data.tokenization import tokenize_samples

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        place, reason = clean_line(str(folder), 200), clean_line(str(error), 200)
        raise UserError(f"tokenizer: {place} holds none that can be loaded: {reason}") from error
    settings = DataSettings(max_seq_length=_NO_LIMIT, control_tokens="split")
    options = {"cache_dir": temporary_folder(), "workers": workers}
    return tokenize_samples(data, tokenizer, settings, **options)


if __name__ == "__main__":
    process.exit_process(exit_code(lambda: parsed("dataset_stats.py", main)()))
