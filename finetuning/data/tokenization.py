"""`Sample`s → token ids with a segment for every token, through the tokenizer's own chat template.

The generation prompt, exactly as it is at inference, is the prefix of every document and carries no
loss; what the template puts behind it does: reasoning, `</think>`, answer, end of turn. Prompt and
completion are encoded apart, so that no token reaches across their border.

A sample without reasoning gets what the template writes for it; Qwen3's writes an empty think block,
which would teach a thinking model not to think. By default that block counts as prompt, so that it carries no
loss: the model learns the answer alone. Such samples are listed in the truncation report.
A sample that the template refuses, or does not give as it is, is broken, and listed there with the reason.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.common.cache import cached_folder, code_version
from finetuning.common.errors import UserError
from finetuning.common.text import clean_line
from finetuning.common.workers import in_order
from finetuning.config import DataSettings
from finetuning.data.chat_template import ChatFormat, chat_format, encode, unused_mark
from finetuning.data.rendering import Document, Renderer
from finetuning.data.template_limits import TemplateLimitError
from finetuning.data.token_table import (
    Segment,
    TokenizedSamples,
    TokenPart,
    TruncationReport,
    less_of,
    load_tokens,
    tokens_in_memory,
    write_tokens,
)
from finetuning.data.tokenizer_probe import check_tokenizer
from finetuning.data.verification import RenderingFault
from finetuning.readers.dataset import Progress, SampleSet
from finetuning.readers.sample import BrokenSample, Finding, NothingLeftError, Sample, strings_of

_CHUNK = 500  # samples encoded together: more only costs memory
_POOL_FROM = 2_000  # samples from which on worker processes pay for their start


# ---- samples → tokens ----------------------------------------------------------------------


def _contents(sample: Sample) -> Iterator[str]:
    yield from strings_of(sample.content)
    if sample.tools:
        yield from strings_of(json.loads(sample.tools))  # \\u003c in JSON is < once it is read


def _has_control(sample: Sample, form: ChatFormat) -> bool:
    return any(form.control.search(text) for text in _contents(sample))


_Part = tuple[dict[str, np.ndarray], dict[str, list]]  # arrays and report of some samples


def _tokenize_range(
    samples: Sequence[Sample], start: int, stop: int, renderer: Renderer, settings: DataSettings
) -> _Part:
    """Tokens and truncation report of samples[start:stop]; a function of these samples alone."""
    part, documents, owners = TokenPart(), [], []
    for index, sample in enumerate(samples[start:stop], start):
        holds_control = _has_control(sample, renderer.form)
        if holds_control:
            part.truncation["control_tokens"].append(sample.id)
            if settings.control_tokens == "refuse":
                continue
        try:
            mark = unused_mark(_contents(sample)) if holds_control else ""
            made, turns = renderer.documents(sample, mark)
        except TemplateLimitError:
            raise
        except (RenderingFault, UserError) as fault:
            part.truncation["broken"].append(BrokenSample(sample.source, sample.line, str(fault)))
            continue
        part.truncation["assistant_turns"] += turns
        documents += made
        owners += [(index, sample)] * len(made)
    part.truncation["learnt_turns"] += len(documents)
    encoded = _encode_documents(documents, renderer.tokenizer, renderer.form)
    for document, (index, sample), (ids, segments) in zip(documents, owners, encoded, strict=True):
        if not document.has_thinking and Segment.CLOSE in segments:
            if settings.empty_thinking == "drop":
                part.truncation["empty_thinking"].append(sample.id)
                continue
            if settings.empty_thinking == "mask":
                segments = _without_block(segments)
        fitted = _fit(ids, segments, sample, renderer.tokenizer, settings, part.truncation)
        if fitted is not None:
            part.add(*fitted, index)
            if not document.has_thinking:
                part.truncation["without_thinking"].append(sample.id)
    return part.arrays(), part.truncation


def _encode_documents(
    documents: list[Document], tokenizer: Any, form: ChatFormat
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, segments) of each document, all their pieces encoded in one batch."""
    groups = [[d.prompt, d.thinking, d.close, d.answer] for d in documents]
    flat = [piece for group in groups for pieces in group for piece in pieces if piece]
    encoded = iter(encode(tokenizer, flat) if flat else [])
    for group in groups:
        joined = [[t for piece in pieces if piece for t in next(encoded)] for pieces in group]
        yield _labelled(*joined, form)


def _labelled(
    prompt: list[int], thinking: list[int], close: list[int], answer: list[int], form: ChatFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments, cut behind the token that ends the turn."""
    if form.close_id >= 0:
        completion = thinking
        border = completion.index(form.close_id) if form.close_id in completion else -1
        thinking, answer = completion[: max(border, 0)], completion[border + 1 :]
        close = [form.close_id] if border >= 0 else []
    end_id = form.end_id
    if end_id in answer:
        answer = answer[: answer.index(end_id)]
    elif answer and answer[-1] in form.special:  # the template's own end of a turn of this kind
        *answer, end_id = answer
    ids = np.array([*prompt, *thinking, *close, *answer, end_id], dtype=np.int32)
    lengths = [len(prompt), len(thinking), len(close), len(answer), 1]
    return ids, np.repeat(np.arange(len(Segment), dtype=np.uint8), lengths)


def _without_block(segments: np.ndarray) -> np.ndarray:
    """The segments with an empty think block as part of the prompt."""
    block = (segments == Segment.THINKING) | (segments == Segment.CLOSE)
    return np.where(block, np.uint8(Segment.PROMPT), segments)


def _fit(
    ids: np.ndarray,
    segments: np.ndarray,
    sample: Sample,
    tokenizer: Any,
    settings: DataSettings,
    truncation: dict[str, list],
) -> tuple[np.ndarray, np.ndarray] | None:
    """The document within max_seq_length, or None; the report says what became of it."""
    limit = settings.most_tokens
    if len(ids) <= limit:
        return ids, segments
    if settings.over_length == "error":
        place = f"{clean_line(sample.source, 200)}:{sample.line}"
        raise UserError(
            f"{place}: {len(ids)} tokens, but max_seq_length is {limit}; raise it, or choose "
            "over_length drop or truncate_thinking"
        )
    beyond = segments[limit:]
    truncation["truncated"].append(sample.id)
    truncation["long_lengths"].append(len(ids))
    for name, lost in (
        ("lost_think_close", Segment.CLOSE in beyond),
        ("lost_answer", Segment.ANSWER in beyond),
        ("lost_eos", Segment.END in beyond),
    ):
        if lost:
            truncation[name].append(sample.id)
    kept = None
    if settings.over_length == "truncate_thinking":
        kept = _without_middle(ids, segments, limit, tokenizer)
    if kept is None:
        truncation["dropped"].append(sample.id)
        return None
    truncation["shortened"].append(sample.id)
    return ids[kept], segments[kept]


_MOST_BYTES = 4  # of a character in UTF-8, so it has no more tokens
_LEAST_THINKING = 16  # tokens; what is left of a reasoning below that teaches nothing


def _without_middle(
    ids: np.ndarray, segments: np.ndarray, limit: int, tokenizer: Any
) -> np.ndarray | None:
    """Positions to keep when the middle of the reasoning goes; None if too little would be left.

    The cuts fall behind a line where one ends in the outer halves of what can stay, else at least
    between whole characters.
    """
    thinking = np.flatnonzero(segments == Segment.THINKING)
    room = limit - (len(ids) - len(thinking))
    if room < _LEAST_THINKING:
        return None
    texts = _texts(ids[thinking].tolist(), tokenizer)
    half = room // 2
    head = next((i for i in range(half, half // 2, -1) if texts[i - 1].endswith("\n")), None)
    if head is None:
        head = next((i for i in range(half, 0, -1) if texts[i - 1]), 0)
    tail, last = len(texts) - (room - head), len(texts) - half // 2
    line = next((i for i in range(tail, last) if texts[i - 1].endswith("\n")), None)
    if line is None:
        line = next(i for i in range(tail, len(texts) + 1) if texts[i - 1])
    gone = thinking[head:line]
    return np.setdiff1d(np.arange(len(ids)), gone, assume_unique=True)


def _texts(tokens: list[int], tokenizer: Any) -> list[str]:
    """The text that each token completes; nothing within a character of several tokens."""
    texts, waiting = [], []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if text.endswith("\ufffd") and len(waiting) < _MOST_BYTES:
            texts.append("")
        else:
            texts.append(text)
            waiting = []
    if waiting:
        texts[-1] = text
    return texts


# ---- the whole table --------------------------------------------------------------------------


def tokenize_samples(
    samples: Sequence[Sample] | SampleSet,
    tokenizer: Any,
    settings: DataSettings,
    *,
    cache_dir: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> TokenizedSamples:
    """Tokenize all samples; the result does not depend on `workers` or on the cache.

    settings.over_length: `drop` leaves longer documents out, `truncate_thinking` takes the middle out of
    their reasoning (and drops what still doesn't fit), `error` refuses the first one.
    settings.loss_on: `last_turn`, or `all_turns`: one document per assistant turn, each behind the prompt
    that the model sees for it, so that earlier turns learn to think as well.
    settings.control_tokens: samples whose content spells a control token are left out (`refuse`), or kept
    with the text encoded as ordinary characters (`split`); it never becomes the token itself.
    cache_dir: keep the table there, memory-mapped. `progress(done, total)` counts samples.
    Raises UserError for a template that can't be used, and an empty result.
    """
    fingerprint = samples.fingerprint if isinstance(samples, SampleSet) else None
    samples = samples.samples if isinstance(samples, SampleSet) else samples
    form = chat_format(tokenizer)
    renderer = Renderer(tokenizer, form, all_turns=settings.loss_on == "all_turns")

    def parts() -> Iterator[_Part]:
        check_tokenizer(tokenizer, samples)
        return _parts(samples, renderer, settings, workers, progress)

    if cache_dir is None:
        arrays, truncation = tokens_in_memory(parts())
    else:
        key = _cache_key(samples, fingerprint, tokenizer, settings)
        folder = Path(cache_dir) / "tokens" / key
        arrays, truncation = cached_folder(
            folder, load_tokens, lambda building: write_tokens(building, parts())
        )
        if progress:
            progress(len(samples), len(samples))
    if not len(arrays["lengths"]):
        raise nothing_left(samples, truncation, settings)
    return _table(arrays, truncation, form, settings.most_tokens)


def left_out(report: TruncationReport, settings: DataSettings) -> Iterator[tuple[str, str]]:
    """How many samples are left out for each reason that there is, and what helps."""
    broken, refuses = report.broken, settings.control_tokens == "refuse"
    first = f" (the first: {broken[0]})" if broken else ""
    for count, reason, remedy in (
        (
            len(report.dropped),
            f"longer than {settings.most_tokens} tokens",
            "raise --max-seq-length or use --over-length truncate_thinking",
        ),
        (
            len(report.control_tokens) * refuses,
            "with control tokens in the text",
            "use --control-tokens split",
        ),
        (len(report.empty_thinking), "without thinking", "use --empty-thinking mask"),
        (
            len(broken),
            f"broken{first}",
            "mend what is broken (--check-data lists it) or use another model",
        ),
    ):
        if count:
            yield f"{count} {reason}", remedy


def nothing_left(
    samples: Sequence[Sample], report: TruncationReport, settings: DataSettings, held_out: int = 0
) -> NothingLeftError:
    """Why no document is left of the samples; `held_out` are left, but not to train on."""
    why = list(left_out(report, settings))
    if held_out:
        why.append((f"{held_out} held out", "lower --eval-fraction"))
    if not why:
        why.append(("no assistant turn of them is to be learnt", "see their loss flags"))
    reasons, remedies = (", ".join(texts) for texts in zip(*why, strict=True))
    broken = (Finding(b.source, b.line, "broken", b.reason) for b in report.broken)
    less = less_of(report, samples, settings.most_tokens, settings.empty_thinking)
    return NothingLeftError(
        f"no sample is left of {len(samples)}: {reasons}. What helps: {remedies}", (*broken, *less)
    )


def _table(
    arrays: dict[str, np.ndarray], truncation: TruncationReport, form: ChatFormat, limit: int
) -> TokenizedSamples:
    """The documents in one table."""
    lengths = arrays.pop("lengths")
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return TokenizedSamples(
        **arrays,
        offsets=offsets,
        truncation=truncation,
        close_id=form.close_id,
        end_id=form.end_id,
        max_seq_length=limit,
        asked_with=", ".join(f"{name}={value}" for name, value in form.switch.items()),
    )


def _parts(
    samples: Sequence[Sample],
    renderer: Renderer,
    settings: DataSettings,
    workers: int,
    progress: Progress | None,
) -> Iterator[_Part]:
    """Tokens of the samples, chunk by chunk, in order."""
    ranges = [(i, min(i + _CHUNK, len(samples))) for i in range(0, len(samples), _CHUNK)]
    state = (samples, renderer, settings)
    if workers > 1 and len(samples) >= _POOL_FROM:
        parts = in_order(_work, ranges, workers, _start_worker, state)
    else:
        parts = (_tokenize_range(samples, *span, renderer, settings) for span in ranges)
    for (_, stop), part in zip(ranges, parts, strict=True):
        yield part
        if progress:
            progress(stop, len(samples))


_worker_state: tuple = ()


def _start_worker(*state: Any) -> None:
    """Runs once per worker process: samples and tokenizer travel once, not with every chunk."""
    global _worker_state
    _worker_state = state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(start: int, stop: int) -> _Part:
    samples, renderer, settings = _worker_state
    return _tokenize_range(samples, start, stop, renderer, settings)


# ---- cache ------------------------------------------------------------------------------------


# The settings that tokens depend on.
_READ = ("max_seq_length", "over_length", "loss_on", "empty_thinking", "control_tokens")


def _cache_key(
    samples: Sequence[Sample], fingerprint: str | None, tokenizer: Any, settings: DataSettings
) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if fingerprint is None:
        for sample in samples:  # what is broken is kept with its place
            digest.update(f"{sample.id} {sample.source}:{sample.line}\n".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    libraries = ("transformers", "tokenizers", "jinja2")
    makers = ("tokenization", "token_table", "chat_template", "rendering", "verification")
    makers = ("readers.sample", *(f"data.{name}" for name in makers))
    version = code_version(*makers, libraries=libraries)
    read = {name: getattr(settings, name) for name in _READ}
    facts = [version, fingerprint, read, tokenizer.chat_template, tokenizer.eos_token]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(vocabulary.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
