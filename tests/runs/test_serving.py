"""What was trained answers elsewhere: plain transformers and peft, llama.cpp, a client over HTTP.

uv run --group serving --extra gguf pytest -m "not long" tests/runs/test_serving.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export import main
from finetuning.data.chat_template import encode_prompt
from finetuning.model.loading import load_for_inference
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


# As somebody would write it who has never seen this project.
_PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
kind, folder, question = sys.argv[1:]
if kind == "hf":
    model = AutoModelForCausalLM.from_pretrained(folder)
else:
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
asked = [{"role": "user", "content": question}]
asks = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
prompt = tokenizer.apply_chat_template(asked, **asks)
said = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1]:]
print(json.dumps([tokenizer.decode(said, skip_special_tokens=True), len(said)]))
"""


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_plain_transformers_and_peft_say_it_too(taught, exported, kind, tmp_path):
    folder = exported("hf") if kind == "hf" else taught
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, kind, str(folder), QUESTION],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text, count = json.loads(done.stdout.splitlines()[-1])
    thinking, _, answer = text.partition("</think>")
    assert (thinking.strip(), answer.strip()) == AFTER and count < 64
