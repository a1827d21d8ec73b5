"""The audit shows of every token whether it carries loss."""

from finetuning.data.mask_audit import mask_audit
from finetuning.data.token_table import Segment
from finetuning.data.tokenization import tokenize_samples
from finetuning.readers.sample import Sample
from tests.helpers.tokenized import LONG, generated_samples


def test_mask_audit_shows_every_token(qwen3):
    sample = Sample("问```\x1b[31m红", "想\n想", "答 | 𠮷。")
    tokens = tokenize_samples([sample, *generated_samples(5)], qwen3, LONG)
    audit = mask_audit(tokens, qwen3, count=2)
    assert audit.count("**Document") == 2
    assert "\x1b" not in audit
    assert "`" * 4 + "\n" in audit  # the fence is longer than the backticks inside
    body = audit.split("\n````\n")[1]
    shown = {segment.name: 0 for segment in Segment}
    for line in body.split("\n"):
        position, sign, name, rest = line.split(None, 3) if line.count(" ") > 2 else line.split()
        assert sign == ("-" if name == "PROMPT" else "+")
        assert int(position) == sum(shown.values())
        shown[name] += rest.count("│") + 1
    assert list(shown.values()) == tokens.segment_counts[0].tolist()
    assert "CLOSE    </think>" in audit
    assert "END      <|im_end|>" in audit
    assert "想│\\n│想│\\n" in audit
