"""The embedded model: the same every time, whole or not at all, in Qwen's format."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.common.errors import UserError
from finetuning.model import demo_model

TEXTS = [
    f"第{i}问：分组密码有哪些工作模式？常见的有 ECB、CBC、CTR 与 GCM，各有初始向量与安全要求。"
    f"SM4 的分组是 128 比特，密钥也是 128 比特，共 {i + 32} 步推导。"
    for i in range(12)
]
ROOT = Path(__file__).parents[2]


def build_briefly(cache_dir: Path) -> Path:
    """The real recipe with fewer steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_model, "WARM_START_STEPS", 20)
        return demo_model.build_embedded(TEXTS, cache_dir, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_briefly(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.slow
def test_another_process_with_other_threads_builds_the_same_bytes(folder, tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.model import test_demo_model; "
        "print(test_demo_model.build_briefly(Path(sys.argv[1])))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    other = Path(run.stdout.split()[-1])
    assert other.name == folder.name
    assert digests(other) == digests(folder)


def test_other_text_or_seed_is_another_model(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(demo_model, "WARM_START_STEPS", 2)
    other_seed = demo_model.build_embedded(TEXTS, tmp_path, seed=2)
    other_text = demo_model.build_embedded(TEXTS[1:], tmp_path, seed=1)
    assert len({folder.name, other_seed.name, other_text.name}) == 3
    assert digests(other_seed)["model.safetensors"] != digests(other_text)["model.safetensors"]


def test_the_cache_is_used_and_holds_nothing_half_done(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "WARM_START_STEPS", 2)

    def broken(*args, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "save_file", broken)
        with pytest.raises(OSError):
            demo_model.build_embedded(TEXTS, tmp_path)
    assert list(tmp_path.iterdir()) == []
    built = demo_model.build_embedded(TEXTS, tmp_path)
    monkeypatch.setattr(demo_model, "save_file", broken)
    assert demo_model.build_embedded(TEXTS, tmp_path) == built
    assert list(tmp_path.iterdir()) == [built]


def test_building_leaves_the_callers_random_state_and_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "WARM_START_STEPS", 1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    demo_model.build_embedded(TEXTS, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("texts", [[], ["", "  \n"], ["x"]])
def test_no_text_is_refused(texts, tmp_path):
    with pytest.raises(UserError, match="needs text"):
        demo_model.build_embedded(texts, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_small_qwen3(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 3e6 < model.num_parameters() < 5e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert hasattr(model.model.layers[0].self_attn, "q_norm")
    assert len(tokenizer) <= model.config.vocab_size == demo_model.VOCAB_SIZE
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_any_text_comes_back(tokenizer):
    text = "密钥 k = 0x1F\n\t«ключ» 🔑 \u0000 e\u0301"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text.replace("e\u0301", "é")


def test_qwens_tokens_are_single_ids(tokenizer):
    ids = [tokenizer(t)["input_ids"] for t in demo_model.SPECIAL_TOKENS]
    ids += [tokenizer(t)["input_ids"] for t in demo_model.MARKER_TOKENS]
    assert [len(i) for i in ids] == [1] * 26
    text = "<think>想</think>答<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == (
        "<think>想</think>答"
    )
    assert len(tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]) > 1


# -----------------------------------------------------------------------------
# Chat template

QUESTION = {"role": "user", "content": "什么是 SM3？"}
ANSWER = {"role": "assistant", "content": "杂凑算法。", "reasoning_content": "想一想"}


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_one_turn(tokenizer):
    prompt = render(tokenizer, [QUESTION], add_generation_prompt=True)
    assert prompt == ("<|im_start|>user\n什么是 SM3？<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert render(tokenizer, [QUESTION, ANSWER]) == (
        prompt + "想一想\n</think>\n\n杂凑算法。<|im_end|>\n"
    )


def test_reasoning_of_earlier_turns_is_dropped_and_inline_reasoning_is_found(tokenizer):
    inline = {"role": "assistant", "content": "<think>\n想一想\n</think>\n\n杂凑算法。"}
    for answer in (ANSWER, inline):
        text = render(tokenizer, [{"role": "system", "content": "S"}, QUESTION, answer, QUESTION])
        assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n")
        assert "<|im_start|>assistant\n杂凑算法。<|im_end|>\n" in text
        assert "think" not in text
        assert render(tokenizer, [QUESTION, answer]) == render(tokenizer, [QUESTION, ANSWER])


def test_without_reasoning_the_prompt_is_still_a_prefix(tokenizer):
    prompt = render(tokenizer, [QUESTION], add_generation_prompt=True)
    text = render(tokenizer, [QUESTION, {"role": "assistant", "content": "答"}])
    assert text == prompt + "\n</think>\n\n答<|im_end|>\n"


def test_tools(tokenizer):
    tool = {"type": "function", "function": {"name": "sm3", "parameters": {}}}
    call = {"function": {"name": "sm3", "arguments": {"text": "密"}}}
    steps = [
        QUESTION,
        {"role": "assistant", "content": "", "reasoning_content": "先算", "tool_calls": [call]},
        {"role": "tool", "content": "66c7"},
        {"role": "tool", "content": "f0f4"},
        ANSWER,
    ]
    text = render(tokenizer, steps, tools=[tool])
    head, _, rest = text.partition("<|im_start|>user\n什么是 SM3？<|im_end|>\n")
    assert '"name": "sm3"' in head and head.startswith("<|im_start|>system\n# Tools")
    assert rest == (
        "<|im_start|>assistant\n<think>\n先算\n</think>\n\n"
        '<tool_call>\n{"name": "sm3", "arguments": {"text": "密"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n66c7\n</tool_response>"
        "\n<tool_response>\nf0f4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n想一想\n</think>\n\n杂凑算法。<|im_end|>\n"
    )


def test_the_banner_is_plain():
    text = demo_model.banner("there is no CUDA GPU")
    assert "DEMONSTRATION" in text and "there is no CUDA GPU" in text and "random" in text
