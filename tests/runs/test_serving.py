"""What was trained answers elsewhere: plain transformers and peft, llama.cpp, a client over HTTP.

uv run --group serving --extra gguf pytest -m "not long" tests/runs/test_serving.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export import main
from finetuning.data.chat_template import encode_prompt
from finetuning.model.loading import load_for_inference
from finetuning.runs.model_card import model_card
from tests.helpers.llama_server import serving
from tests.helpers.taught_model import AFTER, QUESTION, make_taught_model

pytestmark = pytest.mark.slow
ASKED = [{"role": "user", "content": QUESTION}]
UNKNOWN = [
    {"role": "system", "content": "简短。"},
    {"role": "user", "content": "第12题：3乘以10模9？"},
]


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """final_model/ with an adapter that thinks, answers and stops."""
    return make_taught_model(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def exported(taught: Path, tmp_path_factory):
    """Exports in a format and a precision, each made once."""
    pytest.importorskip("gguf", reason="needs the package gguf: uv run --extra gguf")
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def export(kind: str, precision: str = "auto", trained: Path = taught) -> Path:
        name = f"{trained.parent.name}-{kind}-{precision}"
        output = folder / (f"{name}.gguf" if kind == "gguf" else name)
        if output not in done:
            places = ["--adapter", str(trained), "--output", str(output), "--device", "cpu"]
            done[output] = main([*places, "--format", kind, "--precision", precision])
        assert done[output] == 0
        return output

    return export


def greedy(model: torch.nn.Module, prompt: list[int], end: int) -> list[int]:
    """64 tokens of our own at most, without a cache: base and adapter apart."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + 64 and ids[-1] != end:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("ends", [True, False])
def test_llama_cpp_writes_the_same_tokens(taught, adapter, exported, precision, ends):
    """Of a model that stops by itself, and of one that has not learned to."""
    trained = taught if ends else adapter
    model, tokenizer = load_for_inference(trained, device="cpu")
    prompt, end = encode_prompt(tokenizer, ASKED), tokenizer.eos_token_id
    with serving(exported("gguf", precision, trained)) as server:
        said = server.goes_on(prompt, 64)
    assert said == greedy(model, prompt, end)
    assert (said[-1] == end and len(said) < 64) if ends else len(said) == 64


@pytest.mark.parametrize("kind", ["gguf", "ollama"])
def test_a_client_gets_thinking_and_answer_apart(exported, kind):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: uv run --group serving")
    path = exported(kind)
    with serving(path if kind == "gguf" else path / "model.gguf") as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none")
        asked = {"model": "crypto", "messages": ASKED, "temperature": 0, "max_tokens": 64}
        choice = client.chat.completions.create(**asked).choices[0]
        pieces = [
            chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)
        ]
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning_content.strip() == AFTER[0]
    assert choice.message.content.strip() == AFTER[1]
    streamed = [
        "".join(getattr(piece, part, None) or "" for piece in pieces)
        for part in ("reasoning_content", "content")
    ]
    assert [text.strip() for text in streamed] == list(AFTER)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_the_lines_of_the_card_make_it_answer(taught, exported, kind, tmp_path):
    """As they stand there, in a process that has never seen this project."""
    folder = exported("hf") if kind == "merged" else taught
    card = folder / "README.md"
    text = card.read_text("utf-8") if card.is_file() else model_card({}, "adapter", folder.name)
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert QUESTION in code and f'"{folder.name}"' in code
    more = "\nimport json\nprint(json.dumps([thinking, answer, len(said)]))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code + more],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown, said = done.stdout.rsplit("\n", 2)[:2]
    thinking, answer, count = json.loads(said)
    assert (thinking.strip(), answer.strip()) == AFTER and shown == answer and count < 64
