"""Completions are judged exactly, and asking the model changes nothing about its training.

uv run pytest tests/evaluation/test_generation.py
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.plugin_util import markdown_to_safe_html
from transformers import AutoTokenizer, Qwen3ForCausalLM

from finetuning.data.token_table import Segment
from finetuning.data.tokenization import tokenize_samples
from finetuning.data.training_data import DataPart
from finetuning.evaluation import generation
from finetuning.evaluation.generation import (
    EvalPrompt,
    choose_probes,
    complete,
    exact_answer,
    probe_metrics,
    read_completion,
    repetition_rate,
    samples_text,
    term_recall,
    token_budget,
)
from finetuning.model.decoding import Decoder
from finetuning.readers.sample import Sample
from tests.helpers.settings import up_to

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def ids(tokenizer) -> dict[str, int]:
    return {
        "end_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "close_id": tokenizer.convert_tokens_to_ids("</think>"),
    }


class Scripted(torch.nn.Module):
    """Stands for a model: `generate` gives the texts of a script, padded as transformers pads."""

    def __init__(self, folder: Path, tokenizer, script: list[str]) -> None:
        super().__init__()
        self.model = Qwen3ForCausalLM.from_pretrained(folder)
        self.rows = [tokenizer.encode(text, add_special_tokens=False) for text in script]

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **_):
        assert not self.training and attention_mask.shape == input_ids.shape
        torch.rand(3)  # a model may draw random numbers
        rows = [row[:max_new_tokens] for row in self.rows]
        width = max(map(len, rows))
        new = [row + [pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(new)], dim=1)


REFERENCE = Sample("求23×7 mod 10。", "先算23×7=161，余1。", "SM4与RSA。\n最终答案：1")
LOOP = "密钥分组杂凑签名证书" * 30
SCRIPT = {
    "closed": "先算161，余1。\n</think>\n\nSM4与RSA。\n最终答案：1<|im_end|>",
    "unclosed": "先算161，余1。<|im_end|>",
    "empty": "先算161。\n</think>\n\n<|im_end|>",
    "looping": LOOP,
    "closed twice": "想</think>\n\n再想</think>\n\nSM4。最终答案：2<|im_end|>",
    "opened again": "想\n<think>\n想\n</think>\n\n答<|im_end|>",
    "never ended": "想\n</think>\n\n答",
}


def probe_of(sample: Sample, tokenizer) -> EvalPrompt:
    thinking = len(tokenizer.encode(sample.thinking, add_special_tokens=False))
    return EvalPrompt(sample, (1, 2, 3), thinking, reference_tokens=2 * thinking)


@pytest.fixture(scope="module")
def completions(tiny_model: Path, tokenizer, ids):
    model = Scripted(tiny_model, tokenizer, list(SCRIPT.values()))
    prompts = [(1, 2, 3)] * (len(SCRIPT) - 1) + [(1,)]  # one shorter than the others
    done = complete(Decoder(model), tokenizer, prompts, max_new_tokens=64, device=CPU, **ids)
    return dict(zip(SCRIPT, done, strict=True))


def test_a_scripted_model_is_classified_exactly(completions):
    judged = {name: (c.valid, c.closed, c.ended) for name, c in completions.items()}
    assert judged == {
        "closed": (True, True, True),
        "unclosed": (False, False, True),
        "empty": (False, True, True),
        "looping": (False, False, False),
        "closed twice": (False, False, True),
        "opened again": (False, False, True),
        # Shorter than the others, it is padded with the end token, as `generate` does.
        "never ended": (True, True, True),
    }
    assert completions["closed"].thinking == "先算161，余1。"
    assert completions["closed"].answer == "SM4与RSA。\n最终答案：1"
    assert completions["empty"].answer == "" and completions["unclosed"].answer == ""


def test_metrics_of_the_scripted_model(completions, tokenizer):
    names = ["closed", "unclosed", "empty", "looping"]
    probe = probe_of(REFERENCE, tokenizer)
    chosen = [completions[name] for name in names]
    assert probe.reference_tokens <= 64
    metrics = probe_metrics([probe] * 4, chosen, 64)
    assert metrics["Eval/Format_Valid_Rate"] == 0.25
    assert metrics["Eval/Budget_Hit_Rate"] == 0.25
    assert metrics["Eval/Term_Recall"] == 0.25  # both terms in one answer, none in the others
    assert metrics["Eval/Exact_Answer"] == 0.25
    looped = repetition_rate(completions["looping"].tokens)
    assert looped > 0.5 and metrics["Eval/Repetition_Rate"] == pytest.approx(looped / 4)
    closed = [len(tokenizer.encode(SCRIPT[n].partition("</think>")[0])) for n in names[::2]]
    ratio = np.mean([n / probe.thinking_tokens for n in closed])
    assert metrics["Eval/Think_Length_Ratio"] == pytest.approx(ratio), "others have no known length"


def test_what_a_cut_hides_is_absent_and_not_zero(completions, tokenizer):
    """A budget that even the reference does not fit in says nothing about a completion that was cut."""
    probe, judged = probe_of(REFERENCE, tokenizer), ("Eval/Format_Valid_Rate", "Eval/Exact_Answer")
    small = probe.reference_tokens - 1
    cut = probe_metrics([probe] * 2, [completions["looping"]] * 2, small)
    cuts = {f"Eval/Budget_Hit_Rate{end}" for end in ("", "_Low", "_High")}
    assert cut.keys() == {"Eval/Repetition_Rate"} | cuts
    assert cut["Eval/Budget_Hit_Rate"] == 1.0
    one_ended = [completions["looping"], completions["closed"]]
    metrics = probe_metrics([probe] * 2, one_ended, small)
    assert [metrics[tag] for tag in judged] == [1.0, 1.0]
    metrics = probe_metrics([probe] * 2, one_ended, probe.reference_tokens)
    assert [metrics[tag] for tag in judged] == [0.5, 0.5], (
        "it had the room that the reference takes"
    )


def test_what_is_not_defined_is_absent(tokenizer, completions):
    plain = Sample("问", "", "没有术语也没有数")
    metrics = probe_metrics([probe_of(plain, tokenizer)], [completions["closed"]], 64)
    assert not {"Eval/Think_Length_Ratio", "Eval/Term_Recall", "Eval/Exact_Answer"} & set(metrics)
    assert metrics["Eval/Format_Valid_Rate"] == 1.0


def test_exact_answer(subtests):
    for answer, expected in [
        ("最终答案：(471, 3)", 1.0),
        ("过程……\n最终答案: (471,3)。", 1.0),
        ("最终答案：5\n更正。最终答案：(471，3)", 1.0),  # the last one counts
        ("最终答案：(471, 4)", 0.0),
        ("答案是(471, 3)", 0.0),
        ("", 0.0),
    ]:
        with subtests.test(answer=answer):
            assert exact_answer("步骤。\n最终答案：(471, 3)", answer) == expected


def test_one_number_in_two_forms_is_the_same(subtests):
    for reference, answer, expected in [
        ("16字节", "**最终答案：** 16字节", 1.0),
        ("16字节", "最终答案：**16**字节。", 1.0),
        ("23", "最终答案：2*3", 0.0),
        ("23", "最终答案：2**3", 0.0),
        ("1024", "最终答案：1,024", 1.0),
        ("1,024,000", "最终答案：`1024000`", 1.0),
        ("3.50", "最终答案：3.5", 1.0),
        ("0x1f", "最终答案：0x1F", 1.0),
        ("5", "最终答案：５", 1.0),
        ("(1,234)", "最终答案：(1,235)", 0.0),
        ("3.5", "最终答案：3.51", 0.0),
        ("nan", "最终答案：inf", 0.0),
        ("2128", "最终答案：2¹²⁸", 0.0),
        ("2^128", "最终答案：$2^{128}$", 1.0),
        ("-12", "最终答案：−12", 1.0),
        ("x1", "最终答案：×1", 0.0),
        ("12 8", "最终答案：128", 0.0),
        ("x = 5", "最终答案：x=5。", 1.0),
        (str(2**200), f"最终答案：{2**200 + 1}", 0.0),
        ("GM/T 0054-2018", "最终答案：GM/T 0054—2018", 1.0),
    ]:
        with subtests.test(reference=reference):
            assert exact_answer(f"最终答案：{reference}", answer) == expected


def test_repetition_and_terms():
    assert repetition_rate(range(50)) == 0.0
    assert repetition_rate([7] * 20) == pytest.approx(10 / 11)  # 11 ten-grams, one of them new
    assert repetition_rate([1, 2]) == 0.0
    assert term_recall("SM4和RSA", "只说SM4") == 0.5
    assert term_recall("没有", "SM4") is None


def test_a_tokenizer_whose_prompt_leaves_the_block_closed(tokenizer, ids):
    own = tokenizer.encode("<think>\n想\n</think>\n\n答<|im_end|>", add_special_tokens=False)
    assert read_completion(own, tokenizer, **ids).valid
    twice = tokenizer.encode("<think>\n<think>想</think>答<|im_end|>", add_special_tokens=False)
    assert not read_completion(twice, tokenizer, **ids).valid


def test_a_tokenizer_to_which_the_tag_is_plain_text(tokenizer, ids):
    tokens = tokenizer.encode("先算161，余1。\n</think>\n\n答<|im_end|>", add_special_tokens=False)
    completion = read_completion(tokens, tokenizer, end_id=ids["end_id"], close_id=-1)
    assert completion.valid
    assert completion.thinking_tokens == len(tokenizer.encode("先算161，余1。"))


# -----------------------------------------------------------------------------
# The questions


@pytest.fixture(scope="module")
def part(tokenizer) -> DataPart:
    tools = '[{"type": "function", "function": {"name": "hash", "parameters": {}}}]'
    samples = [Sample(f"第{i}问", "想" * (i + 1), f"答{i}", line=i) for i in range(8)]
    samples += [Sample(f"算{i}", "想一想", f"最终答案：{i}", line=i) for i in range(8)]
    samples += [Sample("用工具", "想", "最终答案：9", system="系统", tools=tools)]
    tokens = tokenize_samples(samples, tokenizer, up_to(512))
    return DataPart(samples, tokens, np.arange(len(samples)))


def test_probes_are_the_same_whatever_the_order_and_half_have_a_number(part, tokenizer):
    chosen = choose_probes(part, tokenizer, 6)
    order = np.random.default_rng(0).permutation(part.documents)
    again = choose_probes(DataPart(part.samples, part.tokens, order), tokenizer, 6)
    assert [p.sample.id for p in chosen] == [p.sample.id for p in again]
    numbers = [exact_answer(p.sample.answer, "") is not None for p in chosen]
    assert sum(numbers) == 3
    assert len(choose_probes(part, tokenizer, 100)) == len(part)
    assert choose_probes(part, tokenizer, 0) == []


def test_the_prompt_is_the_prefix_of_training_tools_and_all(part, tokenizer):
    for probe in choose_probes(part, tokenizer, len(part)):
        (document,) = [d for d in part.documents if part.sample(d).id == probe.sample.id]
        tokens = part.tokens[document]
        length = int(np.argmax(tokens.segments != Segment.PROMPT))
        assert probe.prompt == tuple(tokens.ids[:length].tolist())
        assert probe.thinking_tokens == int((tokens.segments == Segment.THINKING).sum())


def test_references_that_fit_are_asked_first(part, tokenizer):
    lengths = sorted(p.reference_tokens for p in choose_probes(part, tokenizer, len(part)))
    fitting = choose_probes(part, tokenizer, len(part), lengths[5])
    assert [p.reference_tokens <= lengths[5] for p in fitting] == [True] * len(fitting)
    assert len(fitting) == sum(length <= lengths[5] for length in lengths)
    none = choose_probes(part, tokenizer, 4, lengths[0] - 1)
    assert none == choose_probes(part, tokenizer, 4), "where none fits, all may be asked"


def test_the_budget_is_what_the_device_affords(tokenizer):
    probes = [EvalPrompt(REFERENCE, (1,), 10, reference_tokens=n) for n in (100, 800)]
    assert token_budget(probes, 0, torch.device("cuda")) == 1000
    assert token_budget(probes, 0, CPU) == generation.CPU_BUDGET
    assert token_budget(probes[:1], 0, CPU) == 125
    assert token_budget(probes, 7, CPU) == token_budget(probes, 7, torch.device("cuda")) == 7


# -----------------------------------------------------------------------------
# The model


def test_a_batch_is_answered_like_each_question_alone_and_nothing_is_left_behind(
    tiny_model, part, tokenizer, ids
):
    model = Qwen3ForCausalLM.from_pretrained(tiny_model).train()
    prompts = [p.prompt for p in choose_probes(part, tokenizer, 3)]
    assert len({len(p) for p in prompts}) > 1, "no padding would be tested"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    options = {"max_new_tokens": 12, "device": CPU, **ids}
    told: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    together = complete(
        Decoder(model), tokenizer, prompts, progress=lambda *where: told.append(where), **options
    )
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    longest = max(len(completion.tokens) + completion.ended for completion in together)
    assert told == [(count, 12) for count in range(1, longest + 1)]
    alone = [complete(Decoder(model), tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert together == alone
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


# -----------------------------------------------------------------------------
# TEXT


def test_the_text_shows_model_and_reference_side_by_side(completions, tokenizer):
    probe = probe_of(REFERENCE, tokenizer)
    text = samples_text([probe, probe], [completions["closed"], completions["unclosed"]])
    html = markdown_to_safe_html(text)
    assert html.count("<table>") == 2
    (row,) = [line for line in text.splitlines() if line.startswith("| answer") and "SM4" in line][
        :1
    ]
    cells = row.strip("| ").split(" | ")
    assert cells[1].replace("<br>", "\n") == cells[2].replace("<br>", "\n")
    assert "valid yes" in text and "closed NO" in text


def test_hostile_text_stays_text(tokenizer, ids):
    hostile = (
        "<script>alert(1)</script> | x | [a](http://e.vil) ![i](http://e.vil/p.png) `y` \x1b[31m"
    )
    sample = Sample(
        f"```\n{hostile}", hostile, hostile + "\n\n# head &lt;b&gt;", source="a|b<i>.md"
    )
    reply = tokenizer.encode(f"{hostile}\n</think>\n\n{hostile}\n\n- x", add_special_tokens=False)
    completion = read_completion(reply, tokenizer, **ids)
    text = samples_text([probe_of(sample, tokenizer)], [completion])
    html = markdown_to_safe_html(text)
    assert html.count("<table>") == 1 and "\x1b" not in text
    assert not re.search(r"<(script|img|a|i|b|h1|li)\b", html)
    assert html.count("<tr>") == 4, "one head, thinking, answer, tokens"
    assert html.count("alert(1)") == 5, "question, and thinking and answer on both sides"
