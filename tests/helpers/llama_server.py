"""llama.cpp's own server (its engine, templates and HTTP, from the wheel xllamacpp) with a GGUF file."""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """
import sys
import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.hostnames, settings.port = ["127.0.0.1"], 0
settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 1024, 1, 1
settings.use_jinja = True
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as transformers has it
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()  # ends with the one who started it
"""


class LlamaServer:
    """A running one. address: of its HTTP, http://127.0.0.1:port."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(
            self.address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def properties(self) -> Any:
        """How it stands, with the settings of a request that gives none."""
        with urllib.request.urlopen(f"{self.address}/props", timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, in which the names of control tokens are these."""
        said = self.post("/tokenize", content=text, add_special=False, parse_special=True)
        return said["tokens"]

    def goes_on(self, prompt: list[int], count: int) -> list[int]:
        """The greedy tokens behind a prompt."""
        more = {"temperature": 0, "return_tokens": True}
        return self.post("/completion", prompt=prompt, n_predict=count, **more)["tokens"]

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        """Log probabilities of the five most probable; empty where the first is half a letter."""
        said = self.post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=5)
        first = said.get("completion_probabilities", [{"top_logprobs": []}])[0]
        return {token["id"]: token["logprob"] for token in first["top_logprobs"]}


@contextmanager
def serving(path: Path) -> Iterator[LlamaServer]:
    """Within it, the file is served. Skips where the wheel is not installed."""
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: uv run --group serving")
    with (
        tempfile.TemporaryFile("w+") as log,  # a pipe that nobody reads would stop the server
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            address = process.stdout.readline().strip()
            if not address.startswith("http"):
                log.seek(0)
                raise AssertionError(log.read()[-3000:])
            yield LlamaServer(address)
        finally:
            process.kill()  # asked to end, it hangs once in a hundred times, and nothing of it is read then
