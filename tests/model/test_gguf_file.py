"""A GGUF file is the model: for transformers' reader and for llama.cpp, tensors, tokens and template.

uv run --group serving --extra gguf pytest -m "not long" tests/model/test_gguf_file.py
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from finetuning.common.errors import UserError
from finetuning.model.gguf_file import PRECISIONS, check_architecture, read_gguf, write_gguf
from finetuning.model.gguf_tokens import PRE_TOKENIZERS, vocabulary
from finetuning.model.merging import TOLERANCE
from finetuning.model.sampling_defaults import SamplingDefaults
from finetuning.runs.identity import PROBE
from tests.helpers.llama_server import serving
from tests.helpers.qwen3_tokenizer import qwen3_tokenizer
from tests.helpers.tiny_model import make_tiny_model

gguf = pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")

KINDS = {
    "qwen3": (Qwen3Config, {}),
    "qwen2": (Qwen2Config, {}),
    "llama": (LlamaConfig, {}),
    "untied": (Qwen3Config, {"tie_word_embeddings": False}),
    # Heads together wider than the states, far rotations, as in Qwen3-4B-Thinking-2507.
    "wide heads": (
        Qwen3Config,
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    ),
}
TEXTS = [
    PROBE,
    "<|im_start|>user\n你好，SM4？<|im_end|>\n<|im_start|>assistant\n<think>\n嗯\n</think>\n\n好。",
    " 2026年11月27日 12345  a\tb\n\n\n  x's don't I'LL 🔑🇨🇳 é <tool_call>{}</tool_call>",
]


def make(kind: str, folder: Path, **settings):
    """Model, whose weights are as wide as those of a trained one, and tokenizer."""
    config, more = KINDS[kind]
    make_tiny_model(folder, kind=config, **more, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.2 * noise if weight.dim() > 1 or name.endswith("bias") else 0.1 * noise)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """Model, tokenizer and its file in fp32."""
    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer = make(request.param, folder / "model")
    write_gguf(model, tokenizer, folder / "model.gguf", "fp32", "tiny")
    return model, tokenizer, folder / "model.gguf"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(48).reshape(2, 24)).logits


def test_transformers_reads_the_same_model_from_it(written):
    model, tokenizer, path = written
    # Its reader takes a head's width of Qwen3 from the defaults, so the configuration is given.
    again = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=copy.deepcopy(model.config), dtype=torch.float32
    )
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert read(text).input_ids == tokenizer(text).input_ids
    assert read.chat_template == tokenizer.chat_template
    assert (read.eos_token, read.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_rounded_stays_within_its_type(tmp_path, precision):
    """The loss of a type of so many bits, and the same through transformers' reader."""
    model, tokenizer = make("qwen3", tmp_path / "model")
    path = tmp_path / "model.gguf"
    write_gguf(model, tokenizer, path, precision, "tiny")
    expected = logits(model)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=copy.deepcopy(model.config), dtype=torch.float32
    )
    read_gguf(path, model)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)
    difference = (logits(model) - expected).abs().max() / expected.std()
    assert difference < TOLERANCE[precision]
    assert (difference > 0) == (precision != "fp32")


def test_rows_that_are_no_whole_blocks_are_sixteen_bits(tmp_path):
    model, tokenizer = make("qwen3", tmp_path / "model", intermediate_size=80)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "q8_0", "tiny")
    held = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert held["blk.0.ffn_down.weight"] == "F16" and held["blk.0.ffn_up.weight"] == "Q8_0"
    assert held["blk.0.attn_q_norm.weight"] == "F32"


@pytest.mark.slow
def test_llama_cpp_computes_the_same(written):
    """Greedy tokens, and the probabilities that it saw on the way."""
    model, tokenizer, path = written
    prompt = tokenizer(TEXTS[1]).input_ids
    with serving(path) as server:
        said = server.goes_on(prompt, 64)
        ids = [*prompt, *said]
        seen = [server.next_token(ids[:end]) for end in range(len(prompt), len(ids))]
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert said == rows.argmax(-1).tolist() and len(said) > 8
    assert sum(map(bool, seen)) > 4
    for row, found in zip(rows.tolist(), seen, strict=True):
        assert {token: row[token] for token in found} == pytest.approx(found, abs=1e-3)


@pytest.mark.slow
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(written):
    _, tokenizer, path = written
    with serving(path) as server:
        assert [server.tokens(text) for text in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]
        asked = [{"role": "system", "content": "简短。"}, {"role": "user", "content": "SM4？"}]
        shown = server.post("/apply-template", messages=asked)["prompt"]
    assert shown == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"do_sample": True, "repetition_penalty": 1.05},
    ],
)
def test_llama_cpp_draws_as_the_model_says(tmp_path, given):
    """Without a word of the client's, and not by its own defaults."""
    model, tokenizer = make("qwen3", tmp_path / "model")
    model.generation_config = GenerationConfig(**given)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "fp32", "tiny")
    with serving(tmp_path / "model.gguf") as server:
        used = server.properties()["default_generation_settings"]["params"]
        context = server.properties()["default_generation_settings"]["n_ctx"]
    expected = asdict(SamplingDefaults.of(model.generation_config))
    assert used.pop("repeat_last_n") in (-1, context)
    expected.pop("repeat_last_n")
    assert {name: used[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_real_tokenizer_of_qwen3(tmp_path):
    """151,669 tokens, in a model whose embedding has more rows."""
    tokenizer = qwen3_tokenizer()
    make_tiny_model(tmp_path / "model", kind=Qwen3Config)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    small.resize_token_embeddings(151_936)
    write_gguf(small, tokenizer, tmp_path / "model.gguf", "fp16", "tiny")
    with serving(tmp_path / "model.gguf") as server:
        assert [server.tokens(text) for text in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]


def test_what_the_proof_does_not_cover_is_refused(tmp_path):
    config = Qwen3Config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0})
    with pytest.raises(UserError, match="rope_type yarn"):
        check_architecture(config)
    with pytest.raises(UserError, match="layer_types"):
        check_architecture(Qwen3Config(layer_types=["sliding_attention"], num_hidden_layers=1))
    with pytest.raises(UserError, match="architecture gpt2 is not one"):
        check_architecture(GPT2Config())
    model, tokenizer = make("llama", tmp_path / "model", attention_bias=True)
    with pytest.raises(UserError, match=r"no place for model\.layers\.0\.self_attn\.q_proj\.bias"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf", "fp32", "tiny")


def words_cut_at(expression: str, **changes: object):
    """Qwen3's tokenizer with words cut otherwise, and a token for 12 in the place of its rarest one."""
    content = json.loads(qwen3_tokenizer().backend_tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    vocabulary["12"] = vocabulary.pop("".join(merges.pop()))
    merges.append(["1", "2"])
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = expression
    content["model"] |= changes
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=qwen3_tokenizer().chat_template,
    )


@pytest.mark.slow
def test_words_are_cut_as_llama_cuts_them(tmp_path):
    expression, whole = PRE_TOKENIZERS["llama-bpe"]
    tokenizer = words_cut_at(expression, ignore_merges=whole)
    make_tiny_model(tmp_path / "model")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    small.resize_token_embeddings(len(tokenizer))
    write_gguf(small, tokenizer, tmp_path / "model.gguf", "fp16", "tiny")
    ids = [tokenizer(text).input_ids for text in TEXTS]
    assert ids != [qwen3_tokenizer()(text).input_ids for text in TEXTS]
    with serving(tmp_path / "model.gguf") as server:
        assert [server.tokens(text) for text in TEXTS] == ids


def test_of_several_templates_that_of_plain_conversations_is_written():
    """As transformers chooses it, whichever stands first."""
    tokenizer = copy.copy(qwen3_tokenizer())
    plain = tokenizer.chat_template
    for order in (("tool_use", "default"), ("default", "tool_use")):
        tokenizer.chat_template = {
            name: plain if name == "default" else "{# tools #}" + plain for name in order
        }
        assert vocabulary(tokenizer, len(tokenizer)).chat_template == plain
    tokenizer.chat_template = {"tool_use": plain, "rag": plain}
    with pytest.raises(UserError, match="chat template can't be used"):
        vocabulary(tokenizer, len(tokenizer))


@pytest.mark.parametrize("far", [False, True])
def test_a_token_without_a_row_is_one_clear_line(tmp_path, far):
    """More tokens than rows; or no more of them, but one with an id behind the last row."""
    _, tokenizer = make("qwen3", tmp_path / "model")
    rows = len(tokenizer) - 1
    if far:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["model"]["vocab"]["甲乙"] = len(tokenizer) + 7
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)),
            eos_token=tokenizer.eos_token,
            chat_template=tokenizer.chat_template,
        )
        rows = len(tokenizer)
    highest = max(tokenizer.get_vocab().values())
    with pytest.raises(
        UserError, match=f"ids up to {highest}, the model {rows} rows of embeddings"
    ):
        vocabulary(tokenizer, rows)
    assert len(vocabulary(tokenizer, highest + 1).tokens) == highest + 1


@pytest.mark.parametrize(
    ("expression", "changes"),
    [
        (r"\p{N}{1,2}|\p{L}+", {}),
        (PRE_TOKENIZERS["qwen2"][0], {"ignore_merges": True}),
        (PRE_TOKENIZERS["qwen2"][0], {"byte_fallback": True}),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(expression: str, changes: dict):
    tokenizer = words_cut_at(expression, **changes)
    with pytest.raises(UserError, match="this tokenizer is not one that is written here"):
        vocabulary(tokenizer, len(tokenizer))
