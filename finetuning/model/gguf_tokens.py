"""A tokenizer as a GGUF file holds it: tokens with their kinds, merges, ends, chat template.

Byte-level BPE only: vocabulary and merges are the tokenizer's own, and what cuts a text into words must be
one that llama.cpp has under a name. A normalizer (Qwen's is NFC) has no place there: text that
is not in that form already is cut otherwise.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetuning.common.errors import UserError
from finetuning.data.chat_template import chat_format, render

# llama.cpp's name of how words are cut -> the expression, and whether a word that is a token stays whole.
PRE_TOKENIZERS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        True,
    ),
}
_NOT_WRITTEN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens in GGUF


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about text."""

    pre_tokenizer: str
    tokens: list[str]  # one for each row of the embedding
    kinds: list[int]
    merges: list[str]
    ends: Mapping[str, int]
    """`eos` (what ends a turn), and `bos` and `pad` where the tokenizer has them."""
    begins: bool
    """Whether the chat template puts `bos` before a conversation."""
    chat_template: str
    """Of several named ones that for conversations without tools, which training rendered."""


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """That of a tokenizer, for a model with so many `rows` of embeddings. UserError where GGUF has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "GGUF: the tokenizer is written in Python; one with a tokenizer.json is needed"
        )
    content = json.loads(backend.to_str())
    name = _pre_tokenizer(content)
    tokens, kinds = _tokens(tokenizer, rows)
    ends = {
        "eos": chat_format(tokenizer).end_id,
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    question = [{"role": "user", "content": "Q0q"}]
    prompt = render(tokenizer, question, None, {}, prompt=True)
    return Vocabulary(
        pre_tokenizer=name,
        tokens=tokens,
        kinds=kinds,
        merges=[
            " ".join(pair) if isinstance(pair, list) else pair
            for pair in content["model"]["merges"]
        ],
        ends={name: token for name, token in ends.items() if token is not None},
        begins=bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token),
        chat_template=tokenizer.get_chat_template(),
    )


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of what cuts a text into words; UserError for any other."""
    model, steps = content["model"], list(_steps(content["pre_tokenizer"]))
    normalizer = (content.get("normalizer") or {}).get("type")
    plain = normalizer in (None, "NFC") and not any(model.get(name) for name in _NOT_WRITTEN)
    if plain and [model["type"], *(step["type"] for step in steps)] == [
        "BPE",
        "Split",
        "ByteLevel",
    ]:
        split, to_bytes = steps
        known = (split["pattern"].get("Regex"), bool(model.get("ignore_merges")))
        plain = split["behavior"] == "Isolated" and not split["invert"]
        plain &= not to_bytes["add_prefix_space"] and not to_bytes["use_regex"]
        name = next((name for name, way in PRE_TOKENIZERS.items() if way == known), None)
        if plain and name:
            return name
    raise UserError(
        "GGUF: this tokenizer is not one that is written here: byte-level BPE that cuts words as "
        f"{' or '.join(PRE_TOKENIZERS)} does. Use --format hf, and llama.cpp's own converter"
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    for step in [pre_tokenizer] if pre_tokenizer else []:
        yield from step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of every id; rows of the embedding that no token has are unused."""
    known = {i: (token, NORMAL) for token, i in tokenizer.get_vocab().items()}
    for i, token in tokenizer.added_tokens_decoder.items():
        known[i] = token.content, CONTROL if token.special else USER_DEFINED
    highest = max(known, default=-1)
    if highest >= rows:
        raise UserError(
            f"GGUF: the tokenizer has ids up to {highest}, the model {rows} rows of embeddings; give the "
            "base its own tokenizer files"
        )
    unused = ((f"[PAD{i}]", UNUSED) for i in range(rows))
    both = [known.get(i, pad) for i, pad in enumerate(unused)]
    return [token for token, _ in both], [kind for _, kind in both]
