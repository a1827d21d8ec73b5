"""Held-out questions answered by the model as it is now, and what the answers tell.

The same few questions at every evaluation, with the same numbers where tokens are drawn, so that a change is
the model's. A completion is judged from its tokens: does it close its thinking once, answer, and end; how
long does it think; does it loop; does it name the terms of the reference, what must be exact of it, and the
number where the reference has one.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from finetuning.analysis.crypto_terms import find_terms
from finetuning.common.language import translated
from finetuning.common.text import fenced, table_cell, table_cell_of_lines
from finetuning.data.chat_template import encode_prompt, parse_completion
from finetuning.data.token_table import Segment, carries_loss
from finetuning.data.training_data import DataPart
from finetuning.evaluation.exactness import fact_recall, with_interval
from finetuning.evaluation.notation import number, plain
from finetuning.model.attention import ordinary_attention
from finetuning.model.decoding import Decoder, Request
from finetuning.readers.sample import Sample

REPETITION_NGRAM = 10  # tokens
CPU_BUDGET = 640  # tokens; sixteen answers of the embedded model take some eight seconds
GPU_PROBES, CPU_PROBES, FEW_PROBES = 32, 16, 4  # of num_probes auto; few: of a large model on a CPU
CPU_SIZE = 10**9  # bytes of weights up to which a model is one for a CPU
WARM = 0.6  # temperature of answers of a model that thinks
# Weights up to which one thread writes: of 5 million, two take twice as long, of 109 million the same.
SMALL_MODEL = 10**8
SHOWN_CHARACTERS = 6000  # of one thinking or answer
_FINAL_ANSWER = re.compile(r"最终答案[：:]\s*(.+)")


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out question with its reference."""

    sample: Sample
    prompt: tuple[int, ...]
    thinking_tokens: int  # of the reference
    reference_tokens: int  # thinking, answer and what closes them


@dataclass(frozen=True)
class Completion:
    """What the model wrote behind the prompt."""

    tokens: tuple[int, ...]  # without the end token
    ended: bool  # it wrote the end token within its budget
    thinking: str
    answer: str
    closed: bool  # exactly one `</think>`, and no second `<think>`
    thinking_tokens: int

    @property
    def valid(self) -> bool:
        """One closed thinking, an answer that is not empty, and an end."""
        return self.closed and bool(self.answer.strip()) and self.ended


def choose_probes(
    part: DataPart, tokenizer: object, count: int, fitting: int = 0
) -> list[EvalPrompt]:
    """`count` held-out samples in the order of their ids, half of them with a number to compute.

    So the choice does not depend on the order of the files and does not change between runs. fitting: only
    references of so many tokens at most, if there are any (0: all).
    """
    if not count:
        return []
    computed: dict[str, tuple[int, bool]] = {}
    for document in part.documents:
        sample = part.sample(document)
        computed[sample.id] = int(document), final_answer(sample.answer) is not None
    in_order = [computed[i] for i in sorted(computed)]
    short = [item for item in in_order if part.tokens.num_targets[item[0]] <= fitting]
    in_order = short or in_order
    numbers = [document for document, has_number in in_order if has_number]
    others = [document for document, has_number in in_order if not has_number]
    half = numbers[: count // 2]
    chosen = [*half, *others[: count - len(half)], *numbers[len(half) :]][:count]
    return [_probe(part, tokenizer, document) for document in chosen]


def _probe(part: DataPart, tokenizer: object, document: int) -> EvalPrompt:
    sample, segments = part.sample(document), part.tokens[document].segments
    tools = json.loads(sample.tools) if sample.tools else None
    return EvalPrompt(
        sample,
        tuple(encode_prompt(tokenizer, sample.messages()[:-1], tools)),
        thinking_tokens=int((segments == Segment.THINKING).sum()),
        reference_tokens=int(carries_loss(segments).sum()),
    )


def token_budget(probes: Sequence[EvalPrompt], wanted: int, device: torch.device) -> int:
    """Tokens a completion may take: `wanted`, or, if that is 0, what the device can afford; 0 without probes.

    An accelerator gets a quarter more than the longest reference, so that a good completion ends; a
    CPU gets `CPU_BUDGET`.
    """
    if wanted or not probes:
        return wanted * bool(probes)
    enough = max(probe.reference_tokens for probe in probes) * 5 // 4
    return min(enough, CPU_BUDGET) if device.type == "cpu" else enough


@torch.no_grad()
def complete(
    decoder: Decoder,
    tokenizer: object,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_id: int,
    close_id: int,
    device: torch.device,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Completion]:
    """Completions of all prompts in one batch, padded on the left.

    Training mode and random state are as before afterwards. `progress` is called now and then with (tokens
    written, tokens at most); where its result is true, no more are written.
    """
    model = decoder.model
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), end_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    was_training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), ordinary_attention(model), _few_threads(model, device):
        out = decoder.write(
            Request(
                ids.to(device),
                mask.to(device),
                most=max_new_tokens,
                end_id=end_id,
                enough=lambda count: bool(progress(count, max_new_tokens)),
            )
        )
    model.train(was_training)
    return [
        read_completion(row.tolist(), tokenizer, end_id=end_id, close_id=close_id) for row in out
    ]


@contextmanager
def _few_threads(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """On a CPU one thread writes the answers of a small model: waking another takes longer than it helps."""
    before = torch.get_num_threads()
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_completion(
    tokens: Sequence[int], tokenizer: object, *, end_id: int, close_id: int
) -> Completion:
    """Judge the generated tokens; what follows the first end token is padding."""
    ended = end_id in tokens
    tokens = tokens[: tokens.index(end_id)] if ended else list(tokens)
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    thinking, answer, _ = parse_completion(text)
    closes = tokens.count(close_id) if close_id >= 0 else text.count("</think>")
    # Where the prompt does not open the block, the model does.
    closed = closes == 1 and "<think>" not in text.lstrip().removeprefix("<think>")
    before = len(tokens)
    if close_id in tokens:
        before = tokens.index(close_id)
    elif closes:  # the tag is ordinary text to this tokenizer
        before = len(tokenizer.encode(thinking, add_special_tokens=False))
    return Completion(tuple(tokens), ended, thinking, answer, closed, before)


# -----------------------------------------------------------------------------
# Judgement


def probe_metrics(
    probes: Sequence[EvalPrompt], completions: Sequence[Completion], max_new_tokens: int
) -> dict[str, float]:
    """Eval/ tags, means over the probes for which they are defined; absent where for none.

    Of a completion that was cut where even the reference would have been, nobody knows what it would
    have become: only its repetition and the cut itself count.
    """
    pairs = list(zip(probes, completions, strict=True))
    whole = [(p, c) for p, c in pairs if c.ended or p.reference_tokens <= max_new_tokens]
    rates = {
        "Eval/Format_Valid_Rate": [float(c.valid) for _, c in whole],
        "Eval/Budget_Hit_Rate": [float(not c.ended) for c in completions],
        "Eval/Exact_Answer": _known(exact_answer(p.sample.answer, c.answer) for p, c in whole),
        "Eval/Fact_Recall": _known(fact_recall(p.sample.answer, c.answer) for p, c in whole),
        "Eval/Answer_Score": [answer_score(p.sample.answer, c) for p, c in whole],
        "Eval/Term_Recall": _known(term_recall(p.sample.answer, c.answer) for p, c in whole),
    }
    means = {
        "Eval/Think_Length_Ratio": [
            c.thinking_tokens / p.thinking_tokens
            for p, c in pairs
            if p.thinking_tokens and c.closed
        ],
        "Eval/Repetition_Rate": [repetition_rate(c.tokens) for c in completions],
    }
    metrics = {tag: sum(v) / len(v) for tag, v in means.items() if v}
    for tag, outcomes in rates.items():
        metrics |= with_interval(tag, outcomes) if outcomes else {}
    return metrics


def repetition_rate(tokens: Sequence[int], n: int = REPETITION_NGRAM) -> float:
    """Share of the n-grams of tokens that occurred before in the completion; 0 if there are none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def term_recall(reference: str, answer: str) -> float | None:
    """Share of the reference answer's cryptographic terms that the answer names; None without any."""
    wanted = set(find_terms(reference))
    return len(wanted & set(find_terms(answer))) / len(wanted) if wanted else None


def exact_answer(reference: str, answer: str) -> float | None:
    """1 if the answer gives the reference's final number, 0 if not; None if the reference has none."""
    wanted, given = final_answer(reference), final_answer(answer)
    if wanted is None or given is None:
        return None if wanted is None else 0.0
    return float(wanted == given or number(wanted) == number(given) is not None)


def answer_score(reference: str, completion: Completion) -> float:
    """How good a completion is, 0 to 1: 0 unless it is valid, then what can be told of its answer: the final
    number, else what must be exact, else the terms; 1 where the reference has none of them."""
    if not completion.valid:
        return 0.0
    for judge in (exact_answer, fact_recall, term_recall):
        score = judge(reference, completion.answer)
        if score is not None:
            return score
    return 1.0


def final_answer(text: str) -> str | None:
    """What stands behind the last `最终答案：`, for comparison: in one notation, in lower case, and without
    spaces but those between two words or two numbers."""
    found = _FINAL_ANSWER.findall(text)
    if not found:
        return None
    answer = plain(found[-1]).strip(" .*").lower()
    return re.sub(
        r"(?<![a-z0-9])\s+|\s+(?![a-z0-9])|(?<=[a-z])\s+(?=\d)|(?<=\d)\s+(?=[a-z])", "", answer
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# -----------------------------------------------------------------------------
# TEXT


def samples_text(probes: Sequence[EvalPrompt], completions: Sequence[Completion]) -> str:
    """Each question, and below it the model's thinking and answer beside the reference's."""
    pairs = zip(probes, completions, strict=True)
    return "\n\n".join(_sample_text(probe, completion) for probe, completion in pairs)


def _sample_text(probe: EvalPrompt, completion: Completion) -> str:
    sample = probe.sample
    verdict = {
        "valid": completion.valid,
        "closed": completion.closed,
        "ended": completion.ended,
    }
    told = (translated(f"{name} {'yes' if good else 'NO'}") for name, good in verdict.items())
    facts = ", ".join(told)
    lines = functools.partial(table_cell_of_lines, limit=SHOWN_CHARACTERS)
    lengths = f"{completion.thinking_tokens} | {probe.thinking_tokens}"
    # A table, since only a table stands side by side; its cells take no code fences.
    return "\n".join(
        [
            f"### {table_cell(sample.source)}:{sample.line}\n",
            fenced(sample.question[:SHOWN_CHARACTERS]) + "\n",
            f"| | {translated('model')} ({facts}) | {translated('reference')} |",
            "| --- | --- | --- |",
            f"| {translated('thinking')} | {lines(completion.thinking)} | {lines(sample.thinking)} |",
            f"| {translated('answer')} | {lines(completion.answer)} | {lines(sample.answer)} |",
            f"| {translated('thinking tokens')} | {lengths} |",
        ]
    )
