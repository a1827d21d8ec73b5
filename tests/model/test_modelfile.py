"""ollama's template says what the model's own chat template says.

uv run --group serving pytest -m "not long" tests/model/test_modelfile.py
"""

import copy
import re

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from finetuning.common.errors import UserError
from finetuning.data.chat_template import chat_format, render
from finetuning.model.demo_model import CHAT_TEMPLATE
from finetuning.model.modelfile import context_length, frame_of, go_template, modelfile, rendered
from finetuning.model.sampling_defaults import SamplingDefaults
from tests.helpers.go_template import rendered_by_go
from tests.helpers.qwen3_tokenizer import QWEN3_TEMPLATE, qwen3_tokenizer
from tests.helpers.templates import DAMAGED, FAMILIES, WHOLE

HEADERS = """\
{{- bos_token -}}{%- if messages[0].role != 'system' -%}
{{- '[head]system[end]\\n\\nHeute ist Montag.<|im_end|>' -}}{%- endif -%}
{%- for m in messages -%}{{- '[head]' ~ m.role ~ '[end]\\n\\n' ~ m.content ~ '<|im_end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[head]assistant[end]\\n\\n' -}}{%- endif -%}
"""
INSTRUCTIONS = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- '[SYS]' ~ m.content ~ '[/SYS]' -}}
{%- elif m.role == 'user' -%}{{- '[INST] ' ~ m.content ~ ' [/INST]' -}}
{%- else -%}{{- ' ' ~ m.content ~ '<|im_end|>' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '' -}}{%- endif -%}
"""
TEMPLATES = {
    "demonstration": CHAT_TEMPLATE,
    "qwen3-thinking": QWEN3_TEMPLATE,
    "reasoning stays": WHOLE,
    "headers": HEADERS,
    "instructions": INSTRUCTIONS,
}


def turn(role: str, content: str, thinking: str = "") -> dict[str, str]:
    return {"role": role, "content": content} | (
        {"reasoning_content": thinking} if thinking else {}
    )


SYSTEM, ASKED = (
    turn("system", "你是密码学助手。\n\n简短。"),
    turn("user", "SM4？ {{ .Content }} <b>\"'&"),
)
THOUGHT = turn("assistant", "128比特。\n\n- 甲", "先想。\n\n再想。")
CONVERSATIONS = [
    [*head, *tail]
    for head in ([], [SYSTEM])
    for tail in (
        [ASKED],
        [ASKED, THOUGHT, turn("user", "密钥呢？")],
        [
            ASKED,
            turn("assistant", "好"),
            turn("user", "为何？"),
            THOUGHT,
            turn("user", "🔑\u3000?"),
        ],
    )
]


@pytest.fixture
def tokenizer(request):
    own = copy.copy(qwen3_tokenizer())
    own.chat_template = request.param
    if request.param == HEADERS:
        own.bos_token = "<|endoftext|>"
    return own


def prompts(tokenizer) -> list[str]:
    switch = chat_format(tokenizer).switch
    texts = [render(tokenizer, c, None, switch, prompt=True) for c in CONVERSATIONS]
    return [text.removeprefix(tokenizer.bos_token or "") for text in texts]


@pytest.mark.parametrize("tokenizer", TEMPLATES.values(), ids=TEMPLATES, indirect=True)
def test_a_frame_says_what_the_template_says(tokenizer):
    frame = frame_of(tokenizer)
    assert [rendered(frame, c) for c in CONVERSATIONS] == prompts(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TEMPLATES.values(), ids=TEMPLATES, indirect=True)
def test_go_says_what_the_template_says(tokenizer):
    frame = frame_of(tokenizer)
    template = go_template(frame)
    assert rendered_by_go(template, CONVERSATIONS) == prompts(tokenizer)
    # Reasoning behind the last question, which ollama hands over when it goes on with a turn.
    open_turn = [ASKED, THOUGHT]
    assert rendered_by_go(template, [open_turn]) == [rendered(frame, open_turn)]
    assert "先想。\n\n再想。" in rendered(frame, open_turn)


def test_ollama_finds_the_marks_of_thinking():
    """It takes them from around the field Thinking of the messages."""
    text = go_template(frame_of(qwen3_tokenizer()))
    assert re.search(r"\}\}<think>\n\{\{ \.Thinking \}\}\n</think>\n\n\{\{ end \}\}", text)
    assert text.endswith("<|im_start|>assistant\n<think>\n")


def test_the_file_has_weights_template_stop_and_sampling():
    generation = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    defaults = SamplingDefaults.of(generation)
    system = "你是密码学助手。\n简短。"
    text = modelfile("model.gguf", qwen3_tokenizer(), defaults, 16_384, system)
    template = go_template(frame_of(qwen3_tokenizer()))
    assert text.splitlines()[0] == "FROM ./model.gguf"
    assert f'\nTEMPLATE """{template}"""\n' in text
    assert '\nSYSTEM """你是密码学助手。\n简短。"""\n' in text
    parameters = [line for line in text.splitlines() if line.startswith("PARAMETER")]
    assert parameters == [
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 16384",
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 20",
        "PARAMETER top_p 0.95",
        "PARAMETER min_p 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER repeat_last_n -1",
    ]
    plain = modelfile("model.gguf", qwen3_tokenizer(), SamplingDefaults.of(None), 4096)
    assert "SYSTEM" not in plain and "PARAMETER temperature 0\n" in plain


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
        {"temperature": 0.6, "repetition_penalty": 1.05},
    ],
)
def test_defaults_are_what_transformers_does(given: dict, tiny_model):
    """By the processors that its `generate` makes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config = GenerationConfig(**given)
    config, _ = model._prepare_generation_config(None)
    defaults = SamplingDefaults.of(model.generation_config)
    assert (defaults.temperature == 0) == (not config.do_sample)
    if config.do_sample:
        assert defaults.temperature == config.temperature
        assert (defaults.top_k, defaults.top_p) == (config.top_k, config.top_p)
        assert defaults.min_p == (config.min_p or 0)
    assert defaults.repeat_penalty == config.repetition_penalty


@pytest.mark.parametrize(
    ("positions", "longest", "context"),
    [(262_144, 2048, 16_384), (262_144, 20_000, 20_000), (4096, 2048, 4096), (4096, 8192, 4096)],
)
def test_a_chat_has_room_for_a_long_thought(positions: int, longest: int, context: int):
    assert context_length(positions, longest) == context


MANNERS = {**FAMILIES, **DAMAGED}


@pytest.mark.parametrize("tokenizer", MANNERS.values(), ids=MANNERS, indirect=True)
def test_a_template_is_said_right_or_refused(tokenizer, request):
    """Of every manner; these can be said: turns of text, content, text, whatever becomes of reasoning."""
    name = request.node.callspec.id
    try:
        frame = frame_of(tokenizer)
    except UserError as error:
        assert "Use --format gguf" in str(error)
        assert name not in ("qwen3", "whole", "closing")
        return
    assert [rendered(frame, c) for c in CONVERSATIONS] == prompts(tokenizer)


def test_what_a_modelfile_can_not_say_is_refused():
    with pytest.raises(UserError, match="which ends a text there"):
        modelfile("model.gguf", qwen3_tokenizer(), SamplingDefaults.of(None), 4096, 'say """')
    own = copy.copy(qwen3_tokenizer())
    own.chat_template = QWEN3_TEMPLATE.replace(
        "'<|im_start|>' ~ message.role", "'{' ~ '{' ~ message.role"
    )
    with pytest.raises(UserError, match="itself writes"):
        frame_of(own)
