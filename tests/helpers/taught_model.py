"""A tiny model that has learned to think, to answer and to stop, and an adapter with another answer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, Qwen3Config

from finetuning.model.saving import save_adapter
from tests.helpers.models import load
from tests.helpers.tiny_model import make_tiny_model

QUESTION, OTHER = "SM4的分组长度是多少？", "RSA？"
BEFORE = ("杂凑算法。", "大整数分解。")  # thinking and answer of the base
AFTER = ("分组密码，\n共32轮。", "128比特。")  # of the trained model


def teach(
    model: torch.nn.Module, tokenizer, says: Mapping[str, tuple[str, str]], loss: float
) -> None:
    """Train what is trainable until the mean loss of every reply is so low."""
    rows = [_row(tokenizer, question, *reply) for question, reply in says.items()]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    for _ in range(300):
        losses = []
        for ids, start in rows:
            logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start:]))
        if max(losses) < loss:
            return
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"it does not learn: {losses}")


def _row(tokenizer, question: str, thinking: str, answer: str) -> tuple[torch.Tensor, int]:
    """Ids (1, n) of prompt and reply, and where the reply begins."""
    asked = [{"role": "user", "content": question}]
    said = {"role": "assistant", "content": answer, "reasoning_content": thinking}
    text = tokenizer.apply_chat_template([*asked, said], tokenize=False)
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    ids, start = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, prompt))
    return torch.tensor([ids]), len(start)


def make_taught_model(
    folder: Path, kind: type[PreTrainedConfig] = Qwen3Config, **settings: object
) -> Path:
    """Write a base and its adapter below `folder`; returns the adapter's folder, final_model."""
    base = make_tiny_model(folder / "base", kind=kind, **settings)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_pretrained(base)
        teach(whole, tokenizer, {QUESTION: BEFORE, OTHER: AFTER}, 0.2)
        whole.save_pretrained(base)
        model, _ = load(base, lora_r=8)
        teach(model, tokenizer, {QUESTION: AFTER}, 0.2)
    save_adapter(model, tokenizer, folder / "final_model")
    return folder / "final_model"
